"""One layer of ours and of every peer: forward, backward, both; eager, compiled and, on a GPU, replayed."""

import pytest

from .measurements import compiled, replayed
from .measurements.layer import ENTRIES, measure
from .timing import WHOLE
from .workloads import BACKWARD, FORWARD

PHASES = (FORWARD, BACKWARD, WHOLE)


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("entrant", ENTRIES)
def test_layer(measured, hand_in, settings, shape_set, layer, entrant, phase):
    hand_in(measured(measure, shape_set, layer, settings), phase, entrant)


@pytest.mark.parametrize("entrant", compiled.ENTRIES)
def test_compiled_layer(measured, hand_in, settings, shape_set, layer, entrant):
    hand_in(measured(compiled.measure, shape_set, layer, settings), WHOLE, entrant)


@pytest.mark.parametrize("entrant", replayed.ENTRIES)
def test_replayed_layer(measured, hand_in, settings, shape_set, layer, entrant):
    if settings.device == "cpu":
        pytest.skip("CUDA graphs need a GPU")
    hand_in(measured(replayed.measure, shape_set, layer, settings), WHOLE, entrant)
