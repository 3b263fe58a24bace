"""``pytest bench/`` as users run it, on shapes that take no time: alive, whole, and not to be fooled."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench.conftest import settings_of
from bench.measurements.layer import ENTRIES, KIND_PAIRS
from bench.measurements.step_modes import WAYS
from bench.settings import EAGER

ROOT = Path(__file__).resolve().parent.parent.parent


def run_bench(*arguments, results=None, **environment):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rounds", "2", *arguments]
    command += [] if results is None else ["--results", str(results)]
    own = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}  # no worker of xdist
    environment = {**own, **environment}
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=environment)


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench") / "results"
    options = ("--shapes", "tiny", "--modes", "eager", "--benchmark-json", str(folder.parent / "b.json"))
    return run_bench("bench", *options, results=folder), folder


def test_everything_runs(whole_run):
    done, folder = whole_run
    assert done.returncode == 0, done.stdout[-3000:]
    content = json.loads((folder / "results.json").read_text())
    assert content["failures"] == 0 and not content["interrupted"]
    groups = [section["group"] for section in content["sections"]]
    layers, models = {"layer", "compiled layer", "roofline"}, {"model", "step modes", "inference", "latency", "search"}
    assert set(groups) == layers | models | {"merge"}
    assert not [section for section in content["sections"] if section["refused"]]
    missing = {name for section in content["sections"] for name in section["missing"]}
    assert missing == {name for name, way in WAYS.items() if way.mode != EAGER}


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
    ("part", "dtype", "chosen"),
    [
        (
            "forward",
            "float32",
            {"test_layer.py": "test_layer and whole", "test_inference.py": "not latency and not merged_model"},
        ),
        ("backward", "float32", {"test_layer.py": "test_layer and whole", "test_model.py": "whole"}),
        ("assemble", "float32", {"test_merge.py": "test_merge and not thousand"}),
        pytest.param("backward", "float32", {"test_layer.py": "test_compiled_layer"}, marks=pytest.mark.exhaustive),
        pytest.param("backward", "bfloat16", {"test_model.py": "whole"}, marks=pytest.mark.exhaustive),
        pytest.param(
            "forward",
            "bfloat16",
            {"test_inference.py": "not latency and not merged_model"},
            marks=pytest.mark.exhaustive,
        ),
    ],
)
def test_what_is_broken_fails_and_is_not_reported(tmp_path, part, dtype, chosen):
    files = [f"bench/{file}" for file in chosen]
    names = " or ".join(f"({file[:-3]} and {tests})" for file, tests in chosen.items())
    arguments = ("-p", "tests.bench.sabotage", *files, "--shapes", "tiny", "--dtype", dtype, "-k", names)
    done = run_bench(*arguments, results=tmp_path, SABOTAGE=part)
    assert done.returncode == 1, done.stdout[-3000:]
    content = json.loads((tmp_path / "results.json").read_text())
    assert len(content["sections"]) >= len(chosen)
    for section in content["sections"]:
        assert "ours" in section["refused"]
        timed = set(section["phases"]["whole"])
        assert not [name for name in timed if name.startswith("ours") and name != "ours, matmul"]
        assert {"PEFT LoRA", "copy of W0"} & timed
    assert done.stdout.count("was not timed") >= len(chosen) and "'ours" in done.stdout
    assert content["failures"] > 0
    assert "not to be quoted" in (tmp_path / "table.md").read_text()


BAD_OPTIONS = [
    ({"shapes": "vit_z"}, "--shapes: expected some of .*got \\['vit_z'\\]"),
    ({"modes": "eager,lazy"}, "--modes: expected some of .*got \\['eager', 'lazy'\\]"),
    ({"rounds": 0}, "--rounds: expected at least 1, got 0"),
    ({"clock": "cpu", "threads": 2}, "--clock: expected wall with more than one thread"),
    ({"device": "cuda"}, "--device: expected a GPU for cuda, found none"),
    ({"results": Path("README.md")}, "--results: expected a folder, got the file README.md"),
]


@pytest.mark.parametrize(("options", "message"), BAD_OPTIONS)
def test_bad_options_are_refused(options, message, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    chosen = {"shapes": "tiny", "dtype": "float32", "device": "cpu", "rounds": 2, "clock": "wall", "threads": 1}
    config = SimpleNamespace(getoption={"results": None, "modes": "eager", **chosen, **options}.get)
    with pytest.raises(pytest.UsageError, match=message):
        settings_of(config)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shapes", "vit_z"], BAD_OPTIONS[0][1]),
        pytest.param(["--rounds", "0"], BAD_OPTIONS[2][1], marks=pytest.mark.exhaustive),
        pytest.param(["--clock=cpu", "--threads=2"], BAD_OPTIONS[3][1], marks=pytest.mark.exhaustive),
        pytest.param(["--results", "README.md"], BAD_OPTIONS[5][1], marks=pytest.mark.exhaustive),
    ],
)
def test_bad_options_end_the_command_before_any_work(arguments, message):
    done = run_bench("bench", *arguments)
    assert done.returncode == 4
    assert re.search(message, done.stderr)
