"""Options of ``pytest bench/``, and how interleaved times become entries of pytest-benchmark.

pytest-benchmark times one function after the other. Here all functions that are compared run A B A B ... together, the
first time that a test asks for one of them (``measured``). Each test then passes its own seconds to pytest-benchmark
(``hand_in``), through a clock that replays them. So its tables, JSON and comparisons come from paired rounds.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any

import pytest
import torch

from . import report
from .environment import environment
from .section import Section
from .settings import CLOCKS, MODES, Settings
from .shapes import NOT_IN_ALL, SHAPE_SETS

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
COLUMNS = ["median", "min", "max", "rounds"]
SETTINGS = pytest.StashKey[Settings]()
SECTIONS = pytest.StashKey[dict[Hashable, Any]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("bench", "what to measure, and how")
    group.addoption("--shapes", default="small", help=f"shape sets, by commas: {', '.join(SHAPE_SETS)}, or all")
    group.addoption("--dtype", default="float32", choices=DTYPES, help="of weights and inputs")
    group.addoption("--device", default="cpu", choices=("cpu", "cuda"))
    group.addoption("--rounds", type=int, default=7, help="timed rounds of every interleaved run")
    group.addoption("--threads", type=int, default=1, help="of torch on a CPU; 1 spreads least")
    group.addoption("--clock", default="wall", choices=CLOCKS, help="on a CPU: time that passed, or that was given")
    group.addoption("--modes", default=",".join(MODES), help="of a whole training step, by commas; all by default")
    group.addoption("--preparing", type=float, help="begin to prepare no further step mode after so many seconds")
    group.addoption("--no-pictures", action="store_true", help="leave these out, which take a second each")
    group.addoption("--results", type=Path, help="folder for results.json, table.md and pictures")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[SETTINGS] = settings_of(config)
    config.stash[SECTIONS] = {}
    config.addinivalue_line("filterwarnings", "default")  # we cannot mend what peers warn of
    config.addinivalue_line("markers", "benchmark: an entry of pytest-benchmark")
    if config.stash[SETTINGS].device == "cpu":
        torch.set_num_threads(config.stash[SETTINGS].threads)
    if not any(str(argument).startswith("--benchmark-columns") for argument in config.invocation_params.args):
        config.option.benchmark_columns = COLUMNS  # read by pytest-benchmark's own hook, which comes last


def settings_of(config: pytest.Config) -> Settings:
    asked = config.getoption("shapes").split(",")
    shapes = tuple(name for name in SHAPE_SETS if name not in NOT_IN_ALL) if asked == ["all"] else tuple(asked)
    unknown = [name for name in shapes if name not in SHAPE_SETS]
    if unknown:
        raise pytest.UsageError(f"--shapes: expected some of {', '.join(SHAPE_SETS)}, or all; got {unknown}")
    modes = tuple(config.getoption("modes").split(","))
    if not set(modes) <= set(MODES):
        raise pytest.UsageError(f"--modes: expected some of {', '.join(MODES)}; got {list(modes)}")
    for option in ("rounds", "threads"):
        if config.getoption(option) < 1:
            raise pytest.UsageError(f"--{option}: expected at least 1, got {config.getoption(option)}")
    if config.getoption("clock") == "cpu" and config.getoption("threads") != 1:
        raise pytest.UsageError("--clock: expected wall with more than one thread (cpu adds theirs up), got cpu")
    device = config.getoption("device")
    if device == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--device: expected a GPU for cuda, found none")
    results = config.getoption("results")
    if results is not None and results.exists() and not results.is_dir():
        raise pytest.UsageError(f"--results: expected a folder, got the file {results}")
    dtype, rounds = DTYPES[config.getoption("dtype")], config.getoption("rounds")
    clock, threads, preparing = (config.getoption(name) for name in ("clock", "threads", "preparing"))
    return Settings(shapes, device, dtype, rounds, clock, threads, modes, preparing)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Parametrize tests by ``layer`` and ``model`` of every shape set that was asked for."""
    sets = metafunc.config.stash[SETTINGS].sets
    if "layer" in metafunc.fixturenames:
        layers = [pytest.param(name, one, id=f"{name} {one.name}") for name in sets for one in sets[name].layers]
        metafunc.parametrize(("shape_set", "layer"), layers, scope="session")
    if "model" in metafunc.fixturenames:
        models = [pytest.param(name, found.model, id=name) for name, found in sets.items() if found.model is not None]
        metafunc.parametrize(("shape_set", "model"), models, scope="session")


