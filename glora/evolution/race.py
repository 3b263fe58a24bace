"""Scoring a generation: every candidate on all samples, or successive halving (Jamieson and Talwalkar 2016)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial

from ..config import PathConfig
from ..paths import Paths
from ..sampling import PathSampler
from .journal import Part, Scores
from .offspring import Key
from .selection import Candidate, in_order


class Race:
    """Scores a generation: every candidate on the first rung, then the better half on each next rung."""

    def __init__(
        self, sampler: PathSampler, evaluate: Callable[..., float], scores: Scores, ends: Sequence[int], objective: str
    ):
        self.sampler, self.evaluate, self.scores = sampler, evaluate, scores
        self.ends, self.objective = ends, objective

    def sizes(self, candidates: int) -> list[int]:
        """The sizes, in samples, of all parts that are evaluated for so many candidates."""
        sizes: list[int] = []
        for start, end in zip([0, *self.ends], self.ends):
            sizes += [end - start] * candidates
            candidates = _better_half(candidates)
        return sizes

    def run(self, drawn: Sequence[Key], generation: int, on_scores: Callable[[int], object]) -> list[Candidate]:
        """All candidates in the order of ``drawn``, each with the score of the last rung that it reached."""
        reached: dict[Key, Candidate] = {}
        going, totals = list(drawn), dict.fromkeys(drawn, 0.0)
        for start, end in zip([0, *self.ends], self.ends):
            for key, total in self._totals(going, start, end, on_scores).items():
                totals[key] += total
                reached[key] = self._candidate(key, totals[key] / end, generation, end)
            ordered = in_order([reached[key] for key in going], self.objective)
            better = {tuple(c.paths.values()) for c in ordered[: _better_half(len(going))]}
            going = [key for key in going if key in better]
        return [reached[key] for key in drawn]

    def _totals(
        self, keys: Sequence[Key], start: int, end: int, on_scores: Callable[[int], object]
    ) -> dict[Key, float]:
        parts = {key: Part(_encode(key), start, end) for key in sorted(keys, key=_by_layer)}
        calls = {part: partial(self.evaluate, self._paths(key), start, end) for key, part in parts.items()}
        totals = self.scores.of(calls, on_scores)
        return {key: totals[part] for key, part in parts.items()}

    def _candidate(self, key: Key, score: float, generation: int, end: int) -> Candidate:
        paths = self._paths(key)
        return Candidate(paths, score, self.sampler.count(paths), generation, end / self.ends[-1])

    def _paths(self, key: Key) -> Paths:
        return dict(zip(self.sampler.layers, key))


def _better_half(candidates: int) -> int:
    return (candidates + 1) // 2


def _by_layer(key: Key) -> list[str]:
    """Sorts candidates so that neighbours have layers in common, which are then merged once."""
    return [_encode_path(path) for path in key]


def _encode(key: Key) -> str:
    return ";".join(_by_layer(key))


@cache
def _encode_path(path: PathConfig) -> str:
    return ",".join(path.to_dict().values())
