"""Which candidates are better: by score, or by score and size at once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol, TypeVar

from ..paths import Paths


class Scored(Protocol):
    """What :func:`front` compares."""

    @property
    def score(self) -> float: ...

    @property
    def parameters(self) -> int: ...


T = TypeVar("T", bound=Scored)


class Candidate(NamedTuple):
    """A scored path of the whole model; ``share``: the part of the validation split that it was scored on."""

    paths: Paths
    score: float
    parameters: int
    generation: int
    share: float = 1.0


def best_first(candidate: Candidate) -> tuple[float, int]:
    """Sort key: the best first. A NaN score comes last."""
    score = candidate.score if candidate.score == candidate.score else -math.inf
    return -score, candidate.parameters


def in_order(candidates: Sequence[Candidate], objective: str) -> list[Candidate]:
    """The candidates, best first: by :func:`best_first`, or for ``"front"`` as in NSGA-II, by front, then crowding."""
    if objective == "score":
        return sorted(candidates, key=best_first)
    rest = [c for c in candidates if not math.isnan(c.score)]
    ordered: list[Candidate] = []
    while rest:
        front, rest = _split(rest)
        ordered += _sparse_first(front)
    return ordered + [c for c in candidates if math.isnan(c.score)]


def front(candidates: Sequence[T]) -> list[T]:
    """The candidates that no other beats in score without more parameters, or in parameters without a lower score.

    The smallest comes first; of equals only the earliest is there, and none with a NaN score.
    """
    return _split([c for c in candidates if not math.isnan(c.score)])[0]


def _split(candidates: Sequence[T]) -> tuple[list[T], list[T]]:
    """The front, the smallest first, and the others."""
    chosen: list[T] = []
    others: list[T] = []
    for candidate in sorted(candidates, key=lambda c: (c.parameters, -c.score)):
        better = not chosen or candidate.score > chosen[-1].score
        (chosen if better else others).append(candidate)
    return chosen, others


def _sparse_first(chosen: Sequence[Candidate]) -> list[Candidate]:
    """A front by crowding distance (Deb et al. 2002): its two ends first, then those furthest from their neighbours."""
    distances = [math.inf] * len(chosen)
    sizes, scores = [c.parameters for c in chosen], [c.score for c in chosen]
    for i in range(1, len(chosen) - 1):
        distances[i] = _gap(sizes, i) + _gap(scores, i)
    order = sorted(range(len(chosen)), key=lambda i: (-distances[i], best_first(chosen[i])))
    return [chosen[i] for i in order]


def _gap(values: Sequence[float], i: int) -> float:
    """The gap between the neighbours of value ``i``, as a part of the whole range. Values are sorted and distinct."""
    whole = values[-1] - values[0]
    return (values[i + 1] - values[i - 1]) / whole if math.isfinite(whole) else 0.0
