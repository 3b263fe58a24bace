"""One layer as in ``layer.py``, every step replayed from a CUDA graph: GPU time without launches."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from glora import PathConfig
from glora.graphs.capture import CudaGraphs

from ..agreement import run
from ..entrants import Field
from ..entrants.names import ASSEMBLED, FROZEN, GLORA, HIRA, LORA, OFFICIAL, OURS, all_low_rank
from ..section import Comparison, Section, against
from ..settings import Settings
from ..shapes import Layer
from ..timing import interleave, plain
from ..workloads import LayerWorkload
from .layer import ALL_LOW_RANK, NAME, make_layer

A_VECTOR = "ours, A vector, B low rank"
ENTRIES = (FROZEN, LORA, A_VECTOR, ALL_LOW_RANK, ASSEMBLED, OFFICIAL, HIRA, GLORA)
COMPARISONS = (
    *against((FROZEN, LORA), (A_VECTOR, ALL_LOW_RANK)),
    *(Comparison(ALL_LOW_RANK, name) for name in (GLORA, OFFICIAL, ASSEMBLED)),
)


def measure(shape_set: str, layer: Layer, settings: Settings) -> Section:
    """Check every entrant, capture their steps, time the replays."""
    field, workload = make_layer(layer, settings, (FROZEN, LORA, OURS, ASSEMBLED, OFFICIAL, HIRA, GLORA))
    everything, vector = all_low_rank(layer.rank), PathConfig("vector", f"lora_{layer.rank}")
    field.check(workload, [{NAME: everything}, {NAME: vector}], settings.layer_tolerance)
    runs: dict[str, Callable[[], None]] = {}
    for path, name in ((vector, A_VECTOR), (everything, ALL_LOW_RANK)):
        field.set_path(path)
        if OURS in field.models:
            runs |= _replay(name, field, field.models[OURS], workload)
    for name, model in field.models.items():
        if name in ENTRIES:
            runs |= _replay(name, field, model, workload)
    functions = {name: plain(runs[name]) for name in ENTRIES if name in runs}
    tokens = layer.tokens_on(settings.device)
    return Section(
        "replayed layer",
        f"{shape_set} {layer.name}",
        f"from CUDA graphs, {layer.name}: {tokens} x {layer.inputs} -> {layer.outputs}, rank {layer.rank}",
        settings.layer_tolerance,
        field.errors,
        field.refused,
        field.missing,
        interleave(functions, settings.rounds, warmup=3, watch=settings.watch()),
        COMPARISONS,
        units={"tokens": tokens},
    )


def _replay(name: str, field: Field, model: nn.Module, workload: LayerWorkload) -> dict[str, Callable[[], None]]:
    """The step as a graph; refused if it cannot be captured, or if its replay leaves other gradients than the step."""

    def gradients() -> dict[str, Tensor]:
        trained = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
        return {key: grad.clone() for key, grad in {**workload.input_gradients(), **trained}.items()}

    try:
        run(workload, model)
        eager = gradients()
        graphs, step = CudaGraphs(torch.device("cuda")), partial(run, workload, model)
        graphs.warm_up(step)
        replay, _ = graphs.capture(step)
        for gradient in (*workload.input_gradients().values(), *(p.grad for p in model.parameters())):
            if gradient is not None:
                gradient.fill_(torch.nan)  # to find what the replay does not write
        replay()
        found = gradients()
        wrong = [key for key, want in eager.items() if not torch.allclose(found[key], want, rtol=0.05, atol=1e-3)]
    except Exception as error:  # a step that synchronises cannot be captured
        field.refused[name] = f"{type(error).__name__}: {error}"
        return {}
    if wrong:
        field.refused[name] = f"not timed, the replay leaves other gradients: {wrong}"
        return {}
    return {name: replay}
