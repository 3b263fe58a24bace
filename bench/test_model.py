"""A whole training step of a timm model."""

import pytest

from .measurements.model import ENTRIES, OPTIMIZER, measure
from .timing import WHOLE
from .workloads import BACKWARD, FORWARD


@pytest.mark.parametrize("phase", (FORWARD, BACKWARD, OPTIMIZER, WHOLE))
@pytest.mark.parametrize("entrant", ENTRIES)
def test_training_step(measured, hand_in, settings, shape_set, model, entrant, phase):
    hand_in(measured(measure, shape_set, model, settings), phase, entrant)
