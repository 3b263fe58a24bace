"""Merging: its time, its error against the numerical contract, and that undoing it changes no bit."""

import pytest

from .measurements.merging import COPY, DENSE, MERGE, changed_bits, measure
from .timing import WHOLE

CYCLES = 1000


@pytest.mark.parametrize("entrant", (COPY, MERGE, DENSE))
def test_merge(measured, hand_in, settings, shape_set, layer, entrant):
    hand_in(measured(measure, shape_set, layer, settings), WHOLE, entrant)


def test_a_thousand_times_merged_and_unmerged_changes_no_bit(settings):
    assert changed_bits(CYCLES, settings) == 0
