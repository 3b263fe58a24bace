"""The two tiers of the suite, ``short`` and ``exhaustive``, and the rule by which the short one takes its cases.

``make test`` runs the short tier; ``make exhaustive``, or ``GLORA_TESTS=exhaustive pytest``, all tests. The rule, in
one place (docs/testing.md says why it is enough):

- For a test with three or more parameters, the short tier takes a cover: each pair of values of two parameters that
  occurs in any case occurs in a case of the cover.
- Numbers of repetitions are written ``at(short, exhaustive)``.
- Tests marked ``@pytest.mark.exhaustive`` are left out.

The cover depends on GLORA_TEST_SEED, like all generated cases. A test that is asked for by name
(``pytest file.py::test``) runs with all its cases in either tier.
"""

from __future__ import annotations

import itertools
import os
import random
from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence
from pathlib import Path
from typing import TypeVar

import pytest

from glora_kernels._aot.covering import cover
from tests.helpers import TEST_SEED

T = TypeVar("T")
TIERS = ("short", "exhaustive")
TIER = os.environ.get("GLORA_TESTS", "short")
if TIER not in TIERS:
    raise ValueError(f"GLORA_TESTS: expected one of {', '.join(TIERS)}, got {TIER!r}")
EXHAUSTIVE = TIER == "exhaustive"


def at(short: T, exhaustive: T) -> T:
    """The value for this tier."""
    return exhaustive if EXHAUSTIVE else short


def pairs(cases: Sequence[Sequence[Hashable]]) -> list[int]:
    """The places of a few cases that together have every pair of two entries that any case has."""
    if not cases or len(cases[0]) < 3:
        return list(range(len(cases)))
    order = list(range(len(cases)))
    random.Random(f"{TEST_SEED} {len(cases)}").shuffle(order)  # otherwise ties would all go to the first values
    shown = [frozenset(itertools.combinations(enumerate(cases[place]), 2)) for place in order]
    return sorted(order[place] for place in cover(shown))


# As a pytest plugin, loaded by conftest.py ----------------------------------------------------------------------------


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "exhaustive: not in the short tier")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if EXHAUSTIVE:
        return
    names = tuple(_name(argument) for argument in config.args if "::" in argument)
    kept = {id(item) for item in items if _name(item.nodeid).startswith(names)}
    kept |= {id(item) for item in _short(item for item in items if id(item) not in kept)}
    config.hook.pytest_deselected(items=[item for item in items if id(item) not in kept])
    items[:] = [item for item in items if id(item) in kept]


def _name(test: str) -> str:
    """``file.py::test[case]`` of an argument or a node, wherever the file is."""
    file, separator, rest = test.partition("::")
    return Path(file).name + separator + rest


def _short(items: Iterable[pytest.Item]) -> Iterable[pytest.Item]:
    """The items of the short tier."""
    functions: dict[tuple, list[pytest.Item]] = defaultdict(list)
    for item in items:
        if item.get_closest_marker("exhaustive") is None:
            functions[item.parent, getattr(item, "originalname", item.name)].append(item)
    for cases in functions.values():
        yield from (cases[place] for place in pairs([_values(case) for case in cases]))


def _values(item: pytest.Item) -> list[Hashable]:
    """An item's parameters, in one order for all cases; by type and repr, since True is not 1, and 0.0 is not -0.0."""
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    return [(type(parameters[name]), repr(parameters[name])) for name in sorted(parameters)]


def pytest_report_header() -> str:
    return f"{TIER} tier (GLORA_TESTS), generated cases from GLORA_TEST_SEED={TEST_SEED}"
