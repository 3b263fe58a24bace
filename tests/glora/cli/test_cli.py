"""The command line: what it prints, writes and returns."""

import json
import os
import subprocess
import sys

import pytest

from glora.cli import main
from glora.cli.train import GRAPHS
from glora.training import graphing
from glora.version import __version__
from tests.glora.cli.test_interrupts import data, train_command, uncut

__all__ = ["data", "uncut"]  # the fixtures


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
    usage, _, error = printed.err.partition(f"glora {arguments[0]}: error: ")
    assert usage.startswith(f"usage: glora {arguments[0]} ")
    assert message in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "prog"),
    [
        (["quickstart", "--seeds", "many"], "glora quickstart"),
        (["doctor", "--nope"], "glora doctor"),
        (["search", "folder", "--nope"], "glora search"),
        (["fly"], "glora"),
        (["--nope"], "glora"),
    ],
)
def test_usage_errors(arguments, prog, capsys):
    """The usage is that of the command."""
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    printed = capsys.readouterr().err
    assert printed.startswith(f"usage: {prog} [-h]") and f"\n{prog}: error: " in printed


COMMANDS = ("quickstart", "train", "search", "refit", "merge", "report", "bench", "doctor")


@pytest.mark.parametrize("command", [None, *COMMANDS])
def test_help(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--help"] if command is None else [command, "--help"])
    assert stopped.value.code == 0
    assert f"usage: glora {command or ''}" in capsys.readouterr().out


def test_without_a_command_it_prints_the_help(capsys):
    assert main([]) == 0
    bare = capsys.readouterr()
    with pytest.raises(SystemExit):
        main(["--help"])
    assert bare == capsys.readouterr() and all(f"\n    {command} " in bare.out for command in ("train", "doctor"))


HELP = """
import sys
from contextlib import suppress
from glora.cli import main
with suppress(SystemExit):
    main(sys.argv[1:])
print(*sorted({name.partition(".")[0] for name in sys.modules} & {"torch", "numpy", "tqdm", "glora_kernels"}))
"""


@pytest.mark.parametrize("arguments", [[], ["--version"], *([command, "--help"] for command in COMMANDS)], ids=" ".join)
def test_help_loads_no_torch(arguments):
    done = subprocess.run([sys.executable, "-c", HELP, *arguments], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == ""


def test_help_is_fast():
    """Within half a second of a CPU, the best of three."""

    def seconds():
        arguments = [sys.executable, "-m", "glora", "--help"]
        silent = [(os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0)]
        _, status, usage = os.wait4(os.posix_spawn(sys.executable, arguments, os.environ, file_actions=silent), 0)
        assert status == 0
        return usage.ru_utime + usage.ru_stime

    assert min(seconds() for _ in range(3)) < 0.5


def test_graphs_are_those_of_the_training():
    assert GRAPHS == graphing.GRAPHS


def test_each_command_ends_with_the_next_one(data, uncut, tmp_path, capsys):
    """For people; the lines can be typed as they are."""

    def told(*arguments):
        assert main([str(argument) for argument in arguments]) == 0
        return capsys.readouterr().out

    study, preset = tmp_path / "a study", tmp_path / "preset"
    (study / uncut.name).parent.mkdir()
    (study / uncut.name).symlink_to(uncut, target_is_directory=True)
    out = told(*train_command(data, study))
    assert out.endswith(f"\n\nNext: glora search '{study}'\n")
    assert told(*train_command(data, preset, "--preset", "bitfit")).endswith(f"\n\nNext: glora merge {preset} --test\n")
    assert told("search", study).endswith(f"\n\nNext: glora refit '{study}'\n")
    refit = ["refit", study, "--set", "refit.steps=2"]
    assert told(*refit).endswith(f"\n\nNext: glora merge '{study}' --test\n")
    assert told("merge", study).endswith(f"\n\nNext: glora report '{study}'\n")
    for arguments in (train_command(data, study), ["search", study], refit, ["merge", study]):
        assert isinstance(json.loads(told(*arguments, "--json")), list)


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
