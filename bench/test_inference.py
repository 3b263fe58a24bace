"""Inference: the merged model is the original one, and as fast."""

import pytest

from .measurements.inference import (
    BATCHES,
    ENTRIES,
    LATENCY,
    MERGED,
    ORIGINAL,
    architecture,
    make,
    measure,
    measure_latency,
)
from .targets import merged_as_fast
from .timing import WHOLE


@pytest.mark.parametrize("entrant", ENTRIES)
@pytest.mark.parametrize("batch", BATCHES)
def test_inference(measured, hand_in, settings, shape_set, model, batch, entrant):
    prepared = measured(make, model, settings)
    hand_in(measured(measure, shape_set, model, batch, settings, prepared), WHOLE, entrant)


@pytest.mark.parametrize("entrant", LATENCY)
@pytest.mark.parametrize("batch", BATCHES)
def test_latency(measured, hand_in, settings, shape_set, model, batch, entrant):
    hand_in(_latency(measured, settings, shape_set, model, batch), WHOLE, entrant)


@pytest.mark.parametrize("batch", BATCHES)
def test_the_merged_model_is_as_fast(measured, settings, shape_set, model, batch):
    """As fast as the original, within the difference of two equal models in the same run."""
    assert merged_as_fast(_latency(measured, settings, shape_set, model, batch).to_dict())


def _latency(measured, settings, shape_set, model, batch):
    prepared = measured(make, model, settings)
    return measured(measure_latency, shape_set, model, batch, settings, prepared)


def test_the_merged_model_is_the_original(measured, settings, model, shape_set):
    """Module types and settings, names, shapes and number of parameters, operations: all equal."""
    prepared = measured(make, model, settings)
    assert architecture(prepared.models[MERGED]) == architecture(prepared.models[ORIGINAL])
    facts = measured(measure, shape_set, model, 1, settings, prepared).facts
    assert facts[MERGED] == facts[ORIGINAL]
