"""Which parameters train, and how many of them a path reads; the layers say so, never the names."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from glora_kernels.torch_private import held_parameters

from .config import PathConfig
from .layers.base import SUPPORT_NAMES, GLoRALayer, names_read
from .models.modules import glora_layers, require_layers
from .paths import get_paths, paths_of


def trainable_parameters(
    model: nn.Module, paths: Mapping[str, PathConfig] | PathConfig | None = None
) -> list[nn.Parameter]:
    """Every parameter that requires grad: support tensors, and whatever else was left trainable.

    Args:
        paths: leave out the support tensors that these paths do not read.

    Raises:
        ValueError: ``paths`` does not name exactly the model's adapted layers.
    """
    layers = glora_layers(model)
    left_out: set[int] = set()
    if paths is not None:
        paths = paths_of(layers, paths)
        for name, layer in layers.items():
            left_out |= {id(p) for p in layer.support_parameters()}
            left_out -= {id(p) for p in layer.support_parameters(paths[name])}
    return [p for p in model.parameters() if p.requires_grad and id(p) not in left_out]


def require_something_read(model: nn.Module, remedy: str) -> None:
    """Raise ValueError if under its paths nothing of ``model`` would train; ``remedy`` says what else to do."""
    if not trainable_parameters(model, get_paths(model)):
        raise ValueError(
            "model: expected paths that read a support tensor, or something else to train, got neither; call "
            f"glora.set_paths(model, glora.PathConfig(B='lora_8')), say, or {remedy}"
        )


def support_ids(layers: Mapping[str, GLoRALayer]) -> set[int]:
    """The ids of all support tensors of ``layers``."""
    return {id(p) for layer in layers.values() for p in layer.support_parameters()}


def trained_beside(model: nn.Module, layers: Mapping[str, GLoRALayer]) -> set[int]:
    """The ids of what trains in ``model`` apart from the support tensors of its ``layers``, such as the head."""
    return {id(p) for p in trainable_parameters(model)} - support_ids(layers)


def count_parameters(model: nn.Module, paths: Mapping[str, PathConfig] | PathConfig | None = None) -> int:
    """How many support values the paths read (default: the current ones): the budget a search obeys.

    A sliced rank counts its slice only. The classifier head and anything else trained beside GLoRA
    does not count.
    """
    layers = require_layers(model)
    paths = get_paths(model) if paths is None else paths_of(layers, paths)
    return sum(paths[name].count(layer.shape) for name, layer in layers.items())


def drop_unread_gradients(model: nn.Module, paths: Mapping[str, PathConfig] | PathConfig | None = None) -> None:
    """Set to None the gradients of support tensors that ``paths`` (default: the current ones) do not read.

    Without a compiler they are None already. A compiled graph serves every path and makes them zero; an optimiser would
    then move the tensors by their moments and weight decay. Call it between ``backward`` and ``step``, with one
    backward pass per step: it also drops gradients that earlier passes left under other paths.
    """
    layers = glora_layers(model)
    drop_unread(layers, None if paths is None else paths_of(layers, paths))


def drop_unread(layers: Mapping[str, GLoRALayer], paths: Mapping[str, PathConfig] | None = None) -> None:
    """:func:`drop_unread_gradients` of a model whose ``layers`` are known."""
    for name, layer in layers.items():
        held = held_parameters(layer)
        read = names_read(layer.path if paths is None else paths[name], layer.bias is not None)
        graded = {own: held[own] for own in held.keys() - read if own in SUPPORT_NAMES and held[own].grad is not None}
        for parameter in graded.values():
            if all(parameter is not held.get(other) for other in read):  # not tied to what is read
                parameter.grad = None
