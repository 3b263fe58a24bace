"""Interleaved, paired timing: A B A B ..., so that a drifting machine biases no ratio."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch

Times = dict[str, list[float]]


@dataclass(frozen=True)
class Ratio:
    """Time of a candidate over the time of a baseline, from paired rounds of one run.

    Attributes:
        median, low, high: of the ratios of the rounds; low and high are the smallest and largest.
        candidate_seconds, baseline_seconds: median times.
        rounds: how many.
    """

    median: float
    low: float
    high: float
    candidate_seconds: float
    baseline_seconds: float
    rounds: int


def interleave(
    functions: Mapping[str, Callable[[], object]],
    rounds: int,
    *,
    warmup: int = 1,
    prepare: Callable[[], object] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Times:
    """Seconds of every function in every round.

    A round runs all of them once, forwards in even rounds and backwards in odd ones; functions to be
    compared closely should therefore be neighbours.

    Args:
        functions: what to time, by name.
        rounds: how many timed rounds.
        warmup: how many rounds to run before, untimed.
        prepare: called before every round, warm-up included; not timed.
        clock: seconds since some moment.

    Raises:
        ValueError: fewer than one round.
    """
    if rounds < 1:
        raise ValueError(f"rounds: expected at least 1, got {rounds}")
    times: Times = {name: [] for name in functions}
    for index in range(-warmup, rounds):
        if prepare is not None:
            prepare()
        order = list(functions)[:: 1 if index % 2 == 0 else -1]
        with _no_garbage_collection():
            for name in order:
                seconds = _seconds(functions[name], clock)
                if index >= 0:
                    times[name].append(seconds)
    return times


def ratio(times: Mapping[str, list[float]], candidate: str, baseline: str) -> Ratio:
    """The median of the paired ratios, with the smallest and largest."""
    paired = [a / b for a, b in zip(times[candidate], times[baseline], strict=True)]
    return Ratio(
        statistics.median(paired),
        min(paired),
        max(paired),
        statistics.median(times[candidate]),
        statistics.median(times[baseline]),
        len(paired),
    )


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Collect now, and not again before the ``with`` block ends."""
    gc.collect()
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _seconds(function: Callable[[], object], clock: Callable[[], float]) -> float:
    _synchronize()
    start = clock()
    function()
    _synchronize()
    return clock() - start


def _synchronize() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
