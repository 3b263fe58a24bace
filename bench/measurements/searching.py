"""Candidates per second of a search: each merged once, or W_eff formed again in every layer and batch.

Candidates are random, new in every round and the same for all: no merged layer can be used again, as in the first
generation of a search. ``bench/search_reuse.py`` measures the later ones.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.data import TensorDataset

import glora
from glora import SearchSpace
from glora.dataset import reading
from glora.evaluation import evaluate
from glora.evolution.scoring import CandidateScorer
from glora.objective import Objective

from ..entrants import Field, make_field
from ..entrants.names import OFFICIAL, OURS
from ..oracle import oracle_model
from ..section import RELATIVE, Comparison, Section
from ..settings import SEED, Settings
from ..shapes import Model
from ..timing import interleave, plain
from .inference import checked

MERGED, UNMERGED = "ours, merged", "ours, unmerged"
BATCHES, BATCH = 4, 4  # of the images on which every candidate is scored
LAYERS, WIDTH, RANK = 48, 16, 8  # of a model whose arithmetic takes no time


def measure(shape_set: str, model: Model, settings: Settings) -> Section:
    """Scoring candidates of a timm model, whose logits are checked first."""
    field, workload, _, _ = checked(model, settings)
    x = settings.randn(BATCHES * BATCH, *workload.images.shape[1:])
    title = f"scoring a candidate of {model.name} on {BATCHES} batches of {BATCH} images"
    return _measured(f"{shape_set} candidate", title, field, TensorDataset(x, torch.randint(1000, (len(x),))), settings)


def measure_host(settings: Settings) -> Section:
    """Scoring candidates of a deep model of tiny layers: what a candidate costs the host, whatever the arithmetic."""
    torch.manual_seed(SEED)
    backbone = nn.Sequential(*[nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)]).to(settings.device, settings.dtype)
    field = make_field(backbone, [name for name, _ in backbone.named_children()], RANK, (OFFICIAL,))
    title = f"host time of a candidate: {LAYERS} layers of {WIDTH} x {WIDTH}, one batch of {BATCH} tokens"
    data = TensorDataset(settings.randn(BATCH, WIDTH), torch.randint(WIDTH, (BATCH,)))
    return _measured("host", title, field, data, settings)


def _measured(name: str, title: str, field: Field, data: TensorDataset, settings: Settings) -> Section:
    """Check the loss of a candidate, then time its evaluation."""
    if not {OURS, OFFICIAL} <= set(field.models):
        raise ValueError(f"search: not timed, refused: {field.refused}")
    ours, official = field.models[OURS], field.models[OFFICIAL]
    space, generator = SearchSpace((field.rank,)), torch.Generator().manual_seed(SEED)
    scorer = CandidateScorer(ours, reading("validation", data, BATCH), "loss", Objective(ours))
    samples, candidate = len(data), {}

    def draw() -> None:
        candidate.update(glora.sample_paths(ours, space, generator))
        field.set_paths(candidate)

    runs = {
        MERGED: lambda: -scorer(candidate, 0, samples) / samples,
        UNMERGED: lambda: evaluate(ours, data, BATCH).loss,
        OFFICIAL: lambda: evaluate(official, data, BATCH).loss,
    }
    draw()
    x, target = data.tensors
    want = evaluate(oracle_model(ours), TensorDataset(x.double(), target), BATCH).loss
    errors = {entrant: abs(run() / want - 1) for entrant, run in runs.items()}
    wrong = {entrant: error for entrant, error in errors.items() if not error <= settings.inference_tolerance}
    refused = {entrant: f"its loss is off by {error:.1e}" for entrant, error in wrong.items()}
    phases = interleave(
        {entrant: plain(run) for entrant, run in runs.items() if entrant not in refused},
        settings.rounds,
        prepare=draw,
        watch=settings.watch(),
    )
    return Section(
        "search",
        name,
        title,
        settings.inference_tolerance,
        errors,
        refused,
        {},
        phases,
        (Comparison(MERGED, OFFICIAL), Comparison(MERGED, UNMERGED), Comparison(UNMERGED, OFFICIAL)),
        units={"candidates": 1},
        unit=RELATIVE,
    )
