"""A plugin of pytest for the parts that test: every result is written at once, and no test can hide another.

- ``--tests-log FILE`` gets a line of JSON for each test that ends, and one with the number of tests that were selected.
- A test that takes longer than ``--test-seconds`` ends its process with the stacks of its threads; pytest-xdist starts
  another process for the tests that are left.
- So does a test after which the GPU reports an error: in that process every later test would fail too.
"""

from __future__ import annotations

import faulthandler
import json
import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from .child import count_builds
from .verdicts import SELECTED

STDERR = pytest.StashKey[int]()  # where pytest does not capture


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("gpu", "tests on a GPU that is lent")
    group.addoption("--tests-log", type=Path, help="where results are written as they come")
    group.addoption("--test-seconds", type=float, help="the longest that a test may take (default: no limit)")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[STDERR] = os.dup(2)
    if hasattr(config, "workerinput"):  # the process that pytest was started in counts already
        config.add_cleanup(count_builds())
    log = config.getoption("tests_log")
    if log is not None and not hasattr(config, "workerinput"):
        config.pluginmanager.register(_Log(log), "tests-log")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Spread long tests, which stand together, over several processes; in each of them the order is the same."""
    if hasattr(config, "workerinput"):
        random.Random(0).shuffle(items)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    seconds = item.config.getoption("test_seconds")
    if seconds is not None:
        faulthandler.dump_traceback_later(seconds, exit=True, file=item.config.stash[STDERR])
    yield
    if seconds is not None:
        faulthandler.cancel_dump_traceback_later()


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item) -> None:
    """End a process whose GPU context is lost, within the test that has lost it."""
    if not torch.cuda.is_initialized():
        return
    try:
        torch.cuda.synchronize()
    except Exception as error:
        os.write(item.config.stash[STDERR], f"{item.nodeid}: {error}\n".encode())
        signal.raise_signal(signal.SIGKILL)


class _Log:
    """Writes the results of all processes, in the one that gathers them."""

    def __init__(self, file: Path):
        self._file, self._seen = file, False
        self._passed = False

    def _write(self, **what: Any) -> None:
        with self._file.open("a") as file:
            file.write(json.dumps(what) + "\n")

    def pytest_xdist_node_collection_finished(self, ids: list[str]) -> None:
        if not self._seen:
            self._seen = True
            self._write(**{SELECTED: len(ids)})

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        if session.items:
            self.pytest_xdist_node_collection_finished([item.nodeid for item in session.items])

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.passed:
            return
        self._passed |= report.passed
        told = {} if report.passed else {"why": _short(report.longreprtext or str(report.longrepr))}
        self._write(test=report.nodeid, outcome=report.outcome, seconds=round(report.duration, 3), **told)

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """A part none of whose tests passed has shown nothing."""
        if session.exitstatus == pytest.ExitCode.OK and not self._passed:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED


def _short(text: str) -> str:
    return text if len(text) < 2000 else f"{text[:600]}\n...\n{text[-1400:]}"
