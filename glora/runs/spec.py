"""One run as data: one data set, one seed, one size (or a preset) of a recipe."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..backbones import HUB
from ..config import SearchSpace
from ..presets import PRESETS
from ..protocols import OwnData, Protocol, own_data_from_dict, own_protocol, protocol
from .recipes import RunRecipe, recipe_from_dict

SPEC_FORMAT = 1


@dataclass(frozen=True)
class RunSpec:
    """The description from which a run folder is made.

    Args:
        recipe: how to train and search.
        dataset, shots, seed: the data; ``shots`` is None if the protocol has no shots.
        size: one of the recipe's sizes: ranks of the supernet and limit of the search.
        preset: a fixed path of :mod:`glora.presets`, with the size's largest rank; None for a supernet.
        data: the folder with the protocol's data; for own data, that of their written split.
        weights: the backbone's weights: a file, ``"hub"``, or None for a random initialisation; for texts a folder of
            model and tokenizer in place of a file.
        own: the description of own data; None for a protocol's.
    """

    recipe: RunRecipe
    dataset: str
    shots: int | None
    seed: int
    size: str
    preset: str | None
    data: str
    weights: str | None
    own: OwnData | None = None

    @property
    def name(self) -> str:
        """The name of the run's folder: unique within a study."""
        shots = [] if self.shots is None else [f"{self.shots}shots"]
        return "-".join([self.dataset, *shots, f"seed{self.seed}"])

    @property
    def protocol(self) -> Protocol:
        return protocol(self.recipe.protocol) if self.own is None else own_protocol(self.own)

    @property
    def backbone(self) -> str:
        """The model's name; of a folder with a model of texts its last part."""
        name = self.recipe.model.name
        return Path(name).name if Path(name).is_absolute() else name

    @property
    def rank(self) -> int:
        """The largest rank, for which storages are made."""
        return max(self.recipe.sizes[self.size].ranks)

    @property
    def space(self) -> SearchSpace | None:
        """The search space; None for a preset."""
        if self.preset:
            return None
        recipe = self.recipe
        return SearchSpace(
            recipe.sizes[self.size].ranks, bias_free=recipe.model.bias_free, shares=recipe.training.shares
        )

    @property
    def limit(self) -> int | str | None:
        """How many support parameters the searched path may read; ``"mean"`` depends on the layers."""
        return None if self.preset else self.recipe.sizes[self.size].limit

    @property
    def product(self) -> str:
        return PRESETS[self.preset].product or self.recipe.model.product if self.preset else self.recipe.model.product

    def to_dict(self) -> dict[str, Any]:
        """Plain data for ``run.json``; the inverse of :func:`spec_from_dict`."""
        return {
            "format": SPEC_FORMAT,
            "protocol": self.recipe.protocol,
            "dataset": self.dataset,
            "shots": self.shots,
            "seed": self.seed,
            "size": self.size,
            "preset": self.preset,
            "limit": self.limit,
            "space": self.space.to_dict() if self.space else None,
            "data": self.data,
            "weights": self.weights,
            **({} if self.own is None else {"own": self.own.to_dict()}),
            "recipe": self.recipe.to_dict(),
        }


def spec_from_dict(content: Mapping[str, Any]) -> RunSpec:
    """The run that :meth:`RunSpec.to_dict` described. Raises ValueError for another format, KeyError if damaged."""
    if content["format"] != SPEC_FORMAT:
        raise ValueError(f"expected run format {SPEC_FORMAT}, got {content['format']!r}; a newer glora may read it")
    names = ("dataset", "shots", "seed", "size", "preset", "data", "weights")
    described = own_data_from_dict(content["own"]) if "own" in content else None
    return RunSpec(recipe_from_dict(content["recipe"]), **{name: content[name] for name in names}, own=described)


def plan_runs(
    recipe: RunRecipe,
    data: str | Path,
    *,
    datasets: Iterable[str] = ("all",),
    shots: Sequence[int] | None = None,
    seeds: Sequence[int] | None = None,
    size: str | None = None,
    preset: str | None = None,
    weights: str | None = None,
    own: OwnData | None = None,
) -> list[RunSpec]:
    """Every requested run: each data set, number of shots and seed, in this order.

    Args:
        data: the folder with the protocol's data; for own data the folder that their split is written into.
        datasets: names of the protocol, or ``"all"``.
        shots, seeds: None for the recipe's.
        own: the description of own data, if the recipe is for such.

    Raises:
        ValueError: an unknown data set, size or preset, shots where the protocol has none, or a value twice.
    """
    known = (protocol(recipe.protocol) if own is None else own_protocol(own)).datasets
    names = list(known) if list(datasets) == ["all"] else list(datasets)
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        raise ValueError(f"dataset: expected 'all' or names out of {list(known)}, got {unknown or names}")
    if preset is not None and preset not in PRESETS:
        raise ValueError(f"preset: expected one of {list(PRESETS)}, got {preset!r}")
    if shots and not recipe.shots:
        raise ValueError(f"shots: {recipe.protocol} has none, got {list(shots)}")
    all_shots: list[int | None] = list(recipe.shots if shots is None else shots) or [None]
    all_seeds = list(recipe.seeds if seeds is None else seeds)
    for argument, values in (("dataset", names), ("shots", all_shots), ("seeds", all_seeds)):
        if not values or len(set(values)) != len(values):
            raise ValueError(f"{argument}: expected distinct values, got {values}")
    chosen = recipe.size(size)
    folder = str(Path(data).resolve())
    file = weights if weights in (None, HUB) else str(Path(weights).resolve())
    return [
        RunSpec(recipe, name, k, seed, chosen, preset, folder, file, own)
        for name in names
        for k in all_shots
        for seed in all_seeds
    ]


def plan_own_runs(
    recipe: RunRecipe,
    own: OwnData,
    split: str | Path,
    *,
    seeds: Sequence[int] | None = None,
    size: str | None = None,
    preset: str | None = None,
    weights: str = HUB,
) -> list[RunSpec]:
    """Every requested run on data of one's own: one for each seed. The split is the same for all of them.

    Args:
        own: the description of the data (:func:`glora.protocols.split_images`, ``split_texts``).
        split: the folder that their split is written into.
        seeds: None for the recipe's.
        weights: ``"hub"``, ``"none"`` for a random initialisation, or for images a file. The weights of a model of
            texts that is a folder are those in it.

    Raises:
        ValueError: an unknown size or preset, a value twice, or a file of weights for texts.
    """
    if recipe.texts and weights not in (HUB, "none"):
        raise ValueError(f"weights: expected 'hub' or 'none' for texts, got {weights!r}; --model takes a folder")
    folder = Path(recipe.model.name)
    if recipe.texts and folder.is_dir():
        recipe = replace(recipe, model=replace(recipe.model, name=str(folder.resolve())))
        weights = weights if weights == "none" else recipe.model.name
    source = None if weights == "none" else weights
    return plan_runs(recipe, split, seeds=seeds, size=size, preset=preset, weights=source, own=own)
