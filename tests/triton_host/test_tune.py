"""The tuner: how it descends, what it leaves out, what it writes, and that its compile command serves its run."""

import itertools
import json
import math
import re
import time
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
import triton

from glora_kernels import tune
from glora_kernels._aot import work
from glora_kernels._aot.compiling import AbsentGPU, compiled
from glora_kernels._aot.targets import gpu_named, target_named
from glora_kernels._triton.device import pretended
from glora_kernels._triton.launch import compile_for
from glora_kernels._triton.recording import launches_of
from glora_kernels.planning.settings import FILE, KERNELS, Tile, load, rules
from tests.triton_host.keys import key_of

NAME = "sm_90"
START = Tile(64, 64, 32, 4, 3)
SHAPES = [f"{outputs}x{inputs}" for outputs, inputs in tune.SHAPES]


def fields(tile):
    return tile.tokens, tile.rows, tile.columns, tile.warps, tile.stages, tile.swap


def last(tiles):
    return list(tiles)[-1]


def asked_once(cost):
    """The cost, and a list of the tiles that it was asked for, none of them twice."""
    asked = []

    def once(tile):
        assert tile not in asked
        asked.append(tile)
        return cost(tile)

    return once, asked


# -- the descent -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", KERNELS)
def test_neighbours_differ_in_one_thing(kernel):
    for rule in rules(NAME)[kernel]:
        first, *others = found = list(tune.candidates(kernel, rule.tile))
        assert first == rule.tile and len(set(found)) == len(found) <= 11
        for other in others:
            changed = [pair for pair in zip(fields(first), fields(other)) if pair[0] != pair[1]]
            assert len(changed) == 1
        assert all(block == 0 or 16 <= block <= 256 for tile in found for block in fields(tile)[:3])
        assert all((tile.tokens == 0) == (first.tokens == 0) for tile in found)
        assert {tile.warps for tile in found} == {4, 8} and {tile.stages for tile in found} <= {2, 3, 4}
        assert (len({tile.swap for tile in found}) == 2) == (kernel == "fused")


def test_it_finds_the_least_cost():
    best = Tile(256, 16, 128, 8, 4, True)

    def cost(tile):
        away = sum(abs(math.log2(a / b)) for a, b in zip(fields(tile)[:3], fields(best)[:3]))
        return 1 + away + (tile.warps != 8) + abs(tile.stages - 4) + (not tile.swap)

    once, asked = asked_once(cost)
    found = list(tune.better_tiles("fused", START, once))
    assert found[0] == START and found[-1] == best and best in asked
    assert all(cost(after) < cost(before) for before, after in itertools.pairwise(found))


@pytest.mark.parametrize(("gain", "moves"), [(0.01, False), (0.03, True)])
def test_a_small_gain_is_none(gain, moves):
    other = Tile(64, 64, 32, 8, 3)
    found = last(tune.better_tiles("fused", START, lambda tile: 1 - gain * (tile == other)))
    assert found == (other if moves else START)


def test_a_first_tile_that_fails_is_left():
    once, asked = asked_once(lambda tile: math.inf if tile == START else 1.0)
    assert last(tune.better_tiles("token_pass", START, once)) != START and asked[0] == START
    assert last(tune.better_tiles("token_pass", START, lambda tile: math.inf)) == START


def test_no_tile_is_tried_after_the_deadline(monkeypatch):
    now = itertools.count()
    monkeypatch.setattr(tune.time, "monotonic", lambda: next(now))
    once, asked = asked_once(lambda tile: 1.0)
    assert list(tune.better_tiles("fused", START, once, 3)) == [START] and len(asked) == 3
    assert list(tune.better_tiles("fused", START, once, 3)) == [] and len(asked) == 3


