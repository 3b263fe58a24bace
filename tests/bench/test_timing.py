"""bench/timing.py on clocks that only move when told to."""

import gc
import math
import random

import pytest

from bench.timing import WHOLE, ClockWatch, EventWatch, interleave, median_interval, plain, ratio, total


class FakeClock:
    """Seconds that pass only when something sleeps."""

    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


class FakeEvent:
    """A CUDA event on a GPU whose time is a fake clock's; it must be waited for before it is read."""

    def __init__(self, clock: FakeClock):
        self.clock, self.finished = clock, False

    def record(self) -> None:
        self.at = self.clock()

    def synchronize(self) -> None:
        self.finished = True

    def elapsed_time(self, end: "FakeEvent") -> float:
        assert end.finished
        return 1e3 * (end.at - self.at)


def whole(functions, rounds, **options):
    """Times of plain functions."""
    return interleave({name: plain(function) for name, function in functions.items()}, rounds, **options)[WHOLE]


def test_every_round_runs_all_in_alternating_order():
    calls = []
    whole({name: lambda name=name: calls.append(name) for name in "abc"}, rounds=3, warmup=0)
    assert "".join(calls) == "abc" + "cba" + "abc"


def test_warmup_runs_everything_and_times_nothing():
    calls = []
    times = whole({name: lambda name=name: calls.append(name) for name in "ab"}, rounds=2, warmup=3)
    assert len(calls) == (3 + 2) * 2
    assert "".join(calls[-4:]) == "ab" + "ba"
    assert {name: len(seconds) for name, seconds in times.items()} == {"a": 2, "b": 2}


@pytest.mark.parametrize("kind", ["clock", "events"])
def test_parts_are_timed_and_what_lies_between_is_not(kind):
    clock = FakeClock()
    watch = ClockWatch(clock) if kind == "clock" else EventWatch(lambda: FakeEvent(clock))

    def step(watch):
        for seconds in (1.0, 2.0):
            clock.sleep(50.0)
            with watch("forward"):
                clock.sleep(seconds)
            with watch("backward"):
                clock.sleep(10 * seconds)

    found = interleave({"a": step, "b": step}, rounds=2, prepare=lambda: clock.sleep(100.0), watch=watch)
    assert found == {"forward": {"a": [3.0] * 2, "b": [3.0] * 2}, "backward": {"a": [30.0] * 2, "b": [30.0] * 2}}
    assert total(found) == {"a": [33.0] * 2, "b": [33.0] * 2}


def test_functions_that_differ_in_their_parts_are_refused():
    def other(watch):
        with watch("other"):
            pass

    with pytest.raises(ValueError, match="functions: expected all to have a part 'whole'"):
        interleave({"a": plain(int), "b": other}, rounds=1)


def test_prepare_runs_before_every_round():
    events = []
    functions = {"a": lambda: events.append("a"), "b": lambda: events.append("b")}
    whole(functions, rounds=2, warmup=1, prepare=lambda: events.append("|"))
    assert "".join(events) == "|ba" + "|ab" + "|ba"


def test_ratio_is_the_median_of_paired_ratios():
    found = ratio({"a": [1.0, 4.0, 9.0], "b": [1.0, 2.0, 3.0]}, "a", "b")
    assert (found.median, found.low, found.high) == (2.0, 1.0, 3.0)
    assert (found.candidate_seconds, found.baseline_seconds, found.rounds) == (4.0, 2.0, 3)


def test_drift_of_the_machine_cancels():
    clock, slowness = FakeClock(), [1.0]

    def work(seconds: float) -> None:
        clock.sleep(seconds * slowness[0])

    def slow_down() -> None:
        slowness[0] *= 1.5

    functions = {"a": lambda: work(1.1), "b": lambda: work(1.0)}
    found = ratio(whole(functions, rounds=9, prepare=slow_down, watch=ClockWatch(clock)), "a", "b")
    assert found.low == pytest.approx(1.1) and found.high == pytest.approx(1.1)


# Order statistics and coverage of the sign test's interval for the median, from tables (Conover, Practical
# Nonparametric Statistics): n = 9 gives the 2nd and 8th with 0.961, n = 20 the 6th and 15th with 0.959.
@pytest.mark.parametrize(
    ("count", "lower", "upper", "confidence"), [(9, 2, 8, 0.961), (20, 6, 15, 0.959), (6, 1, 6, 0.969)]
)
def test_interval_of_the_median(count, lower, upper, confidence):
    values = [float(value) for value in range(count, 0, -1)]
    found = median_interval(values)
    assert found[:2] == (lower, upper)
    assert found[2] == pytest.approx(confidence, abs=5e-4)


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_few_values_give_their_range_and_say_how_little_that_means(count):
    lower, upper, confidence = median_interval([float(value) for value in range(count)])
    assert (lower, upper) == (0, count - 1)
    assert confidence == pytest.approx(1 - 2 * 0.5**count if count > 1 else 0.0)


def test_the_interval_covers_the_median_as_often_as_it_says():
    rng, covered, trials = random.Random(0), 0, 2000
    for _ in range(trials):
        lower, upper, confidence = median_interval([rng.expovariate(1.0) for _ in range(11)])
        covered += lower <= math.log(2) <= upper
    assert covered / trials == pytest.approx(confidence, abs=0.015)


def test_no_garbage_is_collected_while_timing():
    enabled = []
    whole({"a": lambda: enabled.append(gc.isenabled())}, rounds=1, warmup=0)
    assert enabled == [False]
    assert gc.isenabled()


def test_garbage_is_collected_again_after_an_error():
    with pytest.raises(ZeroDivisionError):
        whole({"a": lambda: 1 / 0}, rounds=1)
    assert gc.isenabled()


def test_unpaired_times_are_refused():
    with pytest.raises(ValueError, match="zip"):
        ratio({"a": [1.0, 2.0], "b": [1.0]}, "b", "a")


@pytest.mark.parametrize("rounds", [0, -1])
def test_no_rounds_are_refused(rounds):
    with pytest.raises(ValueError, match="rounds: expected at least 1"):
        whole({"a": int}, rounds=rounds)
