"""Interleaved, paired timing: A B A B ..., so that a drifting machine biases no ratio.

A timed function is called with a :class:`Watch` and times its parts with it. Anything outside of these is not timed:

    def step(watch):
        glora.set_paths(model, paths)
        with watch("forward"):
            y = model(x)
        with watch("backward"):
            y.backward(dy)
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch

WHOLE = "whole"
Times = dict[str, list[float]]  # seconds of every round, by the function's name
Phases = dict[str, Times]  # by the part's name


class Watch(Protocol):
    """Measures parts of a function."""

    def __call__(self, phase: str) -> AbstractContextManager[None]:
        """Time the ``with`` block; times of one name add up."""

    def seconds(self) -> dict[str, float]:
        """The seconds of each part since the last call."""


Timed = Callable[[Watch], object]


def plain(function: Callable[[], object]) -> Timed:
    """Time all of ``function`` as one part, :data:`WHOLE`."""

    def timed(watch: Watch) -> None:
        with watch(WHOLE):
            function()

    return timed


class ClockWatch:
    """Reads a clock before and after, with the GPU idle at both times if there is one.

    Args:
        clock: seconds since some moment. ``time.process_time`` counts CPU time, not the time that passes.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter):
        self._clock = clock
        self._found: dict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        _synchronize()
        start = self._clock()
        yield
        _synchronize()
        self._found[phase] += self._clock() - start

    def seconds(self) -> dict[str, float]:
        found, self._found = dict(self._found), defaultdict(float)
        return found


class EventWatch:
    """CUDA events on the current stream: the GPU's time, with the host running ahead of it.

    Args:
        event: what makes an event; for tests.
    """

    def __init__(self, event: Callable[[], torch.cuda.Event] | None = None):
        self._event = event or (lambda: torch.cuda.Event(enable_timing=True))
        self._found: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start, end = self._event(), self._event()
        start.record()
        yield
        end.record()
        self._found.append((phase, start, end))

    def seconds(self) -> dict[str, float]:
        total: dict[str, float] = defaultdict(float)
        for phase, start, end in self._found:
            end.synchronize()
            total[phase] += start.elapsed_time(end) / 1e3
        self._found = []
        return dict(total)


def interleave(
    functions: Mapping[str, Timed],
    rounds: int,
    *,
    warmup: int = 1,
    prepare: Callable[[], object] | None = None,
    watch: Watch | None = None,
) -> Phases:
    """Seconds of every part of every function in every round.

    A round runs all of them once, forwards in even rounds and backwards in odd ones; functions to be
    compared closely should therefore be neighbours.

    Args:
        functions: what to time, by name; all have the same parts.
        rounds: how many timed rounds.
        warmup: how many rounds to run before, untimed.
        prepare: called before every round, warm-up included; not timed.
        watch: how to measure; the default reads the wall clock.

    Raises:
        ValueError: fewer than one round, or functions that differ in their parts.
    """
    if rounds < 1:
        raise ValueError(f"rounds: expected at least 1, got {rounds}")
    watch = ClockWatch() if watch is None else watch
    phases: Phases = {}
    with _collected():
        for index in range(-warmup, rounds):
            if prepare is not None:
                prepare()
            order = list(functions)[:: 1 if index % 2 == 0 else -1]
            with _no_garbage_collection():
                for name in order:
                    functions[name](watch)
                    found = watch.seconds()
                    if index >= 0:
                        _add(phases, name, found)
    _require_equal_lengths(phases, functions, rounds)
    return phases


def _add(phases: Phases, name: str, found: Mapping[str, float]) -> None:
    for phase, seconds in found.items():
        phases.setdefault(phase, {}).setdefault(name, []).append(seconds)


def _require_equal_lengths(phases: Phases, functions: Mapping[str, Timed], rounds: int) -> None:
    for phase, times in phases.items():
        odd = [name for name in functions if len(times.get(name, ())) != rounds]
        if odd:
            raise ValueError(f"functions: expected all to have a part {phase!r} in every round, not so: {odd}")


def total(phases: Phases) -> Times:
    """The sum of the parts in every round."""
    names = next(iter(phases.values()))
    return {name: [sum(parts) for parts in zip(*(times[name] for times in phases.values()))] for name in names}


@dataclass(frozen=True)
class Ratio:
    """Time of a candidate over the time of a baseline, from paired rounds of one run.

    Attributes:
        median, low, high: the median, smallest and largest ratio of the rounds.
        lower, upper, confidence: the interval that holds the median of such ratios with that confidence.
        candidate_seconds, baseline_seconds: median times.
        rounds: how many.
    """

    median: float
    low: float
    high: float
    lower: float
    upper: float
    confidence: float
    candidate_seconds: float
    baseline_seconds: float
    rounds: int


def ratio(times: Mapping[str, list[float]], candidate: str, baseline: str) -> Ratio:
    """The median of the paired ratios, with its interval and the smallest and largest."""
    paired = [a / b for a, b in zip(times[candidate], times[baseline], strict=True)]
    return Ratio(
        statistics.median(paired),
        min(paired),
        max(paired),
        *median_interval(paired),
        statistics.median(times[candidate]),
        statistics.median(times[baseline]),
        len(paired),
    )


def median_interval(values: list[float], confidence: float = 0.95) -> tuple[float, float, float]:
    """``(lower, upper, confidence)``: an interval for the median, free of any assumption on the distribution.

    It lies between two order statistics. For n values, the median of the distribution is below the (k+1)-th smallest or
    above the (k+1)-th largest with probability ``2 P(Binomial(n, 1/2) <= k)``. Returned is the narrowest interval with
    the asked confidence. With fewer than 6 values none has 95%: then it is the whole range, with its own confidence.
    """
    count, ordered = len(values), sorted(values)
    outside = lambda k: 2 * sum(math.comb(count, i) for i in range(k + 1)) / 2**count  # noqa: E731
    k = 0
    while 2 * (k + 1) < count and 1 - outside(k + 1) >= confidence:
        k += 1
    return ordered[k], ordered[count - 1 - k], max(0.0, 1 - outside(k))


@contextmanager
def _collected() -> Iterator[None]:
    """Collect garbage now; inside the ``with`` block the collector looks at new objects only.

    To look at every object takes a third of a second once the peers' packages are loaded.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


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


def _synchronize() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
