"""Candidates per second of an evolutionary search."""

import pytest

from .entrants.names import OFFICIAL
from .measurements.searching import MERGED, UNMERGED, measure
from .timing import WHOLE


@pytest.mark.parametrize("entrant", (MERGED, UNMERGED, OFFICIAL))
def test_candidate(measured, hand_in, settings, shape_set, model, entrant):
    hand_in(measured(measure, shape_set, model, settings), WHOLE, entrant)
