"""How close every operation comes to this machine's ceilings."""

import pytest

from .measurements.roofline import COPY, MERGE, PRODUCT, ceilings, measure, paths
from .timing import WHOLE
from .workloads import BACKWARD, FORWARD


@pytest.mark.parametrize("entrant", (COPY, PRODUCT))
def test_ceiling(measured, hand_in, settings, entrant):
    hand_in(measured(ceilings, settings), WHOLE, entrant)


@pytest.mark.parametrize("path", paths(1))
@pytest.mark.parametrize("operation", (FORWARD, BACKWARD, MERGE))
def test_operation(measured, hand_in, settings, shape_set, layer, operation, path):
    hand_in(measured(measure, shape_set, layer, settings), WHOLE, f"{operation}, {path}")
