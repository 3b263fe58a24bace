"""Adapters on disk: safetensors, with versioned JSON metadata, written atomically.

The file holds the support tensors of every adapted layer under their names in the model (``blocks.0.attn.qkv.Ad``),
every other trainable parameter (the classifier head), and the buffers outside the adapted layers that training may have
changed although they are not trained (the statistics of batch norm). Names are those of the model without
wrappers (``models/wrappers.py``). The header entry ``glora`` holds a JSON object: format, product, for each layer its
rank and path, and for each parameter that the file does not hold a checksum of some of its values. Files of format 1
had no buffers and no checksums.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Container, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from glora_kernels.terms import PRODUCTS

from ..arguments import listed
from ..config import PathConfig
from ..distributed import require_whole
from ..files import checksum, parts, require_file, write_atomically
from ..injection import adapt
from ..layers.adapters import adapters
from ..layers.base import SUPPORT_NAMES, GLoRALayer, support_dtype, support_shapes
from ..models.contents import Slot, buffers_beside, check_written, require_fit, require_same_layers, slots, statistics
from ..models.modules import glora_layers, require_layers, require_real
from ..models.wrappers import modules_by_name, name_in, named_parameters, tensors_in, tensors_of
from ..parameters import support_ids, trained_beside
from ..paths import Paths, require_unused, set_paths

FORMAT = 2
READABLE = (1, 2)


def save_adapter(model: nn.Module, file: str | os.PathLike) -> None:
    """Write the support tensors, the paths, every other trainable parameter and the buffers of ``model``.

    Every rank of a run may call it with the same ``file``.

    Raises:
        ValueError: ``model`` has no adapted layer, or layers of both products, or parameters that this process does
            not hold whole; a ``file`` in no folder, or that is no regular file. Nothing is written then.

    Warns:
        UserWarning: parameters that are not finite; buffers that safetensors cannot hold, and are left out.
    """
    from safetensors.torch import save

    require_whole(model)
    require_file("file", file)
    layers = require_layers(model)
    products = sorted({layer.product for layer in layers.values()})
    if len(products) > 1:
        raise ValueError(f"model: expected layers of one product, which is all that the file can hold, got {products}")
    trained = support_ids(layers) | trained_beside(model, layers)
    tensors: dict[str, Tensor] = {name: p for name, p in named_parameters(model) if id(p) in trained}
    check_written(tensors)
    buffers = buffers_beside(model, layers.values())
    unstorable = [name for name, buffer in buffers.items() if not _storable(buffer)]
    if unstorable:
        warnings.warn(f"buffers that safetensors cannot hold are left out: {listed(unstorable)}", stacklevel=2)
    tensors |= {name: buffer for name, buffer in buffers.items() if name not in unstorable}
    description = {
        "format": FORMAT,
        "product": products[0],
        "base": _marks(model, tensors),
        "layers": {name: {"rank": layer.rank, "path": layer.path.to_dict()} for name, layer in layers.items()},
    }
    copies = {name: tensor.detach().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
    content = save(copies, metadata={"glora": json.dumps(description)})
    write_atomically(file, lambda stream: stream.write(content))


def _marks(model: nn.Module, but: Container[str] = ()) -> dict[str, str]:
    """A dtype and checksum per parameter not in ``but``. The checksum covers a few evenly spaced values."""
    marks = {}
    for name, parameter in named_parameters(model):
        if name not in but:
            samples = [_spaced(part) for part in parts(parameter.detach())]
            marks[name] = f"{parameter.dtype}:{checksum(samples):08x}"
    return marks


def _spaced(tensor: Tensor, most: int = 256) -> Tensor:
    flat = tensor.reshape(-1)
    return flat[:: max(1, len(flat) // most)]


def _storable(buffer: Tensor) -> bool:
    return buffer.layout == torch.strided and not buffer.is_quantized and buffer.dtype != torch.complex128


def load_adapter(model: nn.Module, file: str | os.PathLike) -> nn.Module:
    """Load what :func:`save_adapter` wrote, paths included; a model without GLoRA gets it injected.

    Both models may be within ``torch.compile`` or another wrapper. Everything is checked before anything is changed.

    Returns:
        ``model`` itself.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: not an adapter file, damaged, of a later format, or made for another model; the
            names and shapes that differ are listed. Values that are not finite, or would not be in the dtype of the
            model's tensor; integers where that is floating, and the like. A model whose parameters are sharded.
        TypeError: a plain ``model`` within data parallelism or of PEFT, or a layer that cannot be replaced; see
            :func:`glora.inject`.

    Warns:
        UserWarning: the file holds nothing for norm statistics (format 1), or for other persistent buffers; the frozen
            parameters of the model, of the same dtype, are not those that it was saved with.
    """
    description, tensors = _read(file)
    return apply_adapter(model, description, tensors, file)


def apply_adapter(
    model: nn.Module, description: Description, tensors: dict[str, Tensor], file: str | os.PathLike
) -> nn.Module:
    """Put ``tensors``, of every adapted layer and of whatever else was trained, into ``model``; check all of it first.

    Raises:
        ValueError, TypeError: as :func:`load_adapter`, for a description that is valid in itself.
    """
    require_real(model)
    require_whole(model)
    modules = modules_by_name(model)
    description, tensors = description.named_as_in(modules), tensors_in(modules, tensors, file)
    layers = glora_layers(model)
    require_unused(layers.values())
    require_fit(file, tensors, _expected(model, layers, description, tensors, file))
    _warn_of_buffers(model, description, tensors, file)
    _warn_of_another_base(model, description, file)
    if not layers:
        chosen = {modules[name]: rank for name, rank in description.ranks.items()}
        kept = {id(tensor) for name, tensor in tensors_of(model).items() if name in tensors}
        adapt(model, chosen, description.product, kept)
    targets = tensors_of(model)
    with torch.no_grad():
        for name, tensor in tensors.items():
            targets[name].copy_(tensor)
    if description.paths is not None:
        set_paths(model, description.paths)
    return model


def _warn_of_another_base(model: nn.Module, description: Description, file: str | os.PathLike) -> None:
    """Warn of frozen tensors that were others when the file was saved, such as a head that was trained before."""
    own = _marks(model) if description.base else {}
    differing = [
        name
        for name, mark in description.base.items()
        if name in own and own[name] != mark and own[name].partition(":")[0] == mark.partition(":")[0]
    ]
    if differing:
        warnings.warn(
            f"{file} was saved with another base: {listed(differing)} differ in the model, whose outputs are not those "
            "of the model that was saved",
            stacklevel=4,
        )


def _warn_of_buffers(
    model: nn.Module, description: Description, tensors: Mapping[str, Tensor], file: str | os.PathLike
) -> None:
    """Warn of buffers that the file should hold but does not; for format 1, only of norm statistics."""
    asked = buffers_beside(model, ()) if description.complete else statistics(model)
    adapted = tuple(f"{name}." for name in description.ranks)
    absent = [name for name in asked if name not in tensors and not name.startswith(adapted)]
    if absent:
        warnings.warn(
            f"{file} holds nothing for the buffers {listed(absent)}: they stay as they are, and where training changed "
            "them the outputs are not those of the trained model",
            stacklevel=4,
        )


class Description(NamedTuple):
    """What a file says of its layers: product; rank and path by layer (``paths`` is None if none are given).

    Attributes:
        complete: whether it holds all statistics, as files from format 2 on do.
        base: marks of the parameters that it does not hold, by name; empty for older files and other formats.
    """

    product: str
    ranks: dict[str, int]
    paths: Paths | None
    complete: bool = False
    base: Mapping[str, str] = MappingProxyType({})

    def named_as_in(self, modules: Container[str]) -> Description:
        """This description with the layers' names in a model of these ``modules``."""
        ranks = {name_in(modules, name): rank for name, rank in self.ranks.items()}
        paths = None if self.paths is None else {name_in(modules, name): path for name, path in self.paths.items()}
        return self._replace(ranks=ranks, paths=paths)


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
    if version not in READABLE:
        raise ValueError(f"{file}: expected adapter format 1 or {FORMAT}, got {version!r}; a newer glora may read it")
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
    base = {str(name): str(mark) for name, mark in content.get("base", {}).items()}
    return Description(content["product"], ranks, paths, complete=content["format"] > 1, base=base)