# -- the run -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def on_gpu(monkeypatch):
    """A GPU whose launches take as long as a function says; each takes a second of the clock."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(tune, "architecture", lambda _: NAME)
    monkeypatch.setattr(tune, "launches_of", lambda case, _: launches_of(case, "meta"))
    monkeypatch.setattr(tune, "time", SimpleNamespace(monotonic=lambda: clock.now))

    def taking(milliseconds):
        def measure(one):
            clock.now += 1
            return milliseconds(one)

        monkeypatch.setattr(tune, "time_launch", measure)

    with pretended(NAME):
        yield taking


def run(path, *arguments):
    """The status of the command, the rules that it wrote, and the lines of its log."""
    out, log = path / "settings.json", path / "log.jsonl"
    status = tune.main([*arguments, "--out", str(out), "--log", str(log)])
    return status, load.__wrapped__(out)[NAME], [json.loads(line) for line in log.read_text().splitlines()]


def architectures(text):
    """The text of each architecture in a file of settings."""
    return dict(re.findall(r'^    ("\w+"): (.*?)(?=,?\n(?:    "|  \}))', text, re.MULTILINE | re.DOTALL))


def test_what_is_written(on_gpu, tmp_path, capsys):
    """One line per candidate, with its times; the best tile in its rule, and every other architecture as it was."""
    on_gpu(lambda one: 0.5 if one.tile.warps == 4 else 1.0)
    status, found, log = run(tmp_path, "--kernels", "contract")
    before = rules(NAME)["contract"]
    assert status == 0 and [rule.tile.warps for rule in before] == [8, 8, 8]
    assert [rule.tile.warps for rule in found["contract"]] == [4, 4, 4]
    assert all(found[kernel] == rules(NAME)[kernel] for kernel in KERNELS if kernel != "contract")
    for line in log:
        taken = 0.5 if line["tile"]["warps"] == 4 else 1.0
        assert line["milliseconds"] == {shape: [taken] for shape in SHAPES}
    first = {"elements": [2], "max_rank": 16}, {"block": [0, before[0].tile.rows, before[0].tile.columns]}
    assert (log[0]["rule"], log[0]["tile"]) == (first[0], {**first[1], "warps": 8, "stages": before[0].tile.stages})
    old, new = architectures(FILE.read_text()), architectures((tmp_path / "settings.json").read_text())
    assert len(old) > 4 and list(old) == list(new)
    assert [name for name in old if old[name] != new[name]] == [f'"{NAME}"']
    assert list(tmp_path.glob("settings.json.*")) == []
    assert f"now {found['contract'][0].tile}, 50% less time" in capsys.readouterr().out


def test_both_passes_of_a_fused_layer_count(on_gpu, tmp_path):
    on_gpu(lambda one: 1.0)
    _, _, log = run(tmp_path, "--kernels", "fused")
    assert all(list(map(len, line["milliseconds"].values())) == [2, 2, 2] for line in log)


def test_a_candidate_that_fails_is_left_out_and_recorded(on_gpu, tmp_path, capsys):
    """On one of its problems, with an error of any type."""
    count = itertools.count()

    def fails(one):
        if one.tile.warps == 4 and one.arguments["N"] == 4096:
            raise [ZeroDivisionError, AssertionError, MemoryError][next(count) % 3]("too\nmuch")
        return 0.5 if one.tile.warps == 4 else 1.0

    on_gpu(fails)
    _, found, log = run(tmp_path, "--kernels", "contract")
    assert found == rules(NAME)
    reasons = [line["reason"] for line in log if line["tile"]["warps"] == 4]
    assert reasons == ["ZeroDivisionError: too much", "AssertionError: too much", "MemoryError: too much"]
    assert all("milliseconds" in line for line in log if line["tile"]["warps"] == 8)
    assert capsys.readouterr().out.count(" tiles, 1 left out\n") == 3


def test_problems_without_a_launch_leave_a_tile_out(on_gpu, tmp_path, monkeypatch):
    on_gpu(lambda one: 1.0)
    monkeypatch.setattr(tune, "launches_of", lambda case, _: ([], []))
    _, found, log = run(tmp_path, "--kernels", "contract")
    assert found == rules(NAME) and log
    assert all(line["reason"].startswith("LookupError: expected a launch of contract") for line in log)


def test_a_tile_that_cannot_be_planned_is_left_out(on_gpu, tmp_path, monkeypatch):
    on_gpu(lambda one: 1.0)
    monkeypatch.setattr(tune, "launches_of", lambda case, _: 1 / 0)
    _, found, log = run(tmp_path, "--kernels", "contract")
    assert found == rules(NAME) and {line["reason"] for line in log} == {"ZeroDivisionError: division by zero"}


def test_each_rule_has_a_share_of_the_time(on_gpu, tmp_path, capsys):
    """A candidate takes 3 s. The shares of three rules in 18 s: 6, 6 and 6 s; a rule of 4 s begins two candidates."""

    def tried(*limits):
        on_gpu(lambda one: 1.0)
        _, _, log = run(tmp_path, "--kernels", "contract", *limits)
        counts = [sum(line["rule"] == rule for line in log) for rule in ({"elements": [2], "max_rank": 16},)]
        counts += [sum(line["rule"] == {"elements": [size]} for line in log) for size in (2, 4)]
        return counts

    assert tried("--seconds", "18") == [2, 2, 2]
    assert tried("--seconds-per-rule", "4") == [2, 2, 2]
    assert tried("--seconds", "2") == [1, 0, 0]
    assert capsys.readouterr().out.count(": not reached, keeps its tile\n") == 2
    whole = tried()
    assert min(whole) > 4 and tried("--seconds", "1000") == whole


def test_an_interrupt_writes_what_is_known(on_gpu, tmp_path, capsys):
    """Of the rule that it falls into, too."""
    done = itertools.count()

    def interrupted(one):
        if next(done) == 3 * (12 + 7):  # 12 tiles are tried for the first rule
            raise KeyboardInterrupt
        return 0.5 if one.tile.warps == 4 else 1.0

    on_gpu(interrupted)
    status, found, log = run(tmp_path, "--kernels", "contract")
    changed = [before != after for before, after in zip(rules(NAME)["contract"], found["contract"])]
    assert (status, len(log), changed) == (130, 12 + 7, [True, True, False])
    assert capsys.readouterr().out.count(": not reached, keeps its tile\n") == 1


def test_the_file_is_written_after_each_rule(on_gpu, tmp_path):
    seen = []

    def looks(one):
        out = tmp_path / "settings.json"
        seen.append([rule.tile.warps for rule in load.__wrapped__(out)[NAME]["contract"]] if out.exists() else None)
        return 0.5 if one.tile.warps == 4 else 1.0

    on_gpu(looks)
    run(tmp_path, "--kernels", "contract")
    assert [warps for warps, _ in itertools.groupby(seen)] == [None, [4, 8, 8], [4, 4, 8]]


@pytest.mark.parametrize("architecture", [NAME, "sm_80"])
def test_what_failed_elsewhere_is_not_tried(on_gpu, tmp_path, architecture):
    """If it was compiled for this architecture; a log of this command's own serves as well."""
    rule = rules(NAME)["contract"][0]
    four = next(tile for tile in tune.candidates("contract", rule.tile) if tile.warps == 4)
    with (tmp_path / "candidates.jsonl").open("w") as file:
        log = tune.Log(file)
        log.write(architecture, "contract", rule, four, reason="spill: expected none, got 8 bytes of stack")
        log.write(architecture, "contract", rules(NAME)["contract"][1], four, builds=1)
    tried = []
    on_gpu(lambda one: tried.append(one.tile) or (0.5 if one.tile.warps == 4 else 1.0))
    _, found, log = run(tmp_path, "--kernels", "contract", "--candidates", str(tmp_path / "candidates.jsonl"))
    here = architecture == NAME
    assert [rule.tile.warps for rule in found["contract"]] == [8 if here else 4, 4, 4]
    assert any("spill" in line.get("reason", "") for line in log) is here


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "expected a GPU to measure on, or --compile, found none"),
        (["--compile", "cuda:70"], "targets: expected some of cuda:80"),
        (["--compile", "cuda:90", "--jobs", "0"], "jobs: expected at least 1, got 0"),
    ],
)
def test_bad_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        tune.main(arguments)
    assert stop.value.code == 2 and message in capsys.readouterr().err


