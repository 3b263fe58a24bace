"""What the short tier takes: a cover of all pairs, the same in every process, and nothing that is marked exhaustive."""

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


@pytest.mark.parametrize(("strength", "most"), [(1, 5), (2, 40), (3, 180)])
def test_a_cover_has_every_combination_with_few_cases(short, strength, most):
    """At least as many as the two (three) longest parameters have values together; of 900 paths."""
    taken = tiers.cover(PATHS, strength)
    assert combinations(taken, strength) == combinations(PATHS, strength)
    assert len(PATHS) == 900 and len(taken) <= most
    assert taken == [path for path in PATHS if path in set(taken)], "in their order"


def test_of_cases_that_are_no_product_what_occurs_is_covered(short):
    cases = [("a", 1, "x"), ("a", 2, "x"), ("b", 1, "y"), ("b", 1, "x")]
    taken = tiers.cover(cases)
    assert combinations(taken, 2) == combinations(cases, 2)


def test_one_parameter_and_two_lose_no_case(short):
    assert tiers.cover([("a",), ("b",)]) == [("a",), ("b",)]
    assert len(tiers.cover(itertools.product(range(3), range(4)))) == 12
    assert tiers.cover([]) == []


def test_the_exhaustive_tier_takes_all(monkeypatch):
    monkeypatch.setattr(tiers, "EXHAUSTIVE", True)
    assert tiers.cover(PATHS) == PATHS
    assert tiers.at(1, 2) == 2


def test_a_cover_depends_on_the_seed_alone(short, monkeypatch):
    first, again = tiers.cover(PATHS), tiers.cover(PATHS)
    monkeypatch.setattr(tiers, "TEST_SEED", tiers.TEST_SEED + 1)
    assert first == again != tiers.cover(PATHS)


def test_an_unknown_tier_is_refused(monkeypatch):
    monkeypatch.setenv("GLORA_TESTS", "long")
    spec = importlib.util.spec_from_file_location("other_tiers", tiers.__file__)
    with pytest.raises(ValueError, match="GLORA_TESTS: expected one of short, exhaustive, got 'long'"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


# As a plugin ----------------------------------------------------------------------------------------------------------


def item(function, marks=(), **parameters):
    """As much of a pytest.Item as the plugin looks at."""
    marks = {mark.name: mark for mark in marks}
    callspec = {"callspec": SimpleNamespace(params=parameters)} if parameters else {}
    return SimpleNamespace(
        name=f"{function}{parameters}", originalname=function, parent="file", get_closest_marker=marks.get, **callspec
    )


def product_of(function, *marks):
    return [item(function, marks, a=a, b=b, c=c) for a, b, c in itertools.product("xyz", (1, True), (None, [2]))]


def kept(items, keyword="", args=("tests",)):
    """What is left of the items; the others are said to be deselected."""
    dropped = []

    def deselected(items):
        dropped.extend(items)

    hook = SimpleNamespace(pytest_deselected=deselected)
    left = list(items)
    tiers.pytest_collection_modifyitems(
        SimpleNamespace(option=SimpleNamespace(keyword=keyword), args=args, hook=hook), left
    )
    assert sorted(map(id, [*left, *dropped])) == sorted(map(id, items))
    return left


def test_each_test_is_covered_by_itself(short):
    """1 is not True; values without a hash count too."""
    one, other, alone = product_of("one"), product_of("other"), item("alone")
    left = kept([*one, alone, *other])
    assert alone in left
    for cases in (one, other):
        taken = [case for case in left if case in cases]
        values = [[tiers._hashable(v) for v in case.callspec.params.values()] for case in cases]
        found = [[tiers._hashable(v) for v in case.callspec.params.values()] for case in taken]
        assert combinations(found, 2) == combinations(values, 2) and len(taken) < len(cases)


def test_a_mark_asks_for_more_or_less(short):
    assert len(kept(product_of("test", pytest.mark.cover(3).mark))) == 12
    assert len(kept(product_of("test", pytest.mark.cover(1).mark))) == 3


def test_what_is_marked_exhaustive_is_left_out(short):
    slow, quick = item("slow", [pytest.mark.exhaustive.mark]), item("quick")
    assert kept([slow, quick]) == [quick]


def test_what_is_asked_for_by_name_runs(short):
    cases = [*product_of("test"), item("slow", [pytest.mark.exhaustive.mark])]
    assert kept(cases, keyword="slow") == kept(cases, args=("tests/a.py::slow",)) == cases


def test_the_exhaustive_tier_runs_all(monkeypatch):
    monkeypatch.setattr(tiers, "EXHAUSTIVE", True)
    cases = [*product_of("test"), item("slow", [pytest.mark.exhaustive.mark])]
    assert kept(cases) == cases
