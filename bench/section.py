"""The figures of one interleaved run, as plain data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from .timing import WHOLE, Phases, ratio, total

CONTRACT = "u S"  # the unit of the numerical contract, element by element
RELATIVE = "relative, in the 2-norm"


class Comparison(NamedTuple):
    """Two entrants: the time of one is divided by the time of the other."""

    candidate: str
    baseline: str


@dataclass
class Section:
    """One interleaved run.

    Attributes:
        group: ``"layer"``, ``"model"`` and the like.
        name: what was measured; unique in its group.
        title: one line for tables and plots.
        tolerance, errors: the error against fp64 that ours may have, and the largest seen, by entrant.
        unit: the unit of both.
        refused, missing: entrants not timed because they were wrong, or not installed; with the reason.
        phases: seconds by part, entrant and round.
        comparisons: what :meth:`ratios` divides, in the order of the table.
        facts: whatever else was counted, by entrant.
        strategies: the strategy of each of our entrants.
        uncompared: parts without ratios.
        units: how many images, tokens or candidates one run of an entrant is, by what they are.
    """

    group: str
    name: str
    title: str
    tolerance: float = 0.0
    errors: dict[str, float] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    phases: Phases = field(default_factory=dict)
    comparisons: tuple[Comparison, ...] = ()
    facts: dict[str, dict[str, float]] = field(default_factory=dict)
    units: dict[str, int] = field(default_factory=dict)
    strategies: dict[str, str] = field(default_factory=dict)
    unit: str = CONTRACT
    uncompared: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if len(self.phases) > 1:
            self.phases = {**self.phases, WHOLE: total(self.phases)}

    def ratios(self) -> list[dict[str, Any]]:
        """Every comparison in every part, without entrants that were not timed."""
        return [
            {"phase": phase, **comparison._asdict(), **asdict(ratio(times, *comparison))}
            for phase, times in self.phases.items()
            for comparison in self.comparisons
            if phase not in self.uncompared and {*comparison} <= set(times)
        ]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        content = {name: value for name, value in vars(self).items() if name not in ("comparisons", "uncompared")}
        return {**content, "ratios": self.ratios()}


def against(baselines: Iterable[str], candidates: Iterable[str]) -> tuple[Comparison, ...]:
    """Comparisons of every candidate with every baseline, except with itself."""
    return tuple(Comparison(c, b) for c in candidates for b in baselines if c != b)


def per_run(times: Mapping[str, list[float]], share: Mapping[str, int]) -> dict[str, list[float]]:
    """Times divided by how many runs one timing of an entrant holds; 1 for those not in ``share``."""
    return {name: [seconds / share.get(name, 1) for seconds in found] for name, found in times.items()}
