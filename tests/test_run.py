"""The runner of both tiers: what it runs, where it stops, and that Ctrl-C leaves no process behind."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from tests import run
from tests.run import ROOT, Part


@pytest.fixture(autouse=True)
def own_children(monkeypatch):
    """Keep the processes that pytest itself has started: its workers, the forkserver of other tests."""
    monkeypatch.setattr(run, "end", lambda: None)


PASSES, FAILS = Part("passes", [["this"]]), Part("fails", [["this"], ["tests.run", "nonsense"], ["this"]])


def test_the_short_tier_stops_at_the_first_failure(capfd):
    assert run.run([PASSES, FAILS, PASSES._replace(name="after")], stop_at_failure=True) == 2
    lines = [line.split() for line in capfd.readouterr().out.splitlines()[-4:]]
    verdicts = [(line[0], " ".join(line[2:])) for line in lines[:3]]
    assert verdicts == [("passes", "passed"), ("fails", "failed (2)"), ("after", "not run")]


def test_the_exhaustive_tier_goes_on_to_its_end(capfd):
    assert run.run([FAILS, PASSES], stop_at_failure=False) == 2
    out = capfd.readouterr().out
    assert "part 1 of 2: fails" in out and "part 2 of 2: passes" in out
    assert out.count("The Zen of Python") == 2, "a part ends with its first command that fails"


def test_what_passes_is_zero(capfd):
    assert run.run([PASSES, PASSES], stop_at_failure=True) == 0


@pytest.mark.parametrize("tier", ["short", "exhaustive"])
def test_both_tiers_run_the_same_suite_with_a_setting(tier):
    parts = {part.name: part for part in run.parts_of(tier, 2)}
    assert {"check", "tests", "compiled", "interpreter", "gate"} <= set(parts)
    for name in ("tests", "compiled", "interpreter"):
        assert parts[name].environment["GLORA_TESTS"] == tier
        assert parts[name].commands[0][:3] == ["pytest", "-n", "2"]
    assert parts["interpreter"].environment["TRITON_INTERPRET"] == "1"


@pytest.mark.parametrize("tier", ["short", "exhaustive"])
def test_the_packages_that_are_checked_were_just_built(tier):
    check = run.parts_of(tier, 2)[0]
    build, twine = check.commands[-2:]
    assert build[0] == "build" and build[-2:] == ["--outdir", "build/dist"]
    assert twine == ["twine", "check", "--strict", "build/dist/*"]
    assert check.environment == {"GLORA_BUILD_CPU": "0", "GLORA_BUILD_CUDA": "0"}


def test_one_worker_is_no_worker_of_xdist():
    assert run.parts_of("short", 1)[1].commands[0][:3] == ["pytest", "-n", "0"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["long"], "invalid choice: 'long'"),
        (["--workers", "0"], "--workers: expected at least 1, got 0"),
        (["--only", "gates"], "--only: expected some of check, tests, compiled, interpreter, gate, got gates"),
    ],
)
def test_bad_arguments_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        run.main(arguments)
    assert stop.value.code == 2 and message in capsys.readouterr().err


FAMILY = """
import os, signal, subprocess, sys, time
from pathlib import Path

deaf = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); print(1, flush=True); time.sleep(600)"
options = {"stdout": subprocess.PIPE, "start_new_session": True}
children = [subprocess.Popen([sys.executable, "-c", deaf], **options) for _ in range(2)]
for child in children:
    child.stdout.readline()
Path(os.environ["PIDS"]).write_text(" ".join(str(pid) for pid in (os.getpid(), *(child.pid for child in children))))
time.sleep(600)
"""


@pytest.mark.parametrize("numbers", [(signal.SIGINT,), (signal.SIGTERM,), (signal.SIGINT, signal.SIGINT)], ids=str)
def test_an_interrupt_ends_every_process(tmp_path, numbers):
    """Also processes that ignore signals or have their own session, and after a second interrupt."""
    (tmp_path / "family.py").write_text(FAMILY)
    pids = tmp_path / "pids"
    code = (
        "from tests import run; run.GRACE = 1.0; run.listen(); "
        "raise SystemExit(run.run([run.Part('family', [['family']])] * 2, True))"
    )
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}", "PIDS": str(pids)}
    options = {"cwd": ROOT, "env": environment, "stdout": subprocess.PIPE, "text": True}
    runner, family = subprocess.Popen([sys.executable, "-c", code], **options), []
    try:
        until = time.monotonic() + 60
        while not (pids.exists() and pids.read_text()) and time.monotonic() < until:
            time.sleep(0.05)
        family = [psutil.Process(int(pid)) for pid in pids.read_text().split()]
        for number in numbers:
            runner.send_signal(number)
            time.sleep(0.3)
        out, _ = runner.communicate(timeout=60)
        assert runner.returncode == run.INTERRUPTED
        assert len(family) == 3 and not [process for process in family if process.is_running()]
        assert "interrupted" in out and out.count("not run") == 2
    finally:
        for process in family:
            if process.is_running():
                process.kill()


def test_what_a_part_leaves_behind_is_ended(tmp_path):
    (tmp_path / "leaves.py").write_text(FAMILY.replace("time.sleep(600)\n", ""))
    pids = tmp_path / "pids"
    code = "from tests import run; run.GRACE = 0.5; run.listen(); run.run([run.Part('leaves', [['leaves']])], True)"
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}", "PIDS": str(pids)}
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, check=True, capture_output=True)
    left = [int(pid) for pid in pids.read_text().split() if psutil.pid_exists(int(pid))]
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left
