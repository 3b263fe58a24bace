"""Inference: the merged model is the original one, and as fast."""

import pytest

from .measurements.inference import BATCHES, ENTRIES, MERGED, ORIGINAL, architecture, make, measure
from .timing import WHOLE


@pytest.mark.parametrize("entrant", ENTRIES)
@pytest.mark.parametrize("batch", BATCHES)
def test_inference(measured, hand_in, settings, shape_set, model, batch, entrant):
    prepared = measured(make, model, settings)
    hand_in(measured(measure, shape_set, model, batch, settings, prepared), WHOLE, entrant)


def test_the_merged_model_is_the_original(measured, settings, model, shape_set):
    """Module types and settings, names, shapes and number of parameters, operations: all equal."""
    prepared = measured(make, model, settings)
    assert architecture(prepared.models[MERGED]) == architecture(prepared.models[ORIGINAL])
    if settings.device == "cpu":
        facts = measured(measure, shape_set, model, 1, settings, prepared).facts
        assert facts[MERGED] == facts[ORIGINAL]
