"""What the first step of a run shows: layers that do not run, and kinds that one step moves too far."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from statistics import fmean
from typing import NamedTuple

import torch
from torch import Tensor

from glora_kernels.torch_private import is_batched

from ..arguments import listed
from ..config import PathConfig
from ..layers.base import GLoRALayer, as_layer
from ..layers.conv2d import GLoRAConv2d
from ..processes import is_first

LARGE = 0.1  # the relative change of a layer's output that is warned of
_TOKENS = 64  # of a layer's input, at least, as whole samples


class _Run(NamedTuple):
    """A layer in its first run: some of its input, its path, and what that read."""

    x: Tensor
    path: PathConfig
    storages: dict[str, Tensor]


@contextmanager
def first_step(
    layers: Mapping[str, GLoRALayer], lr: float, taken: Callable[[], float], compare: bool
) -> Iterator[None]:
    """Watch ``layers`` in the block, which takes the first step of a run, and warn at its end.

    Args:
        lr: the peak of the learning rate.
        taken: the learning rate of the step, once it is taken: it warms up.
        compare: look for large changes too; storages are those of the whole layer then.
    """
    runs: dict[str, _Run | None] = {}

    def note(name: str, layer: GLoRALayer, inputs: tuple[Tensor, ...], keywords: Mapping[str, Tensor]) -> None:
        if name not in runs:
            runs[name] = None
            (x,) = (*inputs, *keywords.values())
            if compare and not is_batched(x):
                read = {own: getattr(layer, own).detach().clone() for _, _, names in layer.path.read for own in names}
                runs[name] = _Run(_some(layer, x), layer.path, read)

    hooks = [
        layer.register_forward_hook(
            lambda layer, inputs, keywords, _, name=name: note(name, layer, inputs, keywords), with_kwargs=True
        )
        for name, layer in layers.items()
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
    idle = layers.keys() - runs.keys()
    if idle:
        warnings.warn(
            f"these layers did not run in the first step: {sorted(idle)}; if the model reads their weight "
            "instead of calling them, GLoRA has no effect there: exclude them in glora.inject",
            stacklevel=4,
        )
    if compare and is_first():
        _warn_of_large({name: (layers[name], run) for name, run in runs.items() if run is not None}, lr, taken())


def _some(layer: GLoRALayer, x: Tensor) -> Tensor:
    """A copy of the first samples of an input, two or more, in the layer's own type (autocast may have changed it)."""
    if x.dim() > (3 if isinstance(layer, GLoRAConv2d) else 1):
        tokens = max(1, x[:1].numel() // x.shape[-1])
        x = x[: max(2, _TOKENS // tokens)]
    return as_layer(layer, x.detach()).clone()


def _warn_of_large(runs: Mapping[str, tuple[GLoRALayer, _Run]], lr: float, taken: float) -> None:
    found: dict[str, dict[str, float]] = {}
    for name, (layer, run) in runs.items():
        changes = {}
        with torch.no_grad(), suppress(RuntimeError, TypeError, ValueError):  # a look at a layer does not end a run
            changes = _changes(layer, run)
        for kind, change in changes.items():
            if change * lr > LARGE * taken:
                found.setdefault(kind, {})[name] = change * lr / taken
    if found:
        fresh = all(
            not layer.scales.factors and not any(bool(run.storages[left].any()) for _, _, (left, *_) in run.path.read)
            for layer, run in runs.values()
        )
        advice = ", or have the scales of kinds measured first, glora.Recipe(balance=0.02)" if fresh else ""
        kinds = [f"{kind} by {fmean(c.values()):.0%} in {listed(c, 2)}" for kind, c in sorted(found.items())]
        warnings.warn(
            f"lr: expected steps that move a layer's output by at most {LARGE:.0%}; one step at lr={lr:g} moves it, as "
            f"the first step shows: {'; '.join(kinds)}. Training may be unstable; take a smaller rate{advice}",
            stacklevel=5,
        )


def _changes(layer: GLoRALayer, run: _Run) -> dict[str, float]:
    """The relative change of the output by what happened to each tensor alone since the run, by slot and kind."""
    now = {name: getattr(layer, name).detach() for name in run.storages}
    before = layer.compute(run.x, layer.terms(run.path, run.storages))
    size = float(before.double().norm())
    changes = {}
    for slot, choice, names in run.path.read:
        storages = {**run.storages, **{name: now[name] for name in names}}
        after = layer.compute(run.x, layer.terms(run.path, storages))
        changes[f"{slot} as {choice.kind}"] = float((after.double() - before.double()).norm()) / size if size else 0.0
    return changes