# -- compiling elsewhere -----------------------------------------------------------------------------------------------


def test_what_the_compile_command_logs(monkeypatch, tmp_path, capsys):
    """A candidate is left out if one of its builds cannot be compiled or would fail the gate."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    good = SimpleNamespace(stack=0, spills={}, shared=0, tensor_memory=0, matrix={"HGMMA": 1}, traps=0)
    good.serialised, good.chained = None, []
    spilling = SimpleNamespace(**{**vars(good), "stack": 8, "spills": {"STL": 2}})
    results = itertools.chain([good, good, spilling, good, good, "PassManager::run failed"], itertools.repeat(good))
    todo = []
    monkeypatch.setattr(tune, "measured", lambda jobs, *_: todo.extend(jobs) or (next(results) for _ in jobs))
    log = tmp_path / "candidates.jsonl"
    assert tune.main(["--compile", "cuda:90", "--kernels", "fused", "--log", str(log)]) == 0
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    first = rules(NAME)["fused"][0]
    assert [len(tune.builds_with("fused", first, tile, NAME)) for tile in tune.candidates("fused", first.tile)][:3] == [
        2
    ] * 3
    assert lines[0]["builds"] == 2
    assert lines[1]["reason"] == "spill: expected none, got 8 bytes of stack, 2 STL"
    assert lines[2]["reason"] == "PassManager::run failed"
    assert len(tune.reasons(log, NAME)) == 2 and tune.reasons(log, "sm_80") == {}
    told = f"{len(lines)} candidates for cuda:90, 2 left out: {len(todo)} builds in "
    assert len(todo) > len(lines) > 20 and told in capsys.readouterr().out


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_run_looks_for_what_was_compiled(kernel, monkeypatch):
    """By the keys of Triton's cache, for the first and the last candidate of the first and the last rule."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    gpu, launched = gpu_named("cuda:90"), []

    def measure(one):
        launched.append(key_of(compile_for, one.kernel, tuple(one.arguments.values()), one.tile))
        return 1.0

    monkeypatch.setattr(tune, "launches_of", lambda case, _: launches_of(case, "meta"))
    with patch.object(triton.runtime.driver, "_active", AbsentGPU(gpu)), pretended(NAME):
        for rule, place in itertools.product((rules(NAME)[kernel][0], rules(NAME)[kernel][-1]), (0, -1)):
            tile = list(tune.candidates(kernel, rule.tile))[place]
            launched.clear()
            times = tune.times_of(kernel, rule, tile, NAME, measure)
            assert list(times) == SHAPES and all(times.values()), times
            ahead = [key_of(compiled, build, gpu) for build in tune.builds_with(kernel, rule, tile, NAME)]
            assert len(set(ahead)) == len(ahead) and set(ahead) == set(launched)


def test_a_build_that_hangs_is_ended():
    began = time.monotonic()
    assert list(work._done(time.sleep, [600], 1, 0.2)) == ["the compiler took more than 0.2 s"]
    assert time.monotonic() - began < 300


def test_the_target_is_what_settings_are_found_for():
    """Also where an architecture has those of an older one."""
    assert tune.builds_with("contract", rules("sm_86")["contract"][0], rules("sm_86")["contract"][0].tile, "sm_86")
    assert target_named("cuda:86").shared_limit == 101_376
