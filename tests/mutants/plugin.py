"""A pytest plugin for the mutation check: records which test runs which kernels, and what noticed a mutant.

MUTANTS_RECORD: a file for the duration of every test and the kernels' functions that it ran.
MUTANTS_ORDER: a file with the tests to run, in order; MUTANTS_REPORT: a file for the first failure.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import Phase, settings

RECORD, ORDER, REPORT = (os.environ.get(f"MUTANTS_{name}") for name in ("RECORD", "ORDER", "REPORT"))
# Messages of the interpreter and tests/interpreter/shim.py about bf16 arithmetic, int32 overflow, a broken tl.assume,
# and an absent operand that is read.
DETECTORS = ("bf16 in ", "overflow detected", "Assume failed", "'NoneType' object")

_running: set[str] = set()
_recorded: dict[str, dict] = {}
_report: dict = {"passed": 0, "killer": None}


def pytest_configure(config: pytest.Config) -> None:
    # A failing case is enough: it need not be the smallest.
    settings.register_profile("mutants", phases=(Phase.explicit, Phase.generate), database=None)
    settings.load_profile("mutants")
    if RECORD:
        _watch()


def _watch() -> None:
    """Record which kernels' functions are run."""
    from triton.runtime.interpreter import InterpretedFunction

    rewrite = InterpretedFunction.rewrite

    def watched(self):
        package, _, module = self.fn.__module__.rpartition(".")
        if package in ("glora_kernels._triton", "glora_kernels._triton.kernels"):
            _running.add(f"{module}.py:{self.fn.__name__}")
        return rewrite(self)

    InterpretedFunction.rewrite = watched


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if ORDER:
        place = {name: index for index, name in enumerate(json.loads(Path(ORDER).read_text()))}
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid not in place])
        items[:] = sorted((item for item in items if item.nodeid in place), key=lambda item: place[item.nodeid])


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    _running.clear()
    result = yield
    shared = [
        name
        for name, found in item._fixtureinfo.name2fixturedefs.items()
        if found[-1].scope != "function" and found[-1].baseid  # ours, not pytest's own
    ]
    _recorded.setdefault(item.nodeid, {}).update(functions=sorted(_running), shared=shared)
    return result


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    found = _recorded.setdefault(report.nodeid, {})
    found["seconds"] = found.get("seconds", 0.0) + report.duration
    _report["passed"] += report.when == "call" and not report.failed


def pytest_exception_interact(node, call: pytest.CallInfo, report) -> None:
    if _report["killer"] is None and call.excinfo is not None:
        error = call.excinfo.value
        _report.update(killer=node.nodeid, kind=kind_of(error), message=f"{type(error).__name__}: {error}"[:400])


def kind_of(error: BaseException) -> str:
    """``wrong`` (results), ``detector`` (of the interpreter), or ``illegal`` (no compiler would accept it)."""
    chain = list(_chain(error))
    if not any(type(link).__name__ == "InterpreterError" for link in chain):
        return "wrong"
    return "detector" if any(sign in str(link) for link in chain for sign in DETECTORS) else "illegal"


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """The error, its causes, and the errors that it groups."""
    if error is not None:
        yield error
        yield from _chain(error.__cause__ or error.__context__)
        for grouped in getattr(error, "exceptions", ()):
            yield from _chain(grouped)


def pytest_sessionfinish() -> None:
    if RECORD:
        Path(RECORD).write_text(json.dumps(_recorded))
    if REPORT:
        import glora_kernels

        _report["package"] = glora_kernels.__file__
        Path(REPORT).write_text(json.dumps(_report))
