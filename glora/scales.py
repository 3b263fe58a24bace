"""What each kind of each support tensor is multiplied by: plain frozen data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property

import torch
from torch import Tensor

from .config import KINDS, PathConfig

_LARGEST = 1e30


@dataclass(frozen=True)
class Scales:
    """A factor for each kind of each support tensor of one layer, as LoRA has ``alpha / rank`` for its one kind.

    A kind is read as its factor times what is stored: of a low rank the left factor is multiplied, of a vector or a
    constant the values. AdamW moves every number by about the learning rate, and what that does to a layer's output
    differs by a factor of hundreds between the kinds; these factors make up for it (:func:`glora.balance`).

    Args:
        A, B, C, D, E: the factor by kind, finite and not 0; a kind that is not named has 1, which is the paper.

    Raises:
        ValueError: a kind that the tensor does not have, or a factor that is no such number.

    Example:
        >>> layer.scales = glora.Scales(B={"vector": 1 / 16, "constant": 1 / 16})
    """

    A: Mapping[str, float] = field(default_factory=dict)
    B: Mapping[str, float] = field(default_factory=dict)
    C: Mapping[str, float] = field(default_factory=dict)
    D: Mapping[str, float] = field(default_factory=dict)
    E: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for slot, kinds in KINDS.items():
            given = getattr(self, slot)
            known = [kind for kind in kinds if kind != "none"]
            if not isinstance(given, Mapping) or not set(given) <= set(known):
                raise ValueError(f"{slot}: expected factors by kinds out of {known}, got {given!r}")
            for kind, factor in given.items():
                number = isinstance(factor, (int, float)) and not isinstance(factor, bool)
                if not number or not 0 < abs(factor) < _LARGEST:  # also false for NaN
                    raise ValueError(f"{slot}: expected a finite factor other than 0 for {kind!r}, got {factor!r}")
            kept = {kind: float(given[kind]) for kind in known if given.get(kind, 1) != 1}
            object.__setattr__(self, slot, kept)

    def __reduce__(self):
        return Scales.from_dict, (self.to_dict(),)  # without the tensors that are kept for paths

    def __hash__(self) -> int:
        return hash(tuple(self.factors.items()))

    @cached_property
    def factors(self) -> dict[tuple[str, str], float]:
        """The factors that are not 1, by tensor and kind: ``{("B", "vector"): 0.0625}``."""
        return {(each.name, kind): factor for each in fields(self) for kind, factor in getattr(self, each.name).items()}

    def of(self, slot: str, kind: str) -> float:
        """The factor of a kind."""
        return self.factors.get((slot, kind), 1.0)

    def apply(self, slot: str, kind: str, left: Tensor) -> Tensor:
        """The left storage of a kind, multiplied; the very same tensor if the factor is 1."""
        factor = self.factors.get((slot, kind))
        return left if factor is None else left * factor

    def of_path(self, path: PathConfig) -> Tensor:
        """The factors of the kinds of a path, A to E, on the CPU: ``(5,)``; 1 where a tensor is none."""
        known = self._of_paths.get(path)
        if known is None:
            factors = [self.of(slot, choice.kind) for slot, choice in path.choices.items()]
            known = torch.tensor(factors, dtype=torch.float64, device="cpu")
            self._of_paths[path] = known
        return known

    @cached_property
    def _of_paths(self) -> dict[PathConfig, Tensor]:
        return {}

    def to_dict(self) -> dict[str, dict[str, float]]:
        """Plain data for JSON: the factors that are not 1."""
        return {each.name: dict(getattr(self, each.name)) for each in fields(self) if getattr(self, each.name)}

    @staticmethod
    def from_dict(data: Mapping[str, Mapping[str, float]]) -> Scales:
        """The inverse of :meth:`to_dict`. Raises ValueError for unknown tensors or kinds."""
        if not isinstance(data, Mapping) or not set(data) <= set(KINDS):
            raise ValueError(f"scales: expected factors by tensors out of {list(KINDS)}, got {data!r}")
        return Scales(**data)
