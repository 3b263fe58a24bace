"""Adapters on disk: safetensors, with versioned JSON metadata, written atomically.

The file holds the support tensors of every adapted layer under their names in the model
(``blocks.0.attn.qkv.Ad``), and every other trainable parameter (the classifier head). The header
entry ``glora`` holds a JSON object: format (1), product, and for each layer its rank and path.
"""

from __future__ import annotations

import json
import os
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from glora_kernels.terms import PRODUCTS

from .adapters import adapters
from .config import PathConfig
from .distributed import require_whole
from .files import write_atomically
from .injection import adapt
from .layer import SUPPORT_NAMES, GLoRALayer, support_shapes
from .modules import glora_layers, require_layers, require_real
from .parameters import trainable_parameters
from .paths import Paths, set_paths

FORMAT = 1


def save_adapter(model: nn.Module, file: str | os.PathLike) -> None:
    """Write the support tensors, the paths and every other trainable parameter of ``model``.

    Raises:
        ValueError: ``model`` has no adapted layer, or its parameters are sharded.
    """
    from safetensors.torch import save

    require_whole(model)
    layers = require_layers(model)
    support = {id(p) for layer in layers.values() for p in layer.support_parameters()}
    trained = {id(p) for p in trainable_parameters(model)} | support
    tensors = {name: p.detach().contiguous() for name, p in model.named_parameters() if id(p) in trained}
    description = {
        "format": FORMAT,
        "product": next(iter(layers.values())).product,
        "layers": {name: {"rank": layer.rank, "path": layer.path.to_dict()} for name, layer in layers.items()},
    }
    content = save(tensors, metadata={"glora": json.dumps(description)})
    write_atomically(file, lambda stream: stream.write(content))


def load_adapter(model: nn.Module, file: str | os.PathLike) -> nn.Module:
    """Load what :func:`save_adapter` wrote, paths included; a model without GLoRA gets it injected.

    Everything is checked before anything is changed.

    Returns:
        ``model`` itself.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: not an adapter file, damaged, of a later format, or made for another model; the
            names and shapes that differ are listed. A model whose parameters are sharded.
    """
    description, tensors = _read(file)
    return apply_adapter(model, description, tensors, file)


def apply_adapter(
    model: nn.Module, description: Description, tensors: dict[str, Tensor], file: str | os.PathLike
) -> nn.Module:
    """Put ``tensors``, of every adapted layer and of whatever else was trained, into ``model``; check all of it first.

    Raises:
        ValueError: as :func:`load_adapter`, for a description that is right in itself.
    """
    require_real(model)
    require_whole(model)
    layers = glora_layers(model)
    expected = _expected_shapes(model, layers, description, tensors, file)
    _check_tensors(expected, tensors, file)
    if not layers:
        modules = [model.get_submodule(name) for name in description.ranks]
        kept = {id(p) for name, p in model.named_parameters() if name in tensors}
        adapt(model, modules, next(iter(description.ranks.values())), description.product, kept)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, tensor in tensors.items():
            parameters[name].copy_(tensor)
    if description.paths is not None:
        set_paths(model, description.paths)
    return model


class Description(NamedTuple):
    """What a file says of its layers: their product, and by name their rank and path (None: it says none)."""

    product: str
    ranks: dict[str, int]
    paths: Paths | None


def _read(file: str | os.PathLike) -> tuple[Description, dict[str, Tensor]]:
    from safetensors import SafetensorError, safe_open

    if not os.path.isfile(file):
        raise FileNotFoundError(f"file: expected an adapter file, found none at {os.fspath(file)!r}")
    try:
        with safe_open(file, framework="pt") as opened:
            header = opened.metadata() or {}
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}
        content = json.loads(header["glora"])
        version = content["format"]
    except SafetensorError as error:
        raise ValueError(f"{file}: expected a safetensors file, it is damaged or something else ({error})") from None
    except (KeyError, TypeError, json.JSONDecodeError):
        raise ValueError(f"{file}: expected a GLoRA adapter, got a safetensors file without its description") from None
    if version != FORMAT:
        raise ValueError(f"{file}: expected adapter format {FORMAT}, got {version!r}; a newer glora may read it")
    try:
        return _parse(content), tensors
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file}: expected a GLoRA adapter, its description is damaged ({error!r})") from None


