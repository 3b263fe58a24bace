"""A whole training step of a timm model: its passes, and the modes that it can be run in."""

import pytest

from .measurements import step_modes
from .measurements.model import ENTRIES, OPTIMIZER, measure
from .timing import WHOLE
from .workloads import BACKWARD, FORWARD


@pytest.mark.parametrize("phase", (FORWARD, BACKWARD, OPTIMIZER, WHOLE))
@pytest.mark.parametrize("entrant", ENTRIES)
def test_training_step(measured, hand_in, settings, shape_set, model, entrant, phase):
    hand_in(measured(measure, shape_set, model, settings), phase, entrant)


@pytest.mark.parametrize("entrant", step_modes.ENTRIES)
def test_training_step_mode(measured, hand_in, settings, shape_set, model, entrant):
    hand_in(measured(step_modes.measure, shape_set, model, settings), WHOLE, entrant)
