"""One layer as in ``layer.py``, every step replayed from a CUDA graph: GPU time without launches."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from glora import PathConfig

from ..entrants import ASSEMBLED, FROZEN, GLORA, HIRA, LORA, OFFICIAL, OURS, all_low_rank
from ..graphs import captured
from ..section import Comparison, Section, against
from ..settings import Settings
from ..shapes import Layer
from ..tasks import LayerTask
from ..timing import interleave, plain
from .layer import ALL_LOW_RANK, NAME, make_layer

A_VECTOR = "ours, A vector, B low rank"
ENTRIES = (FROZEN, LORA, A_VECTOR, ALL_LOW_RANK, ASSEMBLED, OFFICIAL, HIRA, GLORA)
COMPARISONS = (
    *against((FROZEN, LORA), (A_VECTOR, ALL_LOW_RANK)),
    *(Comparison(ALL_LOW_RANK, name) for name in (GLORA, OFFICIAL, ASSEMBLED)),
)


def measure(shape_set: str, layer: Layer, settings: Settings) -> Section:
    """Check everyone, capture their steps, time the replays."""
    field, task = make_layer(layer, settings, (FROZEN, LORA, OURS, ASSEMBLED, OFFICIAL, HIRA, GLORA))
    everything, vector = all_low_rank(layer.rank), PathConfig("vector", f"lora_{layer.rank}")
    field.check(task, [{NAME: everything}, {NAME: vector}], settings.layer_tolerance)
    runs: dict[str, Callable[[], None]] = {}
    for path, name in ((vector, A_VECTOR), (everything, ALL_LOW_RANK)):
        field.set_path(path)
        if OURS in field.models:
            runs[name] = captured(_step(task, field.models[OURS]))
    runs |= {name: captured(_step(task, model)) for name, model in field.models.items() if name in ENTRIES}
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


def _step(task: LayerTask, model: nn.Module) -> Callable[[], None]:
    def run() -> None:
        task.reset(model)
        task.backward(model, task.forward(model))

    return run