def _parse(content: dict[str, Any]) -> Description:
    ranks = {name: entry["rank"] for name, entry in content["layers"].items()}
    paths = {name: PathConfig.from_dict(entry["path"]) for name, entry in content["layers"].items()}
    if not ranks or content["product"] not in PRODUCTS:
        raise ValueError(f"layers {list(ranks)}, product {content['product']!r}")
    for name, rank in ranks.items():
        if not isinstance(rank, int) or not 1 <= max(rank, paths[name].rank) <= rank:
            raise ValueError(f"layer {name!r} of rank {rank!r} with {paths[name]}")
    return Description(content["product"], ranks, paths)


def _expected_shapes(
    model: nn.Module,
    layers: dict[str, GLoRALayer],
    description: Description,
    tensors: dict[str, Tensor],
    file: str | os.PathLike,
) -> dict[str, tuple[int, ...]]:
    """Names and shapes that the file must have to fit ``model``; raises if the layers differ."""
    ranks, product = description.ranks, description.product
    own = {name: tuple(p.shape) for name, p in model.named_parameters()}
    if layers:
        missing, unknown = sorted(set(layers) - set(ranks)), sorted(set(ranks) - set(layers))
        differing = [
            f"{name}: rank {layer.rank} {layer.product} in the model, {ranks[name]} {product} in the file"
            for name, layer in layers.items()
            if name in ranks and (layer.rank, layer.product) != (ranks[name], product)
        ]
        if missing or unknown or differing:
            raise ValueError(
                f"{file}: expected the adapted layers of the model; missing {missing}, unknown {unknown}, "
                f"differing {differing}"
            )
    else:
        modules = dict(model.named_modules())
        kinds = adapters()
        # the model itself cannot be replaced
        unfit = sorted(name for name in ranks if not name or type(modules.get(name)) not in kinds)
        if unfit:
            raise ValueError(f"{file}: made for another model: expected layers that GLoRA adapts at {unfit}")
        if len(set(ranks.values())) != 1:
            raise ValueError(f"{file}: layers of ranks {sorted(set(ranks.values()))}; inject each rank before loading")
        own.update(_support_shapes(modules, ranks, product))
    needed = {f"{name}.{s}" for name in ranks for s in SUPPORT_NAMES}
    if layers:  # a plain model's parameters all require grad: only an adapted one says what is trained
        needed |= {name for name, p in model.named_parameters() if p.requires_grad}
    return {name: shape for name, shape in own.items() if name in needed or name in tensors}


def _support_shapes(modules: dict[str, Any], ranks: dict[str, int], product: str) -> dict[str, tuple[int, ...]]:
    """What injecting into these layers would make."""
    kinds = adapters()
    shapes = {}
    for name, rank in ranks.items():
        features = kinds[type(modules[name])].features(modules[name])
        shapes.update({f"{name}.{part}": shape for part, shape in support_shapes(features, rank, product).items()})
    return shapes


def _check_tensors(expected: dict[str, tuple[int, ...]], tensors: dict[str, Tensor], file: str | os.PathLike) -> None:
    missing, unknown = sorted(set(expected) - set(tensors)), sorted(set(tensors) - set(expected))
    differing = [
        f"{name}: {shape} in the model, {tuple(tensors[name].shape)} in the file"
        for name, shape in expected.items()
        if name in tensors and tuple(tensors[name].shape) != shape
    ]
    if missing or unknown or differing:
        raise ValueError(
            f"{file}: made for another model: missing tensors {missing}, unknown tensors {unknown}, "
            f"shapes that differ {differing}"
        )
