"""Reading, setting and drawing the paths of a model's layers: always from outside of forward."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from .config import PathConfig, SearchSpace
from .modules import glora_layers, require_layers
from .sampling import PathSampler

Paths = dict[str, PathConfig]


def get_paths(model: nn.Module) -> Paths:
    """The path of every adapted layer, by name."""
    return {name: layer.path for name, layer in glora_layers(model).items()}


def set_paths(model: nn.Module, paths: Mapping[str, PathConfig]) -> None:
    """Set the path of every adapted layer.

    Paths may change between a forward pass and its backward, under activation checkpointing too: what
    is run again takes the path of its first run (:mod:`glora.history`).

    Raises:
        ValueError: names missing from or unknown to the model, or a rank above a layer's storage;
            no path is changed then.
        RuntimeError: during a backward pass.
    """
    layers = require_layers(model)
    check_names("paths", paths, layers)
    before = {name: layer.path for name, layer in layers.items()}
    try:
        for name, layer in layers.items():
            layer.path = paths[name]
    except (TypeError, ValueError) as error:
        for name, path in before.items():
            layers[name].path = path
        raise type(error)(f"{error} (layer {name!r})") from None


@contextmanager
def using_paths(model: nn.Module, paths: Mapping[str, PathConfig]) -> Iterator[nn.Module]:
    """Set paths for a ``with`` block and restore the previous ones at its end, also if it merges the model."""
    before = {layer: layer.path for layer in glora_layers(model).values()}
    set_paths(model, paths)
    try:
        yield model
    finally:
        for layer, path in before.items():
            layer.path = path


def sample_paths(model: nn.Module, space: SearchSpace, generator: torch.Generator, limit: int | None = None) -> Paths:
    """A random path for every adapted layer; the model is not changed.

    Without ``limit`` the draw is uniform; with it the paths together read at most ``limit``
    parameters (see :class:`glora.sampling.PathSampler`).

    Raises:
        ValueError: a rank of ``space`` above a layer's storage, or a limit no path meets.
    """
    return sampler_for(model, space, limit).sample(generator)


def sampler_for(model: nn.Module, space: SearchSpace, limit: int | None = None) -> PathSampler:
    """The sampler of :func:`sample_paths`, to be kept where many paths are drawn."""
    layers = require_layers(model)
    for name, layer in layers.items():
        if max(space.ranks) > layer.rank and any("lora" in getattr(space, slot) for slot in "ABC"):
            raise ValueError(f"space: expected ranks up to {layer.rank} (storage of layer {name!r}), got {space.ranks}")
    return PathSampler({name: layer.shape for name, layer in layers.items()}, space, limit)


def check_names(argument: str, got: Mapping[str, PathConfig], expected: Mapping) -> None:
    """Raise ValueError, listing them, if the two mappings differ in their keys; TypeError for no path."""
    missing, unknown = [n for n in expected if n not in got], [n for n in got if n not in expected]
    if missing or unknown:
        raise ValueError(
            f"{argument}: expected exactly the {len(expected)} adapted layers of the model; "
            f"missing {missing}, unknown {unknown}"
        )
    for name, path in got.items():
        if not isinstance(path, PathConfig):
            raise TypeError(f"{argument}: expected glora.PathConfig for {name!r}, got {type(path).__name__}")
