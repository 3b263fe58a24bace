"""bench/peft_accelerate.py, small: it counts what it says, and times nothing that is wrong."""

import pytest

import glora.peft.layers
from bench import peft_accelerate as bench
from bench.settings import Settings
from bench.timing import WHOLE

SETTINGS = Settings(rounds=2, clock="cpu")


@pytest.fixture(autouse=True)
def small(monkeypatch):
    for name, size in (("TOKENS", 16), ("WIDTH", 48), ("HIDDEN", 64)):
        monkeypatch.setattr(bench, name, size)


@pytest.mark.parametrize("make", [bench.layer, bench.block])
def test_what_is_counted(make):
    section = bench.measure(make, 1, SETTINGS)
    assert {name: len(seconds) for name, seconds in section.phases[WHOLE].items()} == {
        bench.BEFORE: 2,
        bench.AFTER: 2,
        bench.FLOOR: 2,
    }
    assert set(section.errors) == {bench.BEFORE, bench.AFTER}
    before, after, floor = (section.facts[who]["saved_bytes"] for who in (bench.BEFORE, bench.AFTER, bench.FLOOR))
    assert floor <= after < before
    assert bench.summary(section).count("\n") == 3


def test_what_is_wrong_is_not_timed(monkeypatch):
    right = glora.peft.layers.glora_linear
    monkeypatch.setattr(glora.peft.layers, "glora_linear", lambda *arguments: 1.001 * right(*arguments))
    with pytest.raises(ValueError, match=f"{bench.AFTER}: not timed"):
        bench.measure(bench.layer, 1, SETTINGS)
