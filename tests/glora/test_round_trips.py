"""Random models through every way to save and load: never a difference without a word (tests/round_trips.py)."""

from itertools import chain

import pytest

pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
from tests.round_trips import ROUTES, report, run, table  # noqa: E402
from tests.silence import SAME, WARNED  # noqa: E402
from tests.sweep import SEEN, quietly  # noqa: E402
from tests.tiers import at  # noqa: E402

CASES = at(3, 88)  # of each of the 23 routes
MORE = 20  # looked at only where none of them came back


@pytest.fixture(scope="module", autouse=True)
def no_reports_of_transformers():
    with quietly():
        yield


@pytest.mark.parametrize("route", ROUTES)
def test_the_same_outputs_or_a_refusal_or_a_warning(route):
    cases = [run(route, index) for index in range(CASES)]
    assert not (failures := report(cases)), f"\n{failures}\n{table(cases)}"
    more = (run(route, index) for index in range(CASES, CASES + MORE))
    # or it would pass by refusing everything, and by models on which nothing can be seen
    assert any(case.verdict.kind in (SAME, WARNED) and case.seen > SEEN for case in chain(cases, more)), table(cases)


def test_a_case_is_the_same_in_every_run():
    assert run("adapter", 1) == run("adapter", 1)
