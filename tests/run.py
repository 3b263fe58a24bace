"""``python -m tests.run [short | exhaustive]``: all checks of a tier, one part after the other, and a summary.

``make test`` and ``make exhaustive`` run it. Each part uses all cores, and its output goes to the terminal at once.
The short tier ends with the first part that fails; the exhaustive one continues to the end. Ctrl-C ends every process
that was started.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import psutil

ROOT = Path(__file__).resolve().parents[1]
GRACE = 10.0  # seconds that processes have to end on their own
PASSED, INTERRUPTED = 0, 130
INTERRUPTS = (signal.SIGINT, signal.SIGTERM)
PR_SET_CHILD_SUBREAPER = 36  # <linux/prctl.h>: orphans become children of this process


class Part(NamedTuple):
    """Python modules that run one after the other, with arguments, and variables of their environment."""

    name: str
    commands: Sequence[Sequence[str]]
    environment: Mapping[str, str] = MappingProxyType({})


def traced(parts: Sequence[Part], folder: str, report: Path) -> list[Part]:
    """The parts, whose processes all record the lines that their tests run; and a report as JSON at the end."""
    environment = {"COVERAGE_FILE": f"{folder}/lines"}  # other settings are in pyproject.toml

    def started(command: Sequence[str]) -> Sequence[str]:
        return ["coverage", "run", "-m", *command] if command[0] == "pytest" else command

    return [
        *(Part(name, [*map(started, commands)], {**others, **environment}) for name, commands, others in parts),
        Part("report", [["coverage", "combine", "--quiet"], ["coverage", "json", "-o", str(report)]], environment),
    ]


class Outcome(NamedTuple):
    part: str
    seconds: float
    status: int  # of the command that ended the part


def parts_of(tier: str, workers: int) -> list[Part]:
    """The parts of a tier, for so many processes at a time."""
    pytest = f"pytest -n {workers if workers > 1 else 0} --durations 10 --dist".split()
    gate = ["glora_kernels.aot", "--jobs", str(workers)]
    tests = {"GLORA_TESTS": tier}
    # Triton decides when it is imported whether kernels are interpreted: a process of its own.
    interpreted = {**tests, "TRITON_INTERPRET": "1"}
    parts = [
        Part(
            "check",
            [
                ["ruff", "format", "--check", "."],
                ["ruff", "check", "."],
                ["mypy"],
                ["build", "--quiet", "--no-isolation", "--outdir", "build/dist"],  # the wheel from the sdist
                ["twine", "check", "--strict", "build/dist/*"],
            ],
            {"GLORA_BUILD_CPU": "0", "GLORA_BUILD_CUDA": "0"},
        ),
        # Whole files, since their set-up takes long; the slow ones come first by name.
        Part("tests", [[*pytest, "loadfile", "--no-loadscope-reorder", "--ignore", "tests/compiled"]], tests),
        Part("compiled", [[*pytest, "worksteal", "tests/compiled"]], tests),
        Part("interpreter", [[*pytest, "worksteal", "tests/interpreter"]], interpreted),
    ]
    if tier == "short":
        return [*parts, Part("gate", [[*gate, "--cover", "cuda:80", "cuda:100", "hip:gfx942"]])]
    return [
        *parts,
        Part("contract", [["tests.contract", "20000"]]),
        Part("gate", [gate]),
        # With the short tier, to see whether it is enough.
        Part(
            "mutants",
            [["tests.mutants", "--jobs", str(workers), "--json", "build/mutants.json"]],
            {"GLORA_TESTS": "short"},
        ),
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.run", description="Run all checks of a tier.")
    parser.add_argument("tier", nargs="?", choices=("short", "exhaustive"), default="short")
    parser.add_argument(
        "--workers", type=int, default=cores(), metavar="N", help="processes (default: one for each core)"
    )
    parser.add_argument("--only", nargs="+", metavar="PART", help="run these parts alone")
    parser.add_argument("--coverage", type=Path, metavar="FILE", help="write there, as JSON, which lines the tests ran")
    options = parser.parse_args(arguments)
    if options.workers < 1:
        parser.error(f"--workers: expected at least 1, got {options.workers}")
    parts = parts_of(options.tier, options.workers)
    names = [part.name for part in parts]
    if unknown := set(options.only or ()) - set(names):
        parser.error(f"--only: expected some of {', '.join(names)}, got {', '.join(sorted(unknown))}")
    parts = [part for part in parts if options.only is None or part.name in options.only]
    (ROOT / "build").mkdir(exist_ok=True)
    listen()
    if options.coverage is None:
        return run(parts, options.tier == "short")
    with tempfile.TemporaryDirectory(prefix="glora-coverage-") as folder:
        return run(traced(parts, folder, options.coverage.resolve()), stop_at_failure=False)


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def listen() -> None:
    """Treat SIGTERM as Ctrl-C (which a shell may have told this process to ignore), and adopt orphans: see ``end``."""

    def interrupt(*_) -> None:
        raise KeyboardInterrupt

    for number in INTERRUPTS:
        signal.signal(number, interrupt)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)


def run(parts: Sequence[Part], stop_at_failure: bool) -> int:
    """Run the parts, print a summary, and return the exit status."""
    began, done = time.monotonic(), []
    status = PASSED
    try:
        for number, part in enumerate(parts, 1):
            print(f"\n== part {number} of {len(parts)}: {part.name} ({_clock(time.monotonic() - began)})", flush=True)
            done.append(run_part(part))
            end()  # the processes that it has left behind
            status = status or done[-1].status
            if status and stop_at_failure:
                break
    except KeyboardInterrupt:
        for number in INTERRUPTS:
            signal.signal(number, signal.SIG_IGN)  # from here on, only ending is left to do
        end()
        print("\ninterrupted: every process that was started has ended", flush=True)
        status = INTERRUPTED
    print(f"\n{summary(parts, done, time.monotonic() - began)}", flush=True)
    return status


def run_part(part: Part) -> Outcome:
    """Run a part's commands, up to the first that fails."""
    began, status = time.monotonic(), PASSED
    for command in part.commands:
        options = {"cwd": ROOT, "env": {**os.environ, **part.environment}, "stdin": subprocess.DEVNULL}
        status = subprocess.Popen([sys.executable, "-m", *command], **options).wait()
        if status:
            break
    return Outcome(part.name, time.monotonic() - began, status)


def end() -> None:
    """Ask all started processes to end; after GRACE, kill those that are left, and the processes they have started."""
    own = psutil.Process()
    family = own.children(recursive=True)  # now: without adoption, orphans are not found later
    for child in own.children():
        with suppress(psutil.NoSuchProcess):
            child.send_signal(signal.SIGINT)
    _, left = psutil.wait_procs(family, timeout=GRACE)
    while left := {*left, *own.children(recursive=True)}:
        for process in left:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        _, left = psutil.wait_procs(left, timeout=GRACE)


def summary(parts: Sequence[Part], done: Sequence[Outcome], seconds: float) -> str:
    """One line for each part, and one for all."""
    found = {outcome.part: outcome for outcome in done}
    lines = []
    for part in parts:
        outcome = found.get(part.name)
        verdict = "not run" if outcome is None else f"failed ({outcome.status})" if outcome.status else "passed"
        lines.append(f"{part.name:12} {_clock(outcome.seconds if outcome else 0.0):>8}  {verdict}")
    return "\n".join([*lines, f"{'all':12} {_clock(seconds):>8}"])


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02}"


if __name__ == "__main__":
    sys.exit(main())
