"""Modes of a training step: all are timed, over an emulation of CUDA graphs; one that is wrong or raises is not."""

import importlib
import re
from dataclasses import replace
from functools import partial

import pytest
import timm

from bench.measurements import step_modes
from bench.measurements.step_modes import COMPARISONS, ENTRIES, ONE_GRAPH, PIECES, WAYS, WITH_COMPILE, measure
from bench.settings import COMPILED, EAGER, GRAPHS, MODES, Settings
from bench.shapes import NOT_IN_ALL, SHAPE_SETS, Model
from tests.graph_emulation import EmulatedGraphs

LORA_GRAPH, OURS_GRAPH, OURS_PIECES = "PEFT LoRA" + ONE_GRAPH, "ours" + ONE_GRAPH, "ours" + PIECES
CAPTURED = {name for name, way in WAYS.items() if way.mode == GRAPHS}


@pytest.fixture(autouse=True)
def one_block(monkeypatch):
    monkeypatch.setattr(timm, "create_model", partial(timm.create_model, depth=1))


@pytest.fixture
def graphs(monkeypatch):
    found = EmulatedGraphs()
    for module in ("bench.measurements.step_modes", "glora.graphs.graphed_step"):
        monkeypatch.setattr(f"{module}.graphs_for", lambda device: found)
    adam = importlib.import_module("torch.optim.adam")  # with capturable=True it refuses a CPU
    monkeypatch.setattr(adam, "_get_capturable_supported_devices", lambda *_, **__: ["cpu"])
    return found


def measured(*modes):
    return measure("tiny", Model("test_vit", (2, 2), 4, rank=2), Settings(rounds=2, modes=modes), "aot_eager")


def test_every_mode_is_timed(graphs):
    section = measured(*MODES)
    assert not section.refused and not section.missing
    assert tuple(section.phases["whole"]) == ENTRIES
    assert [(row["candidate"], row["baseline"]) for row in section.ratios()] == list(COMPARISONS)
    assert graphs.captures == 4 + 2 * 2 * 4  # whole steps; forward and backward of two variants of four layers
    assert {name for name, found in section.facts.items() if found.get("peak_bytes", 0) > 0} == set(ENTRIES) - CAPTURED


def test_each_of_ours_is_compared_with_the_best_of_a_peer():
    assert {
        ("ours", "PEFT LoRA"),
        ("ours" + WITH_COMPILE, "PEFT GLoRA" + WITH_COMPILE),
        (OURS_PIECES, LORA_GRAPH),
        (OURS_GRAPH, "PEFT GLoRA" + ONE_GRAPH),
        (OURS_PIECES, "frozen"),
    } <= set(COMPARISONS)
    assert len(COMPARISONS) == 12 and {name for pair in COMPARISONS for name in pair} < set(ENTRIES)


def test_modes_are_left_out_with_the_reason():
    section = measured(EAGER, GRAPHS)
    assert set(section.phases["whole"]) == {name for name, way in WAYS.items() if way.mode == EAGER}
    for name, way in WAYS.items():
        reason = {COMPILED: "left out by --modes eager,graphs", GRAPHS: "CUDA graphs need a GPU"}.get(way.mode)
        assert section.missing.get(name) == reason


def scaled_gradient(trained, backend, right):
    step = right(trained, backend)

    def wrong(paths):
        loss = step(paths)
        next(p for p in trained.model.parameters() if p.grad is not None).grad.mul_(1.01)
        return loss

    return wrong


def other_loss(trained, backend, right):
    step = right(trained, backend)
    return lambda paths: step(paths) * 1.01


def without_update(trained, backend, right):
    return step_modes.eager(trained._replace(optimizer=None), backend)


def on_the_first_paths(trained, backend, right):
    step, first = right(trained, backend), []

    def stuck(paths):
        first.append(paths)
        return step(first[0])

    return stuck


def no_such_kernel(trained, backend, right):
    raise RuntimeError("no such kernel")


@pytest.mark.parametrize(
    ("fault", "name", "message"),
    [
        (scaled_gradient, LORA_GRAPH, "expected the eager step to 0.0002.*'gradient of "),
        (scaled_gradient, OURS_PIECES, "'gradient of "),
        (other_loss, "frozen" + ONE_GRAPH, "'loss'"),
        (without_update, OURS_PIECES, "'update of "),
        (on_the_first_paths, OURS_GRAPH, "'gradient of "),
        (no_such_kernel, "PEFT GLoRA", "RuntimeError: no such kernel"),
    ],
    ids=lambda value: getattr(value, "__name__", value if value in WAYS else ""),
)
def test_a_wrong_mode_is_refused_and_the_others_are_timed(graphs, monkeypatch, fault, name, message):
    make = WAYS[name].make
    monkeypatch.setitem(WAYS, name, WAYS[name]._replace(make=lambda *given: fault(*given, make)))
    section = measured(EAGER, GRAPHS)
    assert set(section.refused) == {name}
    assert re.search(message, section.refused[name])
    assert set(section.phases["whole"]) == {other for other, way in WAYS.items() if way.mode != COMPILED} - {name}


def test_a_replay_that_computes_nothing_is_refused(graphs, monkeypatch):
    """But for the frozen model: the emulation computes its loss, all that it has, while it records."""
    capture = graphs.capture
    monkeypatch.setattr(graphs, "capture", lambda function: (lambda: None, capture(function)[1]))
    assert set(measured(GRAPHS).refused) == CAPTURED - {"frozen" + ONE_GRAPH}


def test_what_cannot_be_captured_is_refused_and_the_others_are_timed(graphs, monkeypatch):
    monkeypatch.setattr(graphs, "capture", lambda function: 1 / 0)
    section = measured(EAGER, GRAPHS)
    assert section.refused == dict.fromkeys(CAPTURED, "ZeroDivisionError: division by zero")
    assert set(section.phases["whole"]) == {"frozen", "PEFT LoRA", "ours", "PEFT GLoRA"}


def test_a_batch_that_waits_for_launches_is_asked_for_by_name():
    small, usual = SHAPE_SETS["vit_b_small"], SHAPE_SETS["vit_b"]
    assert not small.layers and "vit_b_small" in NOT_IN_ALL
    assert small.model == replace(usual.model, batch=(1, 4))
