"""Which candidates are on the front, and which become parents: held against definitions written out."""

import math
import random

import pytest

from glora import Candidate
from glora.evolution.selection import front, in_order


def candidates(*pairs):
    """Of (parameters, score); told apart by their generation."""
    return [Candidate({}, score, parameters, number) for number, (parameters, score) in enumerate(pairs)]


def drawn(seed, count=40):
    gen = random.Random(seed)
    return candidates(*((gen.randrange(20), gen.randrange(20) / 20) for _ in range(count)))


def beats(one, other):
    """No worse in both, and better in one or, where both are equal, earlier."""
    no_worse = one.score >= other.score and one.parameters <= other.parameters
    equal = (one.score, one.parameters) == (other.score, other.parameters)
    return no_worse and (not equal or one.generation < other.generation)


def fronts(rest):
    """Non-dominated sorting by its definition."""
    while rest:
        best = [c for c in rest if not any(beats(other, c) for other in rest)]
        yield best
        rest = [c for c in rest if c not in best]


@pytest.mark.parametrize("seed", range(20))
def test_the_front_is_what_nothing_beats(seed):
    history = drawn(seed)
    found = front(history)
    assert sorted(found) == sorted(next(fronts(history)))
    assert [c.parameters for c in found] == sorted({c.parameters for c in found})
    assert [c.score for c in found] == sorted({c.score for c in found})


@pytest.mark.parametrize("seed", range(20))
def test_parents_come_front_by_front(seed):
    history, start = drawn(seed), 0
    ordered = in_order(history, "front")
    for expected in fronts(history):
        assert sorted(ordered[start : start + len(expected)]) == sorted(expected)
        start += len(expected)
    assert start == len(ordered)


def test_in_a_front_the_ends_come_first_then_the_sparse():
    history = candidates((0, 0.0), (1, 0.1), (2, 0.2), (5, 0.5), (10, 1.0), (9, 0.95))
    # both measures of the crowding: between neighbours, over the whole; the ends are infinitely far
    distances = {1: 0.2 + 0.2, 2: 0.4 + 0.4, 5: 0.7 + 0.75, 9: 0.5 + 0.5}
    order = [c.parameters for c in in_order(history, "front")]
    assert order == [10, 0, *sorted(distances, key=lambda size: -distances[size])]


def test_by_score_alone_of_equals_the_smaller_then_the_earlier():
    history = candidates((5, 0.5), (4, 0.5), (4, 0.5), (9, 0.9), (1, math.nan), (1, -math.inf))
    assert [c.generation for c in in_order(history, "score")] == [3, 1, 2, 0, 4, 5]


@pytest.mark.parametrize("size", [1, 2, 3])
def test_small_fronts(size):
    history = candidates(*((i, float(i)) for i in range(size)))
    assert front(history) == history
    assert sorted(in_order(history, "front")) == history


def test_what_has_no_number_is_on_no_front_and_last():
    history = candidates((1, math.nan), (5, 0.5), (0, math.nan), (3, -math.inf), (4, -math.inf))
    assert [c.parameters for c in front(history)] == [3, 5]
    assert [c.parameters for c in in_order(history, "front")] == [5, 3, 4, 1, 0]
    assert front(candidates((1, math.nan))) == []
