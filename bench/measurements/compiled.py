"""One layer as in ``layer.py``, every entrant under ``torch.compile``.

Entrants that take any path are timed with all low rank. Ours is timed on random paths too: one graph serves them all,
where the others compile again for each.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

import glora
from glora import PathConfig

from ..entrants import names as who
from ..section import Comparison, Section, against, per_run
from ..settings import SEED, Settings
from ..shapes import Layer
from ..timing import Timed, Watch, interleave
from ..workloads import LayerWorkload, step
from .layer import NAME, RANDOM, make_layer, spread_paths

EAGER = ", eager"
COMPILED = (
    who.FROZEN,
    who.LORA,
    who.OURS,
    who.ASSEMBLED,
    who.OFFICIAL,
    who.GLORA,
    who.HIRA,
    who.OURS_MATMUL,
    who.LYCORIS_BYPASS,
    who.LYCORIS,
)
ENTRIES = (*COMPILED[:3], who.OURS + EAGER, who.OURS + RANDOM, *COMPILED[3:])
COMPARISONS = (
    *against((who.FROZEN, who.LORA), [who.OURS + RANDOM]),
    *(Comparison(who.OURS, name) for name in (who.OFFICIAL, who.ASSEMBLED, who.GLORA, who.OURS + EAGER)),
    Comparison(who.OURS_MATMUL, who.LYCORIS_BYPASS),
    Comparison(who.OURS_MATMUL, who.LYCORIS),
)


class CompiledLayerWorkload(LayerWorkload):
    """As :class:`LayerWorkload`, with every model compiled."""

    def __init__(self, x: Tensor, dy: Tensor):
        super().__init__(x, dy)
        object.__setattr__(self, "compiled", {})

    def forward(self, model: nn.Module) -> Tensor:
        if model not in self.compiled:
            self.compiled[model] = compiled_call()
        return self.compiled[model](model, self.x)

    def backward(self, model: nn.Module, y: Tensor) -> None:
        super().backward(model, y)
        if glora.glora_layers(model):
            glora.drop_unread_gradients(model)


def compiled_call(backend: str = "inductor") -> Callable[[nn.Module, Tensor], Tensor]:
    """``model(x)`` under ``torch.compile``, for one model.

    torch keeps what it compiled with the code object. Each model gets a copy of that: otherwise all would share one
    cache, check each other's guards and reach its limit.
    """
    return torch.compile(types.FunctionType(_call.__code__.replace(), globals()), backend=backend)


def _call(model: nn.Module, x: Tensor) -> Tensor:
    return model(x)


def measure(shape_set: str, layer: Layer, settings: Settings) -> Section:
    """Check every compiled entrant, then time them."""
    field, eager = make_layer(layer, settings, COMPILED)
    workload = CompiledLayerWorkload(eager.x, eager.dy)
    path = who.all_low_rank(layer.rank)
    torch.compiler.reset()
    drawn = spread_paths(layer.rank, torch.Generator().manual_seed(SEED))
    field.check(workload, [{NAME: path}], settings.layer_tolerance)
    alone = replace(field, models={who.OURS: field.models[who.OURS]} if who.OURS in field.models else {})
    alone.check(workload, [{NAME: one} for one in drawn] if alone.models else [], settings.layer_tolerance)
    field.refuse(alone.refused)
    field.set_path(path)

    functions: dict[str, Timed] = {name: step(workload, model) for name, model in field.models.items()}
    shares = {}
    if who.OURS in functions:
        functions[who.OURS + EAGER] = step(eager, field.models[who.OURS])
        functions[who.OURS + RANDOM] = _on_each(field.models[who.OURS], drawn, path, functions[who.OURS])
        shares[who.OURS + RANDOM] = len(drawn)
    ordered = {name: functions[name] for name in ENTRIES if name in functions}
    phases = interleave(ordered, settings.rounds, watch=settings.watch())
    tokens = layer.tokens_on(settings.device)
    return Section(
        "compiled layer",
        f"{shape_set} {layer.name}",
        f"under torch.compile, {layer.name}: {tokens} x {layer.inputs} -> {layer.outputs}, rank {layer.rank}, "
        "all low rank where not said",
        settings.layer_tolerance,
        field.errors,
        field.refused,
        field.missing,
        {phase: per_run(times, shares) for phase, times in phases.items()},
        COMPARISONS,
        units={"tokens": tokens},
    )


def _on_each(ours: nn.Module, paths: list[PathConfig], usual: PathConfig, timed: Timed) -> Timed:
    """Run on each of ``paths``, then set the usual one again; setting paths is not timed."""

    def run(watch: Watch) -> None:
        for path in paths:
            glora.set_paths(ours, {NAME: path})
            timed(watch)
        glora.set_paths(ours, {NAME: usual})

    return run
