"""Reading, setting and drawing the paths of a model's layers: always from outside of forward."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from weakref import WeakKeyDictionary

import torch
from torch import nn

from .arguments import listed, require_type
from .config import PathConfig, SearchSpace
from .layers.base import GLoRALayer, take_paths
from .models.modules import glora_layers, require_layers
from .models.wrappers import name_in
from .sampling import PathSampler

Paths = dict[str, PathConfig]
# Who is within using_paths. Not kept on the layer: a copy made there belongs to nobody, and pickles hold no threads.
_users: WeakKeyDictionary[GLoRALayer, tuple[int, asyncio.Task | None]] = WeakKeyDictionary()
_lock = threading.Lock()


def get_paths(model: nn.Module) -> Paths:
    """The path of every adapted layer, by name.

    A copy of a model has its own paths. Averages of weights (``torch.optim.swa_utils.AveragedModel``, timm's
    ``ModelEma``) are such copies: call ``set_paths(ema.module, get_paths(model))`` before you evaluate one.
    """
    return {name: layer.path for name, layer in glora_layers(model).items()}


def set_paths(model: nn.Module, paths: Mapping[str, PathConfig] | PathConfig, *, partial: bool = False) -> None:
    """Set the path of every adapted layer, by its name with or without those of wrappers (:func:`glora_layers`).

    Paths may change between a forward pass and its backward. Under activation checkpointing, a layer that
    is run again takes the path of its first run (:mod:`glora.layers.path_history`).

    Args:
        paths: the path of every layer by name, or one path for all of them.
        partial: ``paths`` names some layers; the others keep theirs.

    Raises:
        ValueError: names missing from or unknown to the model, or given twice, with and without those of wrappers; a
            rank above a layer's storage. No path is changed then.
        TypeError: neither a path nor a mapping of them.
        RuntimeError: during a backward pass, or while another thread is within :func:`using_paths` of this model.

    Example:
        >>> glora.set_paths(model, glora.PathConfig(B="lora_8"))
        >>> glora.set_paths(model, {"blocks.0.mlp.fc1": glora.PathConfig(A="vector")}, partial=True)
    """
    layers = require_layers(model)
    if partial and isinstance(paths, Mapping):
        paths = {name: layer.path for name, layer in layers.items()} | _some_paths(layers, paths)
    set_layer_paths(layers, paths_of(layers, paths))


def _some_paths(layers: Mapping[str, GLoRALayer], paths: Mapping[str, PathConfig]) -> Paths:
    """``paths`` of some of the ``layers``, by their names there. Raises ValueError for names unknown or given twice."""
    unknown = [name for name in paths if name_in(layers, name) not in layers]
    if unknown:
        raise ValueError(
            f"paths: expected names of adapted layers, unknown to the model are {listed(unknown)}; "
            "glora.get_paths(model) lists them"
        )
    named = {name_in(layers, name): path for name, path in paths.items()}
    if len(named) < len(paths):
        raise ValueError(
            f"paths: expected each layer once, got some with and without the names of wrappers: {listed(paths)}"
        )
    return named


def set_layer_paths(layers: Mapping[str, GLoRALayer], paths: Paths) -> None:
    """:func:`set_paths` of a model whose ``layers`` are known, with a path for each of them."""
    require_unused(layers.values())
    for name, layer in layers.items():
        try:
            layer.require_takes(paths[name])
        except (TypeError, ValueError) as error:
            raise type(error)(f"{error} (layer {name!r})") from None
    take_paths([(layer, paths[name]) for name, layer in layers.items()])


@contextmanager
def using_paths(model: nn.Module, paths: Mapping[str, PathConfig] | PathConfig) -> Iterator[nn.Module]:
    """Set paths for a ``with`` block, as :func:`set_paths` does, and restore the previous ones at its end.

    They are restored even if the block merges the model. A layer has one path for all threads, so only one thread (or
    asyncio task) at a time may be in such a block of a model. To serve several, hold a lock around the block, or give
    each a ``copy.deepcopy(model)``.

    Raises:
        ValueError, TypeError, RuntimeError: as :func:`set_paths`; RuntimeError also if another thread is in a block.
    """
    layers = require_layers(model)
    with _using(layers.values()):
        before = [(layer, layer.path) for layer in layers.values()]
        set_layer_paths(layers, paths_of(layers, paths))
        try:
            yield model
        finally:
            take_paths(before)


def disabled(model: nn.Module) -> AbstractContextManager[nn.Module]:
    """A ``with`` block in which every adapted layer computes ``W0 x + b0``, as before :func:`glora.inject`.

    Within it no support tensor is read; at its end the paths are as before (:func:`using_paths`). Heads that train in
    full, and statistics of norms, stay as they are trained.

    Raises:
        ValueError, RuntimeError: as :func:`using_paths`.

    Example:
        >>> with glora.disabled(model):
        ...     reference = model(x)
    """
    return using_paths(model, PathConfig())


def _user() -> tuple[int, asyncio.Task | None]:
    """Who is running: the thread, and the task where there is an event loop."""
    try:
        return threading.get_ident(), asyncio.current_task()
    except RuntimeError:
        return threading.get_ident(), None


@contextmanager
def _using(layers: Iterable[GLoRALayer]) -> Iterator[None]:
    """Keep other threads from changing the paths of ``layers``; blocks of one thread may be nested."""
    with _lock:
        require_unused(layers)
        taken = [layer for layer in layers if layer not in _users]
        _users.update(dict.fromkeys(taken, _user()))
    try:
        yield
    finally:
        with _lock:
            for layer in taken:
                del _users[layer]


def require_unused(layers: Iterable[GLoRALayer]) -> None:
    """Raise RuntimeError if another thread or task is within :func:`using_paths` of any of ``layers``."""
    if not _users:
        return
    user = _user()
    if any(_users.get(layer, user) != user for layer in layers):
        raise RuntimeError(
            "paths: expected one thread at a time to set the paths of a model, got one while another is within "
            "glora.using_paths; hold a lock around these blocks, or give each thread a copy.deepcopy(model)"
        )


def sample_paths(model: nn.Module, space: SearchSpace, generator: torch.Generator, limit: int | None = None) -> Paths:
    """A random path for every adapted layer; the model is not changed.

    Without ``limit`` the draw is that of a supernet's training: uniform, or by the space's ``shares``. With it the
    paths together read at most ``limit`` parameters (see :class:`glora.sampling.PathSampler`).

    Raises:
        ValueError: a rank of ``space`` above a layer's storage, or a limit no path meets.
    """
    require_type("generator", generator, (torch.Generator, type(None)), "a torch.Generator")
    return sampler_for(model, space, limit, training=limit is None).sample(generator)


def sampler_for(model: nn.Module, space: SearchSpace, limit: int | None = None, training: bool = False) -> PathSampler:
    """The sampler of :func:`sample_paths`, to be kept where many paths are drawn; ``training`` as for PathSampler."""
    layers = require_layers(model)
    require_type("space", space, SearchSpace, "a glora.SearchSpace")
    for name, layer in layers.items():
        if max(space.ranks) > layer.rank and any("lora" in getattr(space, slot) for slot in "ABC"):
            raise ValueError(f"space: expected ranks up to {layer.rank} (storage of layer {name!r}), got {space.ranks}")
    return PathSampler({name: layer.shape for name, layer in layers.items()}, space, limit, training)


def paths_of(layers: Mapping[str, object], paths: Mapping[str, PathConfig] | PathConfig) -> Paths:
    """``paths`` by the names and in the order of ``layers``; a single path is that of every layer.

    Raises:
        ValueError: names missing from or unknown to the model, which are listed, or one given twice, with and without
            the names of wrappers.
        TypeError: neither a path nor a mapping of them.
    """
    if isinstance(paths, PathConfig):
        return dict.fromkeys(layers, paths)
    expected = "a mapping of layer names to glora.PathConfig, or one for every layer"
    require_type("paths", paths, Mapping, expected)
    known = paths.keys() == layers.keys()
    named = paths if known else {name_in(layers, name): path for name, path in paths.items()}
    missing, unknown = [n for n in layers if n not in named], [n for n in named if n not in layers]
    if missing or unknown or len(named) != len(paths):
        raise ValueError(
            f"paths: expected exactly the {len(layers)} adapted layers of the model, each once; missing {missing}, "
            f"unknown {unknown}; to change some of them: glora.set_paths(model, paths, partial=True)"
        )
    for name, path in named.items():
        if not isinstance(path, PathConfig):
            raise TypeError(f"paths: expected glora.PathConfig for {name!r}, got {type(path).__name__}")
    return {name: named[name] for name in layers}
