"""``pytest bench/`` as users run it, on shapes that take no time: alive, whole, and not to be fooled."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench.measurements.layer import ENTRIES, KIND_PAIRS

ROOT = Path(__file__).resolve().parent.parent.parent


def run_bench(*arguments, results=None, **environment):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rounds", "2", *arguments]
    command += [] if results is None else ["--results", str(results)]
    environment = {**os.environ, **environment}
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=environment)


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench") / "results"
    done = run_bench("bench", "--shapes", "tiny", "--benchmark-json", str(folder.parent / "b.json"), results=folder)
    return done, folder


def test_everything_runs(whole_run):
    done, folder = whole_run
    assert done.returncode == 0, done.stdout[-3000:]
    content = json.loads((folder / "results.json").read_text())
    assert content["failures"] == 0 and not content["interrupted"]
    groups = [section["group"] for section in content["sections"]]
    assert set(groups) == {
        "layer",
        "compiled layer",
        "model",
        "inference",
        "latency",
        "merge",
        "search",
        "roofline",
    }
    assert not [section for section in content["sections"] if section["refused"] or section["missing"]]


def test_every_kind_is_timed_in_both_passes(whole_run):
    content = json.loads((whole_run[1] / "results.json").read_text())
    layer = next(section for section in content["sections"] if section["group"] == "layer")
    assert set(layer["phases"]) == {"forward", "backward", "whole"}
    assert set(layer["phases"]["whole"]) == set(ENTRIES)
    assert len(KIND_PAIRS) == 16 and set(KIND_PAIRS) <= set(layer["strategies"])


def test_pytest_benchmark_gets_the_interleaved_seconds(whole_run):
    """Entry by entry what is in our own results; with what it was measured on."""
    folder = whole_run[1]
    content = json.loads((folder / "results.json").read_text())
    layer = next(section for section in content["sections"] if section["group"] == "layer")
    entries = json.loads((folder.parent / "b.json").read_text())["benchmarks"]
    found = {e["extra_info"]["entrant"]: e for e in entries if e["group"] == f"{layer['title']}: whole"}
    for name, seconds in layer["phases"]["whole"].items():
        assert found[name]["stats"]["data"] == pytest.approx(seconds)
    info = found["ours, A vector, B low rank"]["extra_info"]
    assert {"device", "dtype", "shape", "versions", "strategy", "tokens_per_second"} <= set(info)
    assert info["strategy"].startswith("torch: ")


def test_pictures_and_table_are_written(whole_run):
    names = {file.name for file in whole_run[1].iterdir()}
    assert {
        "table.md",
        "roofline.png",
        "roofline.svg",
        "ratios-layer-tiny-fc1.png",
        "memory-model-tiny-step.svg",
    } <= names
    table = (whole_run[1] / "table.md").read_text()
    assert "within noise" in table and "| PEFT LoRA / frozen |" in table


def test_ratios_end_the_output(whole_run):
    assert "ours, random paths / official formula, random paths" in whole_run[0].stdout


@pytest.mark.parametrize(
    ("part", "dtype", "tests"),
    [
        ("forward", "float32", "test_layer.py and test_layer and whole"),
        ("backward", "float32", "test_layer.py and test_compiled_layer"),
        ("backward", "bfloat16", "test_model.py and whole"),
        ("forward", "bfloat16", "test_inference.py and test_inference and 1"),
        ("assemble", "float32", "test_merge.py and test_merge"),
    ],
)
def test_what_is_broken_fails_and_is_not_reported(tmp_path, part, dtype, tests):
    file, _, chosen = tests.partition(" and ")
    arguments = ("-p", "tests.bench.sabotage", f"bench/{file}", "--shapes", "tiny", "--dtype", dtype, "-k", chosen)
    done = run_bench(*arguments, results=tmp_path, SABOTAGE=part)
    assert done.returncode == 1, done.stdout[-3000:]
    content = json.loads((tmp_path / "results.json").read_text())
    section = content["sections"][0]
    assert "ours" in section["refused"]
    assert "'ours" in done.stdout and "was not timed" in done.stdout
    timed = set(section["phases"]["whole"])
    assert not [name for name in timed if name.startswith("ours") and name != "ours, matmul"]
    assert {"PEFT LoRA", "copy of W0"} & timed
    assert content["failures"] > 0
    assert "not to be quoted" in (tmp_path / "table.md").read_text()


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--shapes", "vit_z", "--shapes: expected some of .*got \\['vit_z'\\]"),
        ("--rounds", "0", "--rounds: expected at least 1, got 0"),
        ("--clock=cpu", "--threads=2", "--clock: expected wall with more than one thread"),
        ("--device", "cuda", "--device: expected a GPU for cuda, found none"),
        ("--results", "README.md", "--results: expected a folder, got the file README.md"),
    ],
)
def test_bad_options_are_refused_before_any_work(option, value, message):
    if value == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    done = run_bench("bench", option, value)
    assert done.returncode == 4
    assert re.search(message, done.stderr)
