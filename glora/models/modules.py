"""Finding and exchanging modules of a model, by type and by whole name components."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from glora_kernels.torch_private import children_of

from ..arguments import require_type
from ..layers.base import GLoRALayer
from ..layers.linear import GLoRALinear
from .wrappers import named_modules


def glora_layers(model: nn.Module) -> dict[str, GLoRALayer]:
    """The adapted layers of ``model`` by name, in the model's own order, each once.

    Names are those without ``torch.compile``, data parallelism and other wrappers (:mod:`glora.models.wrappers`).
    """
    require_model(model)
    return {name: module for name, module in named_modules(model) if isinstance(module, GLoRALayer)}


def module_types(model: nn.Module) -> dict[str, type]:
    """The type of every module by its name."""
    return {name: type(module) for name, module in model.named_modules()}


def called(model: nn.Module, inputs: Tensor | Mapping[str, Any]) -> Any:
    """The output of ``model`` for a tensor, or for its arguments by name."""
    return model(**inputs) if isinstance(inputs, Mapping) else model(inputs)


def require_model(model: nn.Module) -> None:
    """Raise TypeError for anything but a module."""
    require_type("model", model, nn.Module, "a torch.nn.Module")


def require_layers(model: nn.Module) -> dict[str, GLoRALayer]:
    """As :func:`glora_layers`. Raises ValueError if there are none."""
    layers = glora_layers(model)
    if not layers:
        raise ValueError("model: expected at least one adapted layer, found none; call glora.inject(model) first")
    return layers


def require_linear_layers(model: nn.Module) -> dict[str, GLoRALinear]:
    """As :func:`require_layers`, for formats that know only linear layers. Raises ValueError if there are others."""
    layers = require_layers(model)
    linear = {name: layer for name, layer in layers.items() if isinstance(layer, GLoRALinear)}
    others = [f"{name} ({type(layer).__name__})" for name, layer in layers.items() if name not in linear]
    if others:
        raise ValueError(f"model: expected adapted linear layers, which is all that the format can hold; got {others}")
    return linear


def require_real(model: nn.Module) -> None:
    """Raise ValueError if parameters of ``model`` are on meta, where nothing can be loaded."""
    require_model(model)
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError("model: expected real tensors, got parameters on meta; load the base weights first")


def matches(name: str, pattern: str) -> bool:
    """Whether the dotted components of ``pattern`` are consecutive components of ``name``.

    ``"head"`` selects ``head`` and ``head.fc`` but not ``overhead``; ``"qkv"`` selects
    ``blocks.3.attn.qkv``; ``"blocks.1"`` all of block 1 and nothing of block 10.
    """
    parts, wanted = name.split("."), pattern.split(".")
    return any(parts[i : i + len(wanted)] == wanted for i in range(len(parts) - len(wanted) + 1))


def replace_modules(model: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> None:
    """Put each new module in every place where its old one stands (a shared module has several)."""
    for parent in list(model.modules()):
        # not named_children(), which passes over a second reference to the same module
        for name, child in children_of(parent):
            if child in replacements:
                setattr(parent, name, replacements[child])


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode for a ``with`` block; then every module's own mode again."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, flag in training.items():
            module.training = flag


@contextmanager
def replaced_modules(model: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> Iterator[None]:
    """As :func:`replace_modules`, undone at the end of the ``with`` block."""
    replace_modules(model, replacements)
    try:
        yield
    finally:
        replace_modules(model, {new: old for old, new in replacements.items()})
