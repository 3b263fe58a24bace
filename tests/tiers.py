"""The two tiers of the suite, ``short`` and ``exhaustive``, and the rule by which the short one takes its cases.

``make test`` runs the short tier; ``make exhaustive``, or ``GLORA_TESTS=exhaustive pytest``, all there is. The rule, in
one place (docs/testing.md says why it is enough):

- Of a test with parameters the short tier takes a cover: each pair of values of two parameters that occurs in some
  case occurs in a case that is taken. ``@pytest.mark.cover(3)`` asks for triples, ``cover(1)`` for single values.
- Tests that loop over cases themselves write ``cover(cases)``; the parameters are the entries of each case.
- Numbers of repetitions are written ``at(short, exhaustive)``.
- Tests marked ``@pytest.mark.exhaustive`` are left out.

Which cover it is depends on GLORA_TEST_SEED, as all that is generated. A test that is asked for by name (``::`` or
``-k``) runs with all its cases in either tier.
"""

from __future__ import annotations

import itertools
import os
import random
from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence
from typing import TypeVar

import pytest

from glora_kernels._aot.covering import cover as covering
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


def cover(cases: Iterable[Sequence[Hashable]], strength: int = 2) -> list:
    """The cases of this tier: all, or a few with every combination of ``strength`` entries that occurs in them."""
    cases = list(cases)
    return cases if EXHAUSTIVE else [cases[place] for place in _places(cases, strength)]


def _places(cases: Sequence[Sequence[Hashable]], strength: int) -> list[int]:
    order = list(range(len(cases)))
    random.Random(f"{TEST_SEED} {len(cases)}").shuffle(order)  # or ties would all fall to the first values
    shown = [
        frozenset(itertools.combinations(enumerate(cases[place]), min(strength, len(cases[place])))) for place in order
    ]
    return sorted(order[place] for place in covering(shown))


# As a pytest plugin, loaded by conftest.py ----------------------------------------------------------------------------


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "cover(strength): combinations of how many parameters the short tier covers")
    config.addinivalue_line("markers", "exhaustive: not in the short tier")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    by_name = config.option.keyword or any("::" in argument for argument in config.args)
    if EXHAUSTIVE or by_name:
        return
    kept = {id(item) for item in _short(items)}
    config.hook.pytest_deselected(items=[item for item in items if id(item) not in kept])
    items[:] = [item for item in items if id(item) in kept]


def _short(items: Iterable[pytest.Item]) -> Iterable[pytest.Item]:
    """The items of the short tier."""
    functions: dict[tuple, list[pytest.Item]] = defaultdict(list)
    for item in items:
        if item.get_closest_marker("exhaustive") is None:
            functions[item.parent, getattr(item, "originalname", item.name)].append(item)
    for cases in functions.values():
        mark = cases[0].get_closest_marker("cover")
        strength = mark.args[0] if mark else 2
        yield from (cases[place] for place in _places([_values(case) for case in cases], strength))


def _values(item: pytest.Item) -> list[Hashable]:
    """Its parameters, in one order for all cases of a test; what has no hash is told apart by identity."""
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    return [_hashable(parameters[name]) for name in sorted(parameters)]


def _hashable(value: object) -> Hashable:
    try:
        hash(value)
    except TypeError:
        return id(value)
    return type(value), value  # True is not 1


def pytest_report_header() -> str:
    return f"{TIER} tier (GLORA_TESTS), generated cases from GLORA_TEST_SEED={TEST_SEED}"
