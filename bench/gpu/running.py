"""Runs parts: each in a process group of its own, with a limit. What is known of a part is written when it ends."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from .parts import GRACE, Part, Stage

PASSED, FAILED, TIME_UP, NOT_RUN = "passed", "failed", "time was up", "not run"
TOLD = "verdict: "  # a part's lines that begin so are shown at the end
LONGEST = 1 << 20  # characters of a part's output that are kept, its last ones
POLL = 0.05
ROOT = Path(__file__).resolve().parents[2]  # where parts run
BUILDS = "builds.jsonl"  # in a part's scratch folder


class Outcome(NamedTuple):
    """How a part ended.

    Attributes:
        status: PASSED, FAILED, TIME_UP or NOT_RUN.
        exit: the exit status of its process; negative for a signal; None if it did not start, or could not be ended.
        limit: seconds that it had.
        told: its verdicts.
        asked, compiled: how many builds of kernels its processes asked Triton for, and how many of them it compiled.
        builds: their names: see ``builds.py``.
    """

    part: str
    status: str
    seconds: float
    exit: int | None
    limit: float = 0.0
    told: tuple[str, ...] = ()
    asked: int = 0
    compiled: int = 0
    builds: tuple[str, ...] = ()


class Program:
    """Runs the stages of a call one after the other; nothing that a part does stops another part.

    Args:
        out: the folder of results; made if need be.
        scratch: a folder for the rest.
        first: the module that runs a part's module, whose name and arguments it gets.
        seconds: what is left of the call; no part runs longer.
        tell: gets a line for each part that ends.
    """

    def __init__(
        self,
        out: Path,
        scratch: Path,
        first: str,
        seconds: float,
        tell: Callable[[str], None] = print,
        environment: Mapping[str, str] = MappingProxyType({}),
    ):
        self._out, self._scratch, self._first, self._tell = out, scratch, first, tell
        self._environment, self._end = environment, time.monotonic() + seconds
        self.outcomes: list[Outcome] = []
        self._running: list[_Running] = []

    def run(self, stages: Sequence[Stage]) -> None:
        for stage in stages:
            self._running = [_Running(self, part) for part in stage]
            self._wait()

    def stop(self) -> None:
        """Interrupt what runs, and write down what is known of it."""
        for one in self._running:
            one.interrupt()
        self._wait()

    def _wait(self) -> None:
        while any(one.outcome is None for one in self._running):
            time.sleep(POLL)
            for one in self._running:
                one.look()

    def left(self) -> float:
        """Seconds, of which a part may still use some; interrupts need theirs."""
        return self._end - GRACE - time.monotonic()

    def started(self, part: Part, log: Any) -> subprocess.Popen | None:
        """The part's process, in a session of its own; None if there is no time left or no program to run it."""
        if self.left() <= 0:
            return None
        folder = self.folder(part)
        folder.mkdir(parents=True)
        filled = [text.format(out=self._out, scratch=folder) for text in part.arguments]
        command = [*part.under, sys.executable, "-m", self._first, part.module, *filled]
        log.write(f"$ {' '.join(command)}\n".encode())
        log.flush()
        own = {"GLORA_BUILD_LOG": str(folder / BUILDS), **part.environment}
        environment = {**os.environ, **self._environment, **own}
        try:
            return subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                cwd=ROOT,
                env=environment,
            )
        except OSError as error:
            log.write(f"{error}\n".encode())
            return None

    def folder(self, part: Part) -> Path:
        return self._scratch / part.name.replace(" ", "_")

    def ended(self, part: Part, outcome: Outcome, log: Path) -> None:
        """Write down everything about a part."""
        if part.kept is not None and (self.folder(part) / part.kept[0]).exists():
            shutil.copyfile(self.folder(part) / part.kept[0], self._out / part.kept[1])
        text = log.read_text(errors="replace")
        told = tuple(line.removeprefix(TOLD) for line in text.splitlines() if line.startswith(TOLD))
        outcome = outcome._replace(told=told, **_builds(self.folder(part)))
        self.outcomes.append(outcome)
        with (self._out / "parts.jsonl").open("a") as file:
            file.write(json.dumps(outcome._asdict()) + "\n")
        with (self._out / "logs.txt").open("a") as file:
            file.write(f"\n==== {outcome.part}: {outcome.status}, {outcome.seconds:.1f} s\n{text[-LONGEST:]}")
        self._tell(line_of(outcome))


class _Running:
    """A part that runs."""

    def __init__(self, program: Program, part: Part):
        self._program, self._part = program, part
        self._began = time.monotonic()
        self._limit = min(part.limit, program.left())
        self._log = program.folder(part).with_suffix(".log")
        self._log.parent.mkdir(parents=True, exist_ok=True)
        with self._log.open("wb") as log:
            self._process = program.started(part, log)
        self._interrupted: float | None = None
        self.outcome: Outcome | None = None
        if self._process is None:
            self._end(NOT_RUN, None)

    def look(self) -> None:
        """End the part if it has ended, or if its time is up."""
        if self.outcome is not None or self._process is None:
            return
        status, now = self._process.poll(), time.monotonic()
        if status is not None:
            _signal(self._process, signal.SIGKILL)  # what it has left behind
            self._end(TIME_UP if self._interrupted else FAILED if status else PASSED, status)
        elif self._interrupted is None and now - self._began > self._limit:
            self.interrupt()
        elif self._interrupted is not None and now - self._interrupted > 2 * GRACE:
            self._end(TIME_UP, None)  # it waits for the driver, and cannot be killed
        elif self._interrupted is not None and now - self._interrupted > GRACE:
            _signal(self._process, signal.SIGKILL)

    def interrupt(self) -> None:
        """Let the part say where it is, and end."""
        if self.outcome is None and self._process is not None:
            self._interrupted = time.monotonic()
            if not self._part.under:
                with suppress(ProcessLookupError):
                    self._process.send_signal(signal.SIGUSR1)
                time.sleep(POLL)
            _signal(self._process, signal.SIGINT)

    def _end(self, status: str, code: int | None) -> None:
        self.outcome = Outcome(self._part.name, status, time.monotonic() - self._began, code, self._limit)
        self._program.ended(self._part, self.outcome, self._log)


def _signal(process: subprocess.Popen, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def _builds(folder: Path) -> dict[str, Any]:
    file, found = folder / BUILDS, []
    for line in file.read_text().splitlines() if file.exists() else []:
        with suppress(ValueError):  # a process was killed while it wrote
            found.append(json.loads(line))
    names = sorted({name for one in found for name in one["names"]})
    return {key: sum(one[key] for one in found) for key in ("asked", "compiled")} | {"builds": tuple(names)}


def line_of(outcome: Outcome) -> str:
    status = outcome.status + (f" (exit {outcome.exit})" if outcome.exit else "")
    builds = f"; builds: {outcome.asked} asked for, {outcome.compiled} compiled" if outcome.asked else ""
    return f"{outcome.part:16} {outcome.seconds:6.1f} of {outcome.limit:3.0f} s  {status}{builds}"


def failed(outcomes: Sequence[Outcome]) -> bool:
    return any(outcome.status != PASSED for outcome in outcomes)
