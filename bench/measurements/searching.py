"""Candidates per second of a search: each merged once, or W_eff formed again in every layer and batch."""

from __future__ import annotations

import torch
from torch.utils.data import TensorDataset

import glora
from glora import SearchSpace
from glora.evaluation import evaluate, evaluate_merged

from ..entrants.names import OFFICIAL, OURS
from ..oracle import oracle_model
from ..section import RELATIVE, Comparison, Section
from ..settings import SEED, Settings
from ..shapes import Model
from ..timing import interleave, plain
from .inference import checked

MERGED, UNMERGED = "ours, merged", "ours, unmerged"
BATCHES, BATCH = 4, 4  # of the images on which every candidate is scored


def measure(shape_set: str, model: Model, settings: Settings) -> Section:
    """Check the logits and the loss of a candidate, then time its evaluation; a new candidate every round."""
    field, workload, _, _ = checked(model, settings)
    if not {OURS, OFFICIAL} <= set(field.models):
        raise ValueError(f"search: not timed, refused: {field.refused}")
    ours, official = field.models[OURS], field.models[OFFICIAL]
    images = settings.randn(BATCHES * BATCH, *workload.images.shape[1:])
    data = TensorDataset(images, torch.randint(1000, (len(images),)))
    space, generator = SearchSpace((model.rank,)), torch.Generator().manual_seed(SEED)
    candidate = {}

    def draw() -> None:
        candidate.update(glora.sample_paths(ours, space, generator))
        field.set_paths(candidate)

    runs = {
        MERGED: lambda: evaluate_merged(ours, candidate, data, BATCH),
        UNMERGED: lambda: evaluate(ours, data, BATCH),
        OFFICIAL: lambda: evaluate(official, data, BATCH),
    }
    draw()
    want = evaluate(oracle_model(ours), TensorDataset(images.double(), data.tensors[1]), BATCH).loss
    errors = {name: abs(run().loss / want - 1) for name, run in runs.items()}
    wrong = {name: error for name, error in errors.items() if not error <= settings.inference_tolerance}
    refused = {name: f"its loss is off by {error:.1e}" for name, error in wrong.items()}
    phases = interleave(
        {name: plain(run) for name, run in runs.items() if name not in refused},
        settings.rounds,
        prepare=draw,
        watch=settings.watch(),
    )
    return Section(
        "search",
        f"{shape_set} candidate",
        f"scoring a candidate of {model.name} on {BATCHES} batches of {BATCH} images",
        settings.inference_tolerance,
        errors,
        refused,
        {},
        phases,
        (Comparison(MERGED, OFFICIAL), Comparison(MERGED, UNMERGED), Comparison(UNMERGED, OFFICIAL)),
        units={"candidates": 1},
        unit=RELATIVE,
    )
