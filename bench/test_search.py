"""Candidates per second of an evolutionary search, and what each costs the host."""

import pytest

from .entrants.names import OFFICIAL
from .measurements.searching import MERGED, UNMERGED, measure, measure_host
from .timing import WHOLE

ENTRANTS = pytest.mark.parametrize("entrant", (MERGED, UNMERGED, OFFICIAL))


@ENTRANTS
def test_candidate(measured, hand_in, settings, shape_set, model, entrant):
    hand_in(measured(measure, shape_set, model, settings), WHOLE, entrant)


@ENTRANTS
def test_host(measured, hand_in, settings, entrant):
    hand_in(measured(measure_host, settings), WHOLE, entrant)
