"""Adapters and search results of the official code (Arnav0400/ViT-Slim, folder GLoRA).

Its ``save`` writes a dict of tensors with ``torch.save``, under their names in the model: for every layer Ad (N, R),
Au (R, K), Bd (N, R), Bu (R, K), Cd (K, R), Cu (R, 1), D (N,) and E (N,), which are the names and shapes of
:class:`glora.GLoRALinear` in the hadamard product, and the classifier head. Which path a layer takes is not in that
file: the search has it, a dict such as ``{"A": "LoRA_4", "B": "vector", ...}`` for each layer, in the model's order.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ..config import PathConfig
from ..distributed import require_whole
from ..files import require_file, write_atomically
from ..layers.base import SUPPORT_NAMES
from ..layers.linear import GLoRALinear
from ..models.contents import check_written, warn_of_buffers
from ..models.modules import glora_layers, require_layers, require_linear_layers
from ..models.wrappers import modules_by_name, named_modules, named_parameters, tensors_in
from ..parameters import support_ids, trained_beside
from ..paths import Paths
from .adapter_file import Description, apply_adapter

# The official code saves and loads each parameter whose name contains one of these.
_OFFICIAL_MARKS = ("A", "B", "C", "D", "E", "head")


def load_official(
    model: nn.Module, file: str | os.PathLike, configurations: Sequence[Mapping[str, str]] | None = None
) -> nn.Module:
    """Load what the official ``save`` or :func:`save_official` wrote; a model without GLoRA gets it injected.

    Everything is checked before anything is changed.

    Args:
        configurations: as for :func:`official_paths`; None leaves the paths of an adapted model as they are, and those
            of a plain one as :func:`glora.inject` sets them, every tensor at its largest, with a warning.

    Returns:
        ``model`` itself.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: no official file, damaged, or made for another model (the names and shapes that differ are
            listed), or with values that are not finite, or not floating; configurations that do not fit.
        TypeError: configurations that are no sequence of dicts; a layer that cannot be replaced, see
            :func:`glora.inject`.
    """
    modules = modules_by_name(model)
    tensors = tensors_in(modules, _read(file), file)
    ranks = _ranks(tensors, file)
    paths = None
    if configurations is not None:
        order = {name: i for i, name in enumerate(modules)}
        paths = _in_order(sorted(ranks, key=lambda name: order.get(name, len(order))), configurations)
        for i, (name, path) in enumerate(paths.items()):
            if path.rank > ranks[name]:
                raise ValueError(f"configurations[{i}]: expected ranks up to {ranks[name]} (of {file}), got {path}")
    plain = not glora_layers(model)
    apply_adapter(model, Description("hadamard", ranks, paths), tensors, file)
    if plain and paths is None:
        warnings.warn(
            f"load_official: {file} holds no paths, every tensor is read at its largest; give configurations of the "
            "search, or call glora.set_paths",
            stacklevel=2,
        )
    return model


def save_official(model: nn.Module, file: str | os.PathLike) -> None:
    """Write the support tensors and every other trained parameter so that the official ``load`` finds what it asks for.

    That code adapts every linear layer but the head, all with one rank; :func:`official_paths` has the paths. It knows
    no scales (:class:`glora.Scales`): they are multiplied into what the current paths read, and the file is for these
    paths.

    Raises:
        ValueError: no adapted layer, one that is not linear, another product than hadamard, several ranks, or other
            layers adapted than the official code adapts; parameters that this process does not hold whole; a ``file``
            in no folder, or that is no regular file. Nothing is written then.

    Warns:
        UserWarning: statistics of norm layers and other buffers, which the format has no place for; parameters that
            are not finite.
    """
    require_whole(model)
    require_file("file", file)
    layers = require_linear_layers(model)
    unfit = [name for name, layer in layers.items() if layer.product != "hadamard"]
    if unfit:
        raise ValueError(f"model: expected the hadamard product, as in the official code, got matmul in {unfit}")
    ranks = sorted({layer.rank for layer in layers.values()})
    if len(ranks) != 1:
        raise ValueError(f"model: expected one rank, as in the official code, got {ranks}")
    differing = [
        name
        for name, module in named_modules(model)
        if isinstance(module, nn.Linear | GLoRALinear) and isinstance(module, GLoRALinear) != _officially_adapted(name)
    ]
    if differing:
        raise ValueError(
            "model: expected exactly the linear layers adapted whose last name has no 'head' in it, as in the "
            f"official code; otherwise are {differing}"
        )
    written = support_ids(layers) | trained_beside(model, layers)
    chosen = {
        name: p
        for name, p in named_parameters(model)
        if id(p) in written or any(mark in name for mark in _OFFICIAL_MARKS)
    }
    check_written(chosen)
    warn_of_buffers(model, layers.values())
    folded = {f"{name}.{own}": tensor for name, layer in layers.items() for own, tensor in layer.folded().items()}
    tensors = {name: folded.get(name, p).detach().cpu().clone() for name, p in chosen.items()}
    write_atomically(file, lambda stream: torch.save(tensors, stream))


def official_paths(model: nn.Module, configurations: Sequence[Mapping[str, str]]) -> Paths:
    """The official search's choice of kinds as paths by name, for :func:`glora.set_paths`; the model is not changed.

    Args:
        configurations: one dict for each adapted layer, in the order of ``model.named_modules()``: a candidate of the
            official search (``torch.load(checkpoint, weights_only=True)["keep_top_k"][50][0]`` is its best).

    Raises:
        ValueError: no adapted layer, another number of configurations than of layers, or a kind that its tensor
            does not have.
        TypeError: not a sequence of dicts of strings.
    """
    return _in_order(list(require_layers(model)), configurations)


def _in_order(names: list[str], configurations: Sequence[Mapping[str, str]]) -> Paths:
    if isinstance(configurations, str) or not isinstance(configurations, Sequence):
        raise TypeError(f"configurations: expected a sequence of dicts, got {type(configurations).__name__}")
    if len(configurations) != len(names):
        raise ValueError(
            f"configurations: expected one for each of the {len(names)} adapted layers, got {len(configurations)}"
        )
    return {name: _path(i, configuration) for i, (name, configuration) in enumerate(zip(names, configurations))}


def _path(index: int, configuration: Mapping[str, str]) -> PathConfig:
    if not isinstance(configuration, Mapping):
        raise TypeError(f"configurations[{index}]: expected a dict, got {type(configuration).__name__}")
    try:
        return PathConfig.from_dict(configuration)
    except (TypeError, ValueError) as error:
        raise type(error)(f"configurations[{index}]: {error}") from None


def _officially_adapted(name: str) -> bool:
    """Whether the official ``set_glora`` adapts the layer ``name``."""
    return "head" not in name.rpartition(".")[2]


def _read(file: str | os.PathLike) -> dict[str, Tensor]:
    if not os.path.isfile(file):
        raise FileNotFoundError(f"file: expected an official GLoRA file, found none at {os.fspath(file)!r}")
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(
            f"{file}: expected an official GLoRA file, it is damaged or something else ({error})"
        ) from None
    entries = content.items() if isinstance(content, Mapping) else [(None, content)]
    if not all(isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in entries):
        raise ValueError(f"{file}: expected an official GLoRA file, a dict of tensors by name, got something else")
    return dict(entries)


def _ranks(tensors: dict[str, Tensor], file: str | os.PathLike) -> dict[str, int]:
    """The columns of Ad for every layer that has one."""
    found = {name.rpartition(".")[0]: tensor for name, tensor in tensors.items() if name.rpartition(".")[2] == "Ad"}
    ranks = {name: Ad.shape[1] for name, Ad in found.items() if Ad.ndim == 2 and Ad.shape[1]}
    if not ranks or len(ranks) != len(found):
        raise ValueError(
            f"{file}: expected an official GLoRA file, with {list(SUPPORT_NAMES)} for each layer; "
            f"got {len(tensors)} tensors, with an Ad of two dimensions in {sorted(ranks)}"
        )
    return ranks
