"""The short tier takes a cover of all pairs, the same in every process, and no test that is marked exhaustive."""

import importlib.util
import itertools
from types import SimpleNamespace

import pytest

from tests import tiers

LEVELS = [("lora_1", "lora_3", "vector", "constant", "none")] * 2 + [("lora_1", "lora_3", "vector", "none")]
LEVELS += [("vector", "constant", "none")] * 2
PATHS = list(itertools.product(*LEVELS))


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(tiers, "EXHAUSTIVE", False)


def combinations(cases, strength):
    return {pairs for case in cases for pairs in itertools.combinations(enumerate(case), strength)}


def pairs_of(cases):
    return {pair for case in cases for pair in itertools.combinations(enumerate(case), 2)}


def taken(cases):
    return [cases[place] for place in tiers.pairs(cases)]


def test_a_cover_has_every_pair_with_few_cases():
    """At least as many cases as the two longest parameters have pairs of values; for 900 paths."""
    found = taken(PATHS)
    assert pairs_of(found) == pairs_of(PATHS)
    assert len(PATHS) == 900 and len(found) <= 40
    assert found == [path for path in PATHS if path in set(found)], "in their order"


def test_of_cases_that_are_no_product_what_occurs_is_covered():
    cases = [("a", 1, "x"), ("a", 2, "x"), ("b", 1, "y"), ("b", 1, "x")]
    assert pairs_of(taken(cases)) == pairs_of(cases)


def test_one_parameter_and_two_lose_no_case():
    assert tiers.pairs([("a",), ("b",), ("a",)]) == [0, 1, 2]
    assert len(tiers.pairs([*itertools.product(range(3), range(4))])) == 12
    assert tiers.pairs([]) == [] and tiers.pairs([()]) == [0]


def test_a_cover_depends_on_the_seed_alone(monkeypatch):
    first, again = taken(PATHS), taken(PATHS)
    monkeypatch.setattr(tiers, "TEST_SEED", tiers.TEST_SEED + 1)
    assert first == again != taken(PATHS)


def test_values_are_those_of_the_tier(short, monkeypatch):
    assert tiers.at(1, 2) == 1
    monkeypatch.setattr(tiers, "EXHAUSTIVE", True)
    assert tiers.at(1, 2) == 2


def test_an_unknown_tier_is_refused(monkeypatch):
    monkeypatch.setenv("GLORA_TESTS", "long")
    spec = importlib.util.spec_from_file_location("other_tiers", tiers.__file__)
    with pytest.raises(ValueError, match="GLORA_TESTS: expected one of short, exhaustive, got 'long'"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


# As a plugin ----------------------------------------------------------------------------------------------------------


def item(function, marks=(), **parameters):
    """The part of a pytest.Item that the plugin reads."""
    marks = {mark.name: mark for mark in marks}
    callspec = {"callspec": SimpleNamespace(params=parameters)} if parameters else {}
    return SimpleNamespace(
        nodeid=f"tests/a.py::{function}[{parameters}/]",
        originalname=function,
        name=function,
        parent="file",
        get_closest_marker=marks.get,
        **callspec,
    )


def product_of(function):
    return [item(function, a=a, b=b, c=c) for a, b, c in itertools.product("xyz", (1, True), (0.0, -0.0, [2]))]


def kept(items, args=("tests",)):
    """The items that are left; the others are reported as deselected."""
    dropped = []

    def deselected(items):
        dropped.extend(items)

    left = list(items)
    hook = SimpleNamespace(pytest_deselected=deselected)
    tiers.pytest_collection_modifyitems(SimpleNamespace(args=args, hook=hook), left)
    assert sorted(map(id, [*left, *dropped])) == sorted(map(id, items))
    return left


def test_each_test_is_covered_by_itself(short):
    """1 is not True, and 0.0 is not -0.0; values without a hash count too."""
    one, other, alone = product_of("one"), product_of("other"), item("alone")
    left = kept([*one, alone, *other])
    assert alone in left
    for cases in (one, other):
        found = [[repr(value) for value in case.callspec.params.values()] for case in cases if case in left]
        values = [[repr(value) for value in case.callspec.params.values()] for case in cases]
        assert pairs_of(found) == pairs_of(values) and 9 <= len(found) < len(cases)


def test_what_is_marked_exhaustive_is_left_out(short):
    slow, quick = item("slow", [pytest.mark.exhaustive.mark]), item("quick")
    assert kept([slow, quick]) == [quick]


def test_what_is_asked_for_by_name_has_all_its_cases(short):
    cases, slow = product_of("test"), item("slow", [pytest.mark.exhaustive.mark])
    assert kept([*cases, slow], args=("/somewhere/tests/a.py::test",)) == cases
    assert kept([*cases, slow], args=("tests/a.py::slow", "tests"))[-1] is slow
    assert len(kept([*cases, slow], args=("tests/a.py::slow", "tests"))) < len(cases)
    assert slow not in kept([*cases, slow], args=("tests/b.py::slow",))


def test_the_exhaustive_tier_runs_all(monkeypatch):
    monkeypatch.setattr(tiers, "EXHAUSTIVE", True)
    cases = [*product_of("test"), item("slow", [pytest.mark.exhaustive.mark])]
    assert kept(cases) == cases
