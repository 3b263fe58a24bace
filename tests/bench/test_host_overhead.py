"""bench/host_overhead.py, few rounds: who is timed, what is judged, and that nobody is who computes another thing."""

import json
import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch

from bench import host_overhead as bench
from bench.settings import Settings
from glora import GLoRALinear, PathConfig, SearchSpace

ROUTES = {f"{bench.TORCH}, {way}" for way in (bench.FIXED, bench.SEEN, bench.UNSEEN, bench.COUNTS)}


def test_what_differs_is_not_timed(monkeypatch):
    right = GLoRALinear.forward
    monkeypatch.setattr(GLoRALinear, "forward", lambda layer, x: 1.001 * right(layer, x))
    with pytest.raises(ValueError, match=r"ours: not timed: \w+: "):
        bench.measure(Settings(rounds=1))


def test_a_target_is_met_missed_or_not_measured():
    numbers = {bench.B_ALONE: 0.75, f"{bench.TORCH}, {bench.FIXED}": 1.51}
    calls = {bench.OVER_LORA: numbers, bench.CALLED: {}}
    paths = {"section": bench.PATHS, bench.MICROSECONDS: {bench.DRAW: 1.0}}
    sections = [{"section": mode, **calls} for mode in (bench.TRAINING, bench.INFERENCE)]
    verdicts = {target["name"]: target["verdict"] for target in bench.judged([*sections, paths])}
    assert len(verdicts) == len(bench.TARGETS) - 2  # one name has a ratio in each section, and a number of calls
    assert {name: verdict for name, verdict in verdicts.items() if verdict != "not measured"} == {
        bench.B_ALONE: "met",
        f"{bench.TORCH}, {bench.FIXED}": "MISSED",
        bench.DRAW: "met",
    }


def test_calls_of_python_and_c_are_counted():
    def step():
        len(sorted(()))

    assert bench.calls_of(lambda: None, nullcontext, True) == 1
    assert bench.calls_of(step, nullcontext, True) == 3


def test_every_path_comes_once():
    space = SearchSpace(ranks=(2, 3), A=("none", "lora"))
    shuffled = bench.shuffled(space, torch.Generator().manual_seed(0))
    assert len({PathConfig(*texts) for texts in shuffled}) == len(shuffled) == space.count()
    assert all(text in space.options[slot] for texts in shuffled for slot, text in zip("ABCDE", texts))


def test_a_run(tmp_path):
    run = [sys.executable, "-m", "bench.host_overhead", "--rounds", "1", "--out", str(tmp_path)]
    subprocess.run(run, check=True, capture_output=True, text=True)
    content = json.loads((tmp_path / bench.JSON).read_text())
    *of_calls, of_paths = content["sections"]
    assert [section["section"] for section in content["sections"]] == [bench.TRAINING, bench.INFERENCE, bench.PATHS]
    everyone = {*bench.PEERS, *ROUTES, bench.B_ALONE, bench.EXTENSION}
    everyone |= {bench.TRITON} if bench.fault() else {name.replace(bench.TORCH, bench.TRITON) for name in ROUTES}
    for section in of_calls:
        timed = section[bench.MICROSECONDS].keys()
        assert timed | section["missing"].keys() == everyone
        assert section[bench.OVER_LORA].keys() == section["interval"].keys() == section[bench.CALLED].keys() == timed
        assert section[bench.OVER_LORA][bench.LORA] == 1
        assert section["missing"].keys() <= {bench.EXTENSION, bench.TRITON, bench.HIRA}
    planned = {name for name in of_paths[bench.MICROSECONDS] if name.startswith(bench.PLANNING)}
    assert of_paths[bench.MICROSECONDS].keys() - planned == {bench.SET_SEEN, bench.SET_NEW, bench.DRAW}
    assert planned >= {f"{bench.PLANNING}, {bench.TORCH}"}
    assert [target["name"] for target in content["targets"]] == [target.name for target in bench.TARGETS]
    assert (tmp_path / bench.TABLE).read_text() == bench.table(content)
