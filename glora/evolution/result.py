"""What a search found and what it took, as data and as JSON."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass

from ..files import write_atomically
from . import selection
from .selection import Candidate


@dataclass(frozen=True)
class SearchResult:
    """What a search found.

    Attributes:
        best: the candidate of the highest score (minus the mean loss, for the metric ``"loss"``); among equals the
            smallest, then the earliest.
        history: every candidate, in the order in which they were drawn. With halving, ``share`` says on how much of
            the validation split each was scored; only those of share 1 are parents, the best, or on the front.
        evaluated: evaluations made by this call; the others were in the journal.
        seconds: of this call.
        limit: the parameter limit, or None.
        evaluation_seconds: of all evaluations, added up over processes and over all calls that the journal knows of.
        cost: samples evaluated in all these calls, over those of the validation split: full evaluations.
    """

    best: Candidate
    history: tuple[Candidate, ...]
    evaluated: int
    seconds: float
    limit: int | None
    evaluation_seconds: float = 0.0
    cost: float = 0.0

    @property
    def hours(self) -> float:
        """Process hours that all evaluations took."""
        return self.evaluation_seconds / 3600

    @property
    def front(self) -> tuple[Candidate, ...]:
        """The candidates that none beats in both score and parameters, the smallest first."""
        return tuple(selection.front([c for c in self.history if c.share == 1]))

    def to_dict(self) -> dict:
        """Plain data for JSON. An entry of ``history``: generation, parameters, score, share of the split.

        A score is minus the mean loss for the metric ``"loss"``; None if it is not finite, which JSON cannot hold.
        """
        return {
            "best": _describe(self.best),
            "limit": self.limit,
            "evaluations": len(self.history),
            "evaluated_now": self.evaluated,
            "seconds": self.seconds,
            "hours": self.hours,
            "cost": self.cost,
            "front": [_describe(candidate) for candidate in self.front],
            "history": [[c.generation, c.parameters, _number(c.score), c.share] for c in self.history],
        }

    def save(self, file: str | os.PathLike) -> None:
        """Write :meth:`to_dict` as JSON, atomically."""
        content = json.dumps(self.to_dict(), indent=1).encode()
        write_atomically(file, lambda stream: stream.write(content))


def _describe(candidate: Candidate) -> dict:
    paths = {name: path.to_dict() for name, path in candidate.paths.items()}
    return {**candidate._asdict(), "score": _number(candidate.score), "paths": paths}


def _number(score: float) -> float | None:
    return score if math.isfinite(score) else None
