"""bench/timing.py on a clock that only moves when told to."""

import gc

import pytest

from bench.timing import interleave, ratio


class FakeClock:
    """Seconds that pass only when something sleeps."""

    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def test_every_round_runs_all_in_alternating_order():
    calls = []
    interleave({name: lambda name=name: calls.append(name) for name in "abc"}, rounds=3, warmup=0)
    assert "".join(calls) == "abc" + "cba" + "abc"


def test_warmup_runs_everything_and_times_nothing():
    calls = []
    times = interleave({name: lambda name=name: calls.append(name) for name in "ab"}, rounds=2, warmup=3)
    assert len(calls) == (3 + 2) * 2
    assert "".join(calls[-4:]) == "ab" + "ba"
    assert {name: len(seconds) for name, seconds in times.items()} == {"a": 2, "b": 2}


def test_seconds_are_those_of_the_function_alone():
    clock = FakeClock()
    functions = {"slow": lambda: clock.sleep(3.0), "fast": lambda: clock.sleep(2.0)}
    times = interleave(functions, rounds=4, prepare=lambda: clock.sleep(100.0), clock=clock)
    assert times == {"slow": [3.0] * 4, "fast": [2.0] * 4}


def test_prepare_runs_before_every_round():
    events = []
    functions = {"a": lambda: events.append("a"), "b": lambda: events.append("b")}
    interleave(functions, rounds=2, warmup=1, prepare=lambda: events.append("|"))
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
    found = ratio(interleave(functions, rounds=9, prepare=slow_down, clock=clock), "a", "b")
    assert found.low == pytest.approx(1.1) and found.high == pytest.approx(1.1)


def test_no_garbage_is_collected_while_timing():
    enabled = []
    interleave({"a": lambda: enabled.append(gc.isenabled())}, rounds=1, warmup=0)
    assert enabled == [False]
    assert gc.isenabled()


def test_garbage_is_collected_again_after_an_error():
    with pytest.raises(ZeroDivisionError):
        interleave({"a": lambda: 1 / 0}, rounds=1)
    assert gc.isenabled()


def test_unpaired_times_are_refused():
    with pytest.raises(ValueError, match="zip"):
        ratio({"a": [1.0, 2.0], "b": [1.0]}, "b", "a")


@pytest.mark.parametrize("rounds", [0, -1])
def test_no_rounds_are_refused(rounds):
    with pytest.raises(ValueError, match="rounds: expected at least 1"):
        interleave({"a": int}, rounds=rounds)
