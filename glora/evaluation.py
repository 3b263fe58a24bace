"""Loss and accuracy of a classifier, and of a candidate path at merged speed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, IterableDataset
from tqdm.auto import tqdm

from .arguments import require_integer
from .config import PathConfig
from .dataset import collate, require_data, require_output, require_pair
from .distributed import require_whole
from .layers.base import GLoRALayer
from .merging import require_mergeable
from .models.modules import evaluating, replaced_modules, require_layers, require_model
from .paths import paths_of, using_paths


class Metrics(NamedTuple):
    """Mean cross-entropy and accuracy (0 to 1) over ``samples``."""

    loss: float
    accuracy: float
    samples: int


class Totals(NamedTuple):
    """Cross-entropy and right answers added up over ``samples``; those of parts of a data set can be added."""

    loss: float
    right: int
    samples: int

    @property
    def means(self) -> Metrics:
        return Metrics(self.loss / self.samples, self.right / self.samples, self.samples)


def evaluate(
    model: nn.Module, dataset: Dataset, batch_size: int = 256, *, workers: int = 0, progress: bool = False
) -> Metrics:
    """Mean cross-entropy and accuracy of ``model`` on ``(input, class)`` pairs, in eval mode.

    Args:
        workers: processes that read the data set; 0 reads it in this one.
        progress: show a bar.

    Raises:
        ValueError: an empty data set.
        TypeError: anything but a data set of ``(input, class)``, such as a ``DataLoader`` or samples that are
            dictionaries; a model that returns anything but a tensor of logits.
    """
    require_model(model)
    if not isinstance(dataset, IterableDataset):
        require_data("dataset", dataset)
    require_integer("batch_size", batch_size, 1)
    require_integer("workers", workers, 0)
    loader = _loader(dataset, batch_size, workers)
    return _count(model, tqdm(loader, desc="test", unit="batch", disable=not progress)).means


def count(model: nn.Module, dataset: Dataset, batch_size: int, workers: int = 0) -> Totals:
    """As :func:`evaluate`, but as sums; errors name the data set ``validation``, as a search does."""
    return _count(model, _loader(dataset, batch_size, workers), "validation")


def _loader(dataset: Dataset, batch_size: int, workers: int = 0) -> DataLoader:
    # a generator of its own: without it the loader draws from torch's, which dropout uses
    return DataLoader(dataset, batch_size, num_workers=workers, collate_fn=collate, generator=torch.Generator())


@torch.no_grad()
def _count(model: nn.Module, batches: Iterable[list[Tensor]], argument: str = "dataset") -> Totals:
    device = next(model.parameters()).device
    loss, right, samples = 0.0, 0, 0
    with evaluating(model):
        for batch in batches:
            require_pair(argument, batch)
            x, target = (part.to(device) for part in batch)
            logits = model(x)
            require_output(logits)
            loss += float(F.cross_entropy(logits.float(), target, reduction="sum"))
            right += int((logits.argmax(-1) == target).sum())
            samples += len(target)
    if not samples:
        raise ValueError("dataset: expected at least one sample, got none")
    return Totals(loss, right, samples)


def evaluate_merged(
    model: nn.Module, paths: Mapping[str, PathConfig] | PathConfig, dataset: Dataset, batch_size: int = 256
) -> Metrics:
    """As :func:`evaluate`, with every layer merged under ``paths`` for the time of the call.

    Each W_eff is assembled once, not once per batch; layers with a quantised base are used unmerged. The
    model and its paths are left as they are.

    Raises:
        ValueError: an empty data set, paths of another model, or sharded parameters.
    """
    with merged_under(model, mergeable_layers(model), paths, {}) as merged:
        return evaluate(merged, dataset, batch_size)


class MergedLayer(NamedTuple):
    """A plain layer, and the path that it was merged under."""

    path: PathConfig
    plain: nn.Module


def mergeable_layers(model: nn.Module) -> dict[str, GLoRALayer]:
    """The adapted layers by name. Raises ValueError if one has hooks, or parameters that are sharded or on meta."""
    require_whole(model)
    layers = require_layers(model)
    require_mergeable(layers)
    return layers


@contextmanager
def merged_under(
    model: nn.Module,
    layers: Mapping[str, GLoRALayer],
    paths: Mapping[str, PathConfig] | PathConfig,
    kept: dict[str, MergedLayer],
) -> Iterator[nn.Module]:
    """For a ``with`` block, a model of plain layers that computes what ``model`` does under ``paths``.

    Args:
        layers: :func:`mergeable_layers` of ``model``.
        kept: plain layers of the previous call by name. Those with an equal path are used again, the others replaced.

    Raises:
        ValueError: paths of another model.
    """
    paths = paths_of(layers, paths)
    exact = {name: layer for name, layer in layers.items() if layer.merges_exactly}
    for name, layer in exact.items():
        if name not in kept or kept[name].path != paths[name]:
            kept.pop(name, None)  # first: both might not fit into memory
            kept[name] = MergedLayer(paths[name], layer.merge(paths[name], safe=False))
    replacements: dict[nn.Module, nn.Module] = {layer: kept[name].plain for name, layer in exact.items()}
    unmerged = using_paths(model, paths) if len(exact) < len(layers) else nullcontext()
    with unmerged, replaced_modules(model, replacements):
        yield replacements.get(model, model)
