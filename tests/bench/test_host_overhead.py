"""bench/host_overhead.py, few rounds: who is timed, against what, and that nobody is who computes another thing."""

import json
import os
import subprocess
import sys

import pytest

from bench import host_overhead as bench
from bench.settings import Settings


def test_figures_of_known_times():
    found = bench._figures([5.0, 4.0, 9.0], [2.0, 3.0, 2.0])
    assert found == {"median": 5, "least": 4, "median_over": 3, "low_over": 1, "high_over": 7, "least_over": 2}


def test_what_differs_is_not_timed(monkeypatch):
    right = bench.glora_linear
    monkeypatch.setattr(bench, "glora_linear", lambda *arguments: 1.001 * right(*arguments))
    with pytest.raises(ValueError, match="glora_linear: not timed"):
        bench.measure(Settings(rounds=1))


def test_everyone_is_held_against_the_plain_function(tmp_path):
    run = [sys.executable, "-m", "bench.host_overhead", "--rounds", "1", "--out", str(tmp_path)]
    subprocess.run(run, check=True, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    content = json.loads((tmp_path / bench.JSON).read_text())
    assert [section["mode"] for section in content["sections"]] == [bench.TRAINING, bench.INFERENCE]
    ours = {bench.PLAIN, bench.BARE, bench.LAYER, bench.FUNCTION, bench.CHANGING, bench.REFERENCE, bench.TRITON}
    for section in content["sections"]:
        figures = section["figures"]
        assert ours <= figures.keys() and bench.EXTENSION in figures.keys() | section["missing"].keys()
        assert figures[bench.PLAIN]["median_over"] == 0
        assert not section["refused"]
    assert (tmp_path / bench.TABLE).read_text() == bench.table(content)
