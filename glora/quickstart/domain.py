"""What a domain of the demonstration is: a backbone, tasks to adapt it to, and the settings that suit both."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from ..config import SearchSpace
from ..evolution.loop import SearchSettings

SEARCH = SearchSettings(population=20, top=10, crossover=10, mutation=10, generations=8)
_LORA_LIKE = ("linear", "bitfit", "ssf", "lora", "lora-attention", "lora-longer", "hira", "fixed")
_GLORA_LIKE = ("largest", "glora", "glora-paper")


class FewShot(NamedTuple):
    """One few-shot draw of a target task; no sample of the test split is in another one."""

    train: TensorDataset
    validation: TensorDataset
    test: TensorDataset
    shifted_tests: dict[str, TensorDataset]


class Source(NamedTuple):
    """The source task that a backbone is pre-trained on, and samples like them that it has not seen."""

    train: Dataset
    unseen: Dataset


@dataclass(frozen=True)
class Domain:
    """Tasks with one backbone, and how each is trained and searched.

    Args:
        name: what its first task goes by on the command line.
        title: what it is called in pictures.
        tasks: the names of its tasks; all domains' names differ.
        classes: of every task.
        samples: what a sample is called, in the plural.
        model: what the backbone is, in words.
        origins: of data and weights, with their licences, a line each.
        extra: what installs them, with ``pip install 'glora[extra]'``.
        make_backbone: the model as it is pre-trained, or before that if there is a ``source``; it has a classifier
            ``head`` and timm's ``reset_classifier``.
        draw: a few-shot draw of a task, a function of the number of samples a class and the seed.
        validation: samples a class to validate on.
        shots, curve: samples a class to train, by default and in a few-shot curve.
        attention: which layers LoRA adapts alone, by the ends of their names, in the row for attention.
        rates: peak learning rates by method (``METHODS``).
        rows: the methods of the default table; GLoRA's rows are always in it.
        refit_steps: of the searched path, if all methods take ``steps``.
        random_paths: how many the mean of the row is over.
        seeds: draws that the default table averages over.
        encode: makes what the backbone reads from what ``draw`` returns; None if these are the same.
        source: what the backbone is pre-trained on, in ``pretraining_steps``; None if it comes pre-trained.
    """

    name: str
    title: str
    tasks: tuple[str, ...]
    classes: int
    samples: str
    model: str
    origins: tuple[str, ...]
    extra: str
    make_backbone: Callable[[], nn.Module]
    draw: Callable[[str, int, int], FewShot]
    validation: int
    shots: int
    curve: tuple[int, ...]
    attention: tuple[str, ...]
    rates: Mapping[str, float]
    rows: tuple[str, ...]
    rank: int = 4
    lora_rank: int = 3
    steps: int = 500
    refit_steps: int = 200
    batch_size: int = 32
    search: SearchSettings = SEARCH
    random_paths: int = 10
    seeds: int = 3
    encode: Callable[[Tensor], Tensor] | None = None
    source: Callable[[], Source] | None = None
    pretraining_steps: int | None = None

    @property
    def space(self) -> SearchSpace:
        """The paper's kinds; while a supernet trains, low ranks are drawn half of the time."""
        return SearchSpace(ranks=(self.rank,), shares={"lora": 0.5})

    @property
    def evaluations(self) -> int:
        """The candidates of a search."""
        return self.search.population + self.search.generations * (self.search.crossover + self.search.mutation)

    def few_shot(self, task: str, shots: int, seed: int) -> FewShot:
        """A draw as the backbone reads it."""
        drawn, encode = self.draw(task, shots, seed), self.encode
        if encode is None:
            return drawn

        def encoded(part: TensorDataset) -> TensorDataset:
            x, y = part.tensors
            return TensorDataset(encode(x), y)

        shifted = {name: encoded(part) for name, part in drawn.shifted_tests.items()}
        return FewShot(encoded(drawn.train), encoded(drawn.validation), encoded(drawn.test), shifted)


def rates(lora: float, glora: float, full: float) -> dict[str, float]:
    """Learning rates by method: of LoRA and all that is trained like it, of GLoRA's tensors, of all weights."""
    return {**dict.fromkeys(_LORA_LIKE, lora), **dict.fromkeys(_GLORA_LIKE, glora), "full": full}


def split_by_class(y: Tensor, shots: int, validation: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Masks of ``shots`` samples a class to train, ``validation`` a class to validate, and all others; by the seed.

    Raises:
        ValueError: more shots than there are samples.
    """
    most = int(y.bincount().min()) - validation - 1
    if not 1 <= shots <= most:
        raise ValueError(f"shots: expected 1 to {most}, got {shots}")
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    place = torch.empty_like(order)  # how many samples of the same class come earlier in the order
    for label in range(int(y.max()) + 1):
        members = order[y[order] == label]
        place[members] = torch.arange(len(members))
    return place < shots, (place >= shots) & (place < shots + validation), place >= shots + validation


@cache
def packaged_file(package: str, distribution: str, file: str, sha256: str, extra: str) -> Path:
    """A file that an installed package ships, found without importing the package, and checked.

    Args:
        distribution: what the package is installed by, with the version that the file is known from.
        extra: the extra of glora that installs it.

    Raises:
        ValueError: no such package or file, or other bytes than those with this SHA-256.
    """
    spec = find_spec(package)
    folders = [Path(folder) for folder in (spec and spec.submodule_search_locations) or ()]
    found = next((folder / file for folder in folders if (folder / file).is_file()), None)
    if found is None:
        raise ValueError(
            f"tasks: expected the file {file} of the package {distribution}, found none: pip install 'glora[{extra}]'"
        )
    digest = hashlib.sha256(found.read_bytes()).hexdigest()
    if digest != sha256:
        raise ValueError(f"{found}: expected the file of {distribution}, SHA-256 {sha256}, got {digest}")
    return found
