"""The command line: what it prints, writes and returns."""

import json
import subprocess
import sys

import pytest

from glora.cli import main
from glora.version import __version__


def test_quickstart_report_and_json(tmp_path, capsys):
    out = tmp_path / "run"
    small = ["--seeds", "1", "--shots", "1", "--steps", "2", "--pretraining-steps", "2", "--out", str(out)]
    assert main(["quickstart", *small, "--json"]) == 0
    study = json.loads(capsys.readouterr().out)
    assert study == json.loads((out / "quickstart.json").read_text())
    assert main(["report", str(out / "quickstart.json")]) == 0
    assert "GLoRA, searched" in capsys.readouterr().out
    assert main(["report", str(out / "quickstart.json"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == study["summary"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["quickstart", "--tasks", "mirrored"], "tasks: expected distinct names"),
        (["quickstart", "--seeds", "0"], "seeds: expected at least 1"),
        (["report", "nowhere.json"], "nowhere.json"),
    ],
)
def test_bad_arguments(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert f"glora {arguments[0]}: error: " in printed.err
    assert message in printed.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arguments", [[], ["quickstart", "--seeds", "many"], ["fly"]])
def test_usage_errors(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert "usage: glora" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [["--help"], ["quickstart", "--help"], ["doctor", "--help"], ["report", "--help"]]
)
def test_help(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 0
    assert "usage: glora" in capsys.readouterr().out


def test_doctor(capsys):
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert "no problems found" in text
    assert "triton" in text
    assert main(["doctor", "--json"]) == 0
    findings = json.loads(capsys.readouterr().out)
    assert findings["backends"]["torch"] is None
    assert findings["problems"] == []


def test_doctor_names_what_is_missing(capsys, monkeypatch):
    monkeypatch.setattr("glora.doctor.REQUIRED", ("torch", "no-such-package"))
    assert main(["doctor"]) == 1
    assert "problems: no-such-package is not installed" in capsys.readouterr().out


def test_python_m_glora():
    done = subprocess.run([sys.executable, "-m", "glora", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"glora {__version__}\n"
