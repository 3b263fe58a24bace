"""Interleaved, paired timing: A B A B ..., so that a drifting machine biases no ratio."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Ratio:
    """Time of a candidate over the time of a baseline, from paired rounds of one run."""

    median: float
    low: float
    high: float
    candidate_seconds: float
    baseline_seconds: float
    rounds: int


def _seconds(function: Callable[[], object]) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def interleave(functions: dict[str, Callable[[], object]], rounds: int, warmup: int = 2) -> dict[str, list[float]]:
    """Seconds of every function in every round; each round runs all of them, in alternating order."""
    for _ in range(warmup):
        for function in functions.values():
            function()
    times: dict[str, list[float]] = {name: [] for name in functions}
    for index in range(rounds):
        order = list(functions) if index % 2 == 0 else list(reversed(functions))
        for name in order:
            times[name].append(_seconds(functions[name]))
    return times


def ratio(times: dict[str, list[float]], candidate: str, baseline: str) -> Ratio:
    """The median of the paired ratios, with the smallest and largest."""
    paired = [a / b for a, b in zip(times[candidate], times[baseline])]
    return Ratio(
        statistics.median(paired),
        min(paired),
        max(paired),
        statistics.median(times[candidate]),
        statistics.median(times[baseline]),
        len(paired),
    )
