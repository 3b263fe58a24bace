"""One run as data: one data set, one seed, one size (or a preset) of a recipe."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import SearchSpace
from ..presets import PRESETS
from ..protocols import Protocol, protocol
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
        data: the folder with the protocol's data.
        weights: the backbone's weights: a file, ``"hub"``, or None for a random initialisation.
    """

    recipe: RunRecipe
    dataset: str
    shots: int | None
    seed: int
    size: str
    preset: str | None
    data: str
    weights: str | None

    @property
    def name(self) -> str:
        """The name of the run's folder: unique within a study."""
        shots = [] if self.shots is None else [f"{self.shots}shots"]
        return "-".join([self.dataset, *shots, f"seed{self.seed}"])

    @property
    def protocol(self) -> Protocol:
        return protocol(self.recipe.protocol)

    @property
    def rank(self) -> int:
        """The largest rank, for which storages are made."""
        return max(self.recipe.sizes[self.size].ranks)

    @property
    def space(self) -> SearchSpace | None:
        """The search space; None for a preset."""
        if self.preset:
            return None
        return SearchSpace(self.recipe.sizes[self.size].ranks, bias_free=self.recipe.model.bias_free)

    @property
    def limit(self) -> int | None:
        """How many support parameters the searched path may read."""
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
            "recipe": self.recipe.to_dict(),
        }


def spec_from_dict(content: Mapping[str, Any]) -> RunSpec:
    """The run that :meth:`RunSpec.to_dict` described. Raises ValueError for another format, KeyError if damaged."""
    if content["format"] != SPEC_FORMAT:
        raise ValueError(f"expected run format {SPEC_FORMAT}, got {content['format']!r}; a newer glora may read it")
    own = ("dataset", "shots", "seed", "size", "preset", "data", "weights")
    return RunSpec(recipe_from_dict(content["recipe"]), **{name: content[name] for name in own})


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
) -> list[RunSpec]:
    """Every requested run: each data set, number of shots and seed, in this order.

    Args:
        datasets: names of the protocol, or ``"all"``.
        shots, seeds: None for the recipe's.

    Raises:
        ValueError: an unknown data set, size or preset, shots where the protocol has none, or a value twice.
    """
    known = protocol(recipe.protocol).datasets
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
    file = weights if weights in (None, "hub") else str(Path(weights).resolve())
    return [
        RunSpec(recipe, name, k, seed, chosen, preset, folder, file)
        for name in names
        for k in all_shots
        for seed in all_seeds
    ]
