"""Settings of the evolutionary search, as plain data."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

OBJECTIVES = ("score", "front")
QUICK = {"population": 20, "top": 5, "crossover": 10, "mutation": 10, "generations": 5}


@dataclass(frozen=True)
class SearchSettings:
    """The evolution's settings; the defaults are the paper's.

    Args:
        population: candidates of the first generation, all random.
        top: how many of the best so far are parents of offspring.
        crossover: offspring per generation that take each layer's path from one of two parents.
        mutation: offspring per generation that redraw some layers' paths of one parent.
        mutation_probability: the chance of each layer to be redrawn.
        generations: generations of offspring after the first.
        seed: of every draw.
        objective: what makes a parent: ``"score"``, or ``"front"`` for score and few parameters at once (NSGA-II:
            non-dominated sorting, then crowding distance).
        halving: growing shares of the validation split, the last 1, such as ``(0.25, 0.5, 1)``. A generation is
            scored on each in turn, and the better half goes on to the next. Empty: all are scored on all of it.

    Raises:
        ValueError: a value out of range.
    """

    population: int = 50
    top: int = 10
    crossover: int = 25
    mutation: int = 25
    mutation_probability: float = 0.2
    generations: int = 20
    seed: int = 0
    objective: str = "score"
    halving: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        least_of = {"population": 1, "top": 1, "crossover": 0, "mutation": 0, "generations": 0, "seed": 0}
        for name, least in least_of.items():
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise ValueError(f"{name}: expected an integer from {least}, got {value!r}")
        if not _is_number(self.mutation_probability) or not 0 < self.mutation_probability <= 1:
            raise ValueError(
                f"mutation_probability: expected a number above 0 and up to 1, got {self.mutation_probability!r}"
            )
        if self.objective not in OBJECTIVES:
            raise ValueError(f"objective: expected one of {OBJECTIVES}, got {self.objective!r}")
        if not isinstance(self.halving, (tuple, list)) or not _grows_to_one(self.halving):
            raise ValueError(f"halving: expected growing shares above 0, the last 1, or none; got {self.halving!r}")
        object.__setattr__(self, "halving", tuple(self.halving))

    @classmethod
    def quick(cls, **changes: Any) -> SearchSettings:
        """Settings for a first look: 120 candidates in place of 1,050.

        Args:
            changes: other values of any setting.

        >>> SearchSettings().candidates, SearchSettings.quick().candidates
        (1050, 120)
        >>> SearchSettings.quick(generations=2, seed=1).candidates
        60
        """
        return cls(**{**QUICK, **changes})

    @property
    def offspring(self) -> int:
        """Candidates of every generation after the first."""
        return self.crossover + self.mutation

    @property
    def candidates(self) -> int:
        """Candidates of a whole search."""
        return self.population + self.generations * self.offspring

    @property
    def shares(self) -> tuple[float, ...]:
        """The share of the validation split at each rung."""
        return self.halving or (1,)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {**asdict(self), "halving": list(self.halving)}


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _grows_to_one(shares: tuple[float, ...] | list[float]) -> bool:
    if not all(_is_number(share) for share in shares):
        return False
    return not shares or (all(a < b for a, b in zip((0, *shares), shares)) and shares[-1] == 1)
