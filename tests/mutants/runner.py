"""Runs the interpreter suite on copies of the repository: once as it is, then once for each mutant.

A mutant is run against those tests that ran its broken function in the unbroken run: a function that a test never
calls cannot change its outcome. Tests that noticed earlier mutants of the same function come first, then quick ones;
the first failure ends the run.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.helpers import TEST_SEED
from tests.mutants.sites import ROOT, Mutant
from tests.tiers import TIER

NEEDED = ("glora_kernels", "tests", "pyproject.toml")
COMMON = ("tests/conftest.py", "tests/helpers.py", "tests/tiers.py", "pyproject.toml")
SUITE = Path("tests", "interpreter")
VERSIONS = ("torch", "triton", "numpy", "hypothesis")
STARTUP = 90.0  # seconds, on a loaded machine


class CheckError(Exception):
    """The check itself cannot continue."""


@dataclass(frozen=True)
class Outcome:
    """What became of a mutant.

    Attributes:
        status: ``killed``, ``survived``, or ``illegal`` (no compiler would accept it; it does not count).
        how: ``wrong`` result, ``detector``, ``crash`` or ``timeout``.
        killer: the test that failed.
        message: how it failed.
        tests: how many tests were to be run.
        seconds: how long it took.
    """

    status: str
    how: str = ""
    killer: str = ""
    message: str = ""
    tests: int = 0
    seconds: float = 0.0


class Suite:
    """A snapshot of the repository, so that later edits do not matter, and its tests.

    Attributes:
        tests: for each name the ``seconds`` and the kernels' ``functions`` that it runs, as :meth:`record` finds them.
    """

    def __init__(self, scratch: Path, root: Path = ROOT) -> None:
        self.scratch = scratch
        self.folder = scratch / "unbroken"
        _copy(root, self.folder)
        self.tests: dict[str, dict] = {}
        self._killers: dict[tuple[str, str], list[str]] = defaultdict(list)

    @property
    def files(self) -> list[str]:
        """The files with tests."""
        return sorted(path.relative_to(self.folder).as_posix() for path in (self.folder / SUITE).glob("test_*.py"))

    def fingerprint(self, test_files: Iterable[str]) -> str:
        """A hash of everything that a run of these test files depends on."""
        package = (path for path in (self.folder / "glora_kernels").rglob("*") if path.suffix in (".py", ".json"))
        support = (path for path in (self.folder / SUITE).rglob("*.py") if not path.name.startswith("test_"))
        common = (self.folder / name for name in COMMON)
        paths = {*package, *support, *common, *(self.folder / file for file in test_files)}
        versions = (importlib.metadata.version(name) for name in VERSIONS)
        found = hashlib.sha1(" ".join([TIER, str(TEST_SEED), *versions]).encode())
        for path in sorted(paths):
            found.update(path.relative_to(self.folder).as_posix().encode() + path.read_bytes())
        return found.hexdigest()[:16]

    def record(self, file: str) -> dict[str, dict]:
        """Run a file of tests on the unbroken code; every test must pass."""
        record = self.scratch / "record.json"
        done, _ = _pytest(self.folder, [file], {"MUTANTS_RECORD": str(record)}, limit=None)
        if done.returncode != 0:
            raise CheckError(f"the suite fails on the unbroken code:\n{(done.stdout + done.stderr)[-4000:]}")
        found = json.loads(record.read_text())
        _widen_shared(found)
        return found

    def covering(self, file: str, function: str) -> list[str]:
        """The tests that run a function: those with kills first, then quick ones; similar tests are spread out."""
        found = [name for name, test in self.tests.items() if f"{file}:{function}" in test["functions"]]
        proven = self._killers[file, function]
        place = {name: index for index, name in enumerate(proven)}

        def key(name: str) -> tuple:
            size = math.frexp(self.tests[name]["seconds"])[1]
            return place.get(name, len(proven)), size, hashlib.sha1(name.encode()).digest()

        return sorted(found, key=key)

    def run(self, mutant: Mutant, limit: float | None = None) -> Outcome:
        """Break the kernel in a copy of the snapshot and run the tests that concern it."""
        tests = self.covering(mutant.file, mutant.function)
        if not tests:
            return Outcome("survived", message="no test runs the function")
        with tempfile.TemporaryDirectory(dir=self.scratch) as folder:
            _copy(self.folder, Path(folder))
            broken = Path(folder) / mutant.path
            broken.write_text(mutant.applied(broken.read_text()))
            outcome = self._verdict(Path(folder), tests, limit or STARTUP + 4 * self.seconds(tests))
        if outcome.killer in self.tests:
            self.credit(mutant, outcome.killer)
        return outcome

    def credit(self, mutant: Mutant, killer: str) -> None:
        """Try this test first from now on."""
        proven = self._killers[mutant.file, mutant.function]
        if killer in proven:
            proven.remove(killer)
        proven.insert(0, killer)

    def seconds(self, tests: Iterable[str]) -> float:
        return sum(self.tests[name]["seconds"] for name in tests)

    def _verdict(self, folder: Path, tests: list[str], limit: float) -> Outcome:
        order, report = folder / "order.json", folder / "report.json"
        order.write_text(json.dumps(tests))
        files = sorted({name.partition("::")[0] for name in tests})
        variables = {"MUTANTS_ORDER": str(order), "MUTANTS_REPORT": str(report)}
        done, seconds = _pytest(folder, ["-x", *files], variables, limit)
        common = {"tests": len(tests), "seconds": round(seconds, 1)}
        if done is None:
            return Outcome("killed", "timeout", **common)
        if done.returncode < 0:
            return Outcome("killed", "crash", message=signal.Signals(-done.returncode).name, **common)
        found = json.loads(report.read_text())
        if not Path(found["package"]).is_relative_to(folder.resolve()):
            raise CheckError(f"the tests ran {found['package']}, not the copy in {folder}")
        if done.returncode == 0 and found["passed"] == len(tests):
            return Outcome("survived", **common)
        if found["killer"] is None:
            raise CheckError(
                f"pytest ended with {done.returncode}, and no test failed:\n{(done.stdout + done.stderr)[-2000:]}"
            )
        status = "illegal" if found["kind"] == "illegal" else "killed"
        return Outcome(status, found["kind"], found["killer"], found["message"], **common)


def _widen_shared(tests: dict[str, dict]) -> None:
    """Add functions to tests that share a set-up: such a test may depend on everything that its file runs."""
    everything = sorted({function for test in tests.values() for function in test["functions"]})
    for test in tests.values():
        if test.pop("shared"):
            test["functions"] = everything


def _copy(source: Path, target: Path) -> None:
    for name in NEEDED:
        if (source / name).is_dir():
            shutil.copytree(source / name, target / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            target.mkdir(exist_ok=True)
            shutil.copy2(source / name, target / name)


def _pytest(folder: Path, arguments: list[str], variables: dict[str, str], limit: float | None):
    """The finished process of pytest, or None if it took longer than ``limit``; and its seconds."""
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider"]
    command += ["-p", "tests.mutants.plugin", *arguments]
    fixed = {"TRITON_INTERPRET": "1", "PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    began = time.monotonic()
    process = subprocess.Popen(
        command,
        cwd=folder,
        env={**os.environ, **fixed, **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # so that it can be ended together with its children
    )
    try:
        output = process.communicate(timeout=limit)
    except BaseException as error:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        if isinstance(error, subprocess.TimeoutExpired):
            return None, time.monotonic() - began
        raise
    done = subprocess.CompletedProcess(command, process.returncode, *output)
    return done, time.monotonic() - began


class Journal:
    """Outcomes on disk, one per line, so that an interrupted run continues where it was.

    An outcome is valid as long as all that it depends on is the same: for a killed mutant the package and the file
    with the test that killed it; for any other mutant the package and all files of the suite.
    """

    def __init__(self, path: Path, suite: Suite) -> None:
        self.path, self.suite = path, suite
        self._lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        self._marks: dict[tuple[str, ...], str] = {}

    def tests(self, file: str) -> dict[str, dict] | None:
        """The record of a file's run on the unbroken code."""
        lines = (line for line in self._lines if line.get("file") == file)
        return next((line["tests"] for line in lines if line["mark"] == self._mark([file])), None)

    def keep_tests(self, file: str, tests: dict[str, dict]) -> None:
        self._append({"file": file, "mark": self._mark([file]), "tests": tests})

    def outcome(self, mutant: Mutant) -> Outcome | None:
        for line in self._lines:
            if line.get("id") == mutant.id and line["mark"] == self._mark(self._files(line["outcome"]["killer"])):
                return Outcome(**line["outcome"])
        return None

    def keep(self, mutant: Mutant, outcome: Outcome) -> None:
        mark = self._mark(self._files(outcome.killer))
        self._append({"id": mutant.id, "mark": mark, "outcome": asdict(outcome)})

    def _files(self, killer: str) -> list[str]:
        return [killer.partition("::")[0]] if killer else self.suite.files

    def _mark(self, files: list[str]) -> str:
        if tuple(files) not in self._marks:
            known = all((self.suite.folder / file).exists() for file in files)
            self._marks[tuple(files)] = self.suite.fingerprint(files) if known else "gone"
        return self._marks[tuple(files)]

    def _append(self, line: dict) -> None:
        self._lines.append(line)
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