def _expected(
    model: nn.Module,
    layers: dict[str, GLoRALayer],
    description: Description,
    tensors: dict[str, Tensor],
    file: str | os.PathLike,
) -> dict[str, Slot]:
    """What the file must have to fit ``model``; raises if the layers differ."""
    ranks, product = description.ranks, description.product
    own = slots(model)
    if layers:
        require_same_layers(file, layers, ranks, product, exactly=True)
    else:
        modules = modules_by_name(model)
        kinds = adapters()
        # the model itself cannot be replaced
        unfit = sorted(name for name in ranks if not name or type(modules.get(name)) not in kinds)
        if unfit:
            raise ValueError(f"{file}: made for another model: expected layers that GLoRA adapts at {unfit}")
        own.update(_support_slots(modules, ranks, product))
    needed = {f"{name}.{s}" for name in ranks for s in SUPPORT_NAMES}
    if layers:  # a plain model's parameters all require grad: only an adapted one says what is trained
        needed |= {name for name, p in named_parameters(model) if p.requires_grad}
    if description.complete:
        needed |= set(statistics(model))
    return {name: slot for name, slot in own.items() if name in needed or name in tensors}


def _support_slots(modules: dict[str, Any], ranks: dict[str, int], product: str) -> dict[str, Slot]:
    """The slots of the support tensors that injecting into these layers would make."""
    kinds = adapters()
    slots = {}
    for name, rank in ranks.items():
        features, dtype = kinds[type(modules[name])].features(modules[name]), support_dtype(modules[name].weight)
        shapes = support_shapes(features, rank, product)
        slots.update({f"{name}.{part}": Slot(shape, dtype) for part, shape in shapes.items()})
    return slots