@pytest.fixture(scope="session")
def settings(request: pytest.FixtureRequest) -> Settings:
    return request.config.stash[SETTINGS]


@pytest.fixture(scope="session")
def measured(request: pytest.FixtureRequest) -> Callable:
    """``measured(function, *arguments)``: its result, measured once per session. A failure fails all that ask."""
    found = request.config.stash[SECTIONS]

    def once(function: Callable, *arguments: Any) -> Any:
        key = (function, *arguments)
        if key not in found:
            try:
                found[key] = function(*arguments)
            except Exception as error:
                found[key] = error.with_traceback(None)  # a traceback would keep models and tensors alive
            _save(request.session, interrupted=True)  # which it is unless it ends as it should
        if isinstance(found[key], Exception):
            raise found[key]
        return found[key]

    return once


class ReplayClock:
    """A clock on which each :meth:`advance` takes as many seconds as one round took."""

    __name__ = "interleaved rounds"

    def __init__(self, seconds: list[float]):
        self._now, self._seconds = 0.0, iter(seconds)

    def __call__(self) -> float:
        return self._now

    def advance(self) -> None:
        self._now += next(self._seconds, 0.0)


@pytest.fixture
def hand_in(request: pytest.FixtureRequest, settings: Settings) -> Callable[[Section, str, str], None]:
    """``hand_in(section, phase, entrant)``: makes an entry of pytest-benchmark; fails for a refused entrant."""

    def give(section: Section, phase: str, entrant: str) -> None:
        if entrant in section.missing:
            pytest.skip(section.missing[entrant])
        if entrant not in section.phases.get(phase, {}):
            refused = "; ".join(f"{name}: {reason}" for name, reason in section.refused.items())
            pytest.fail(f"{entrant!r} was not timed: {refused}", pytrace=False)
        if not request.config.pluginmanager.hasplugin("benchmark"):
            return
        seconds = section.phases[phase][entrant]
        clock = ReplayClock(seconds)
        request.node.add_marker(pytest.mark.benchmark(group=f"{section.title}: {phase}", timer=clock))
        benchmark = request.getfixturevalue("benchmark")
        benchmark.extra_info.update(_extra(section, entrant, seconds, settings, request.config))
        benchmark.pedantic(clock.advance, rounds=len(seconds))

    return give


def _extra(
    section: Section, entrant: str, seconds: list[float], settings: Settings, config: pytest.Config
) -> dict[str, Any]:
    """What an entry says apart from its times."""
    median = statistics.median(seconds)
    return {
        **{name: value for name, value in environment(settings.device).items() if name in ("device", "versions")},
        "entrant": entrant,
        "dtype": str(settings.dtype).removeprefix("torch."),
        "shape": section.title,
        "strategy": section.strategies.get(entrant),
        "error": section.errors.get(entrant),
        **{f"{unit}_per_second": count / median for unit, count in section.units.items()},
        **section.facts.get(entrant, {}),
    }


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    sections = _sections(config)
    if sections:
        terminalreporter.section("ratios of times: median [95% interval of the median]")
        terminalreporter.write_line(report.summary([section.to_dict() for section in sections]))


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    pictures = not session.config.getoption("no_pictures")
    _save(session, exitstatus == pytest.ExitCode.INTERRUPTED, pictures)


def _save(session: pytest.Session, interrupted: bool, pictures: bool = False) -> None:
    """Write what was measured up to now, if a folder for it was given."""
    folder, sections = session.config.getoption("results"), _sections(session.config)
    if folder is not None and sections:
        content = report.results(sections, session.config.stash[SETTINGS], session.testsfailed, interrupted)
        report.write(content, folder, pictures)


def _sections(config: pytest.Config) -> list[Section]:
    """All sections that were measured, in order."""
    return [found for found in config.stash.get(SECTIONS, {}).values() if isinstance(found, Section)]
