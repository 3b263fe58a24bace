"""Adapters on disk: safetensors, with versioned JSON metadata, written atomically.

The file holds the support tensors of every adapted layer under their names in the model (``blocks.0.attn.qkv.Ad``),
every other trainable parameter (the classifier head), and the buffers outside the adapted layers that training may have
changed although they are not trained (the statistics of batch norm). Names are those of the model without
wrappers (``models/wrappers.py``). The header entry ``glora`` holds a JSON object: format, product, for each layer its
rank and path, and for each parameter that the file does not hold a checksum of some of its values. Files of format 1
had no buffers and no checksums. A compact file (format 3) holds of each support tensor what the path reads alone: of a
low rank r its columns ``(N, r)`` and rows ``(r, K)``, of a vector its values ``(N,)``, of a constant one number ``()``,
with the scales of kinds multiplied in. A whole file has the scales in its description; if they are not 1, it is of
format 4.
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

from ..arguments import PATH, listed, require_type
from ..config import PathConfig
from ..distributed import require_whole
from ..files import checksum, parts, require_file, write_atomically
from ..injection import adapt
from ..layers.adapters import adapters
from ..layers.base import SUPPORT_NAMES, GLoRALayer, parts_read, support_dtype, support_shapes
from ..models.contents import Slot, buffers_beside, check_written, require_fit, require_same_layers, slots, statistics
from ..models.modules import glora_layers, require_layers, require_real
from ..models.wrappers import modules_by_name, name_in, named_parameters, tensors_in, tensors_of
from ..parameters import support_ids, trained_beside
from ..paths import Paths, require_unused, set_paths
from ..scales import Scales

ADAPTER = "adapter.safetensors"  # in a checkpoint folder of transformers.Trainer (glora.trainer)
FORMAT, COMPACT, SCALED = 2, 3, 4
READABLE = (1, 2, 3, 4)


def save_adapter(model: nn.Module, file: str | os.PathLike, *, compact: bool = False) -> None:
    """Write the support tensors, the paths, every other trainable parameter and the buffers of ``model``.

    Every rank of a run may call it with the same ``file``.

    Args:
        compact: write only what the paths read. The file of one winner is as small as a LoRA adapter; a supernet that
            goes on training or searching needs the whole storages.

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
    marks = _marks(model, tensors)
    if compact:
        tensors = _without_support(tensors, layers) | _parts_read(layers)
    ranks = {name: max(1, layer.path.rank) if compact else layer.rank for name, layer in layers.items()}
    scales = {name: layer.scales.to_dict() for name, layer in layers.items() if layer.scales.factors and not compact}
    description = {
        "format": COMPACT if compact else SCALED if scales else FORMAT,
        "product": products[0],
        "base": marks,
        "layers": {name: {"rank": ranks[name], "path": layer.path.to_dict()} for name, layer in layers.items()},
        **({"scales": scales} if scales else {}),
    }
    copies = {name: tensor.detach().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
    content = save(copies, metadata={"glora": json.dumps(description)})
    write_atomically(file, lambda stream: stream.write(content))


def _without_support(tensors: Mapping[str, Tensor], layers: Mapping[str, GLoRALayer]) -> dict[str, Tensor]:
    support = {f"{name}.{own}" for name in layers for own in SUPPORT_NAMES}
    return {name: tensor for name, tensor in tensors.items() if name not in support}


def _parts_read(layers: Mapping[str, GLoRALayer], paths: Paths | None = None) -> dict[str, Tensor]:
    """What ``paths`` (default: the current ones) read, by the names of the storages: views where scales are 1."""
    return {
        f"{name}.{own}": part
        for name, layer in layers.items()
        for own, part in layer.parts_read(None if paths is None else paths[name]).items()
    }


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
    A compact file also fits a model with larger ranks, of whose storages the rest stays as it is; loading another such
    file switches the adapter.

    Returns:
        ``model`` itself.

    Raises:
        FileNotFoundError: there is no such file, or it is a folder.
        ValueError: not an adapter file, damaged, of a later format, or made for another model; the
            names and shapes that differ are listed. Values that are not finite, or would not be in the dtype of the
            model's tensor; integers where that is floating, and the like. A model whose parameters are sharded.
        TypeError: ``file`` is no path; a plain ``model`` within data parallelism or of PEFT, or a layer that cannot be
            replaced; see :func:`glora.inject`.

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
    for name, layer in glora_layers(model).items():
        layer.scales = description.scales.get(name, Scales())
    targets = tensors_of(model)
    if description.compact:
        targets |= _parts_read(glora_layers(model), description.paths)
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

    Layers that are not in ``scales`` have none but 1.

    Attributes:
        complete: whether it holds all statistics, as files from format 2 on do.
        base: marks of the parameters that it does not hold, by name; empty for older files and other formats.
        compact: whether it holds only what the paths read.
    """

    product: str
    ranks: dict[str, int]
    paths: Paths | None
    complete: bool = False
    base: Mapping[str, str] = MappingProxyType({})
    compact: bool = False
    scales: Mapping[str, Scales] = MappingProxyType({})

    def named_as_in(self, modules: Container[str]) -> Description:
        """This description with the layers' names in a model of these ``modules``."""
        ranks = {name_in(modules, name): rank for name, rank in self.ranks.items()}
        paths = None if self.paths is None else {name_in(modules, name): path for name, path in self.paths.items()}
        scales = {name_in(modules, name): scale for name, scale in self.scales.items()}
        return self._replace(ranks=ranks, paths=paths, scales=scales)


def _read(file: str | os.PathLike) -> tuple[Description, dict[str, Tensor]]:
    from safetensors import SafetensorError, safe_open

    require_type("file", file, PATH, "the path of a file")
    within = os.path.join(file, ADAPTER)
    if os.path.isfile(within):
        raise FileNotFoundError(f"file: expected an adapter file, got the folder of one: pass {within!r}")
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
        raise ValueError(f"{file}: expected adapter format 1 to {SCALED}, got {version!r}; a newer glora may read it")
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
    scales = {name: Scales.from_dict(factors) for name, factors in content.get("scales", {}).items()}
    if not scales.keys() <= ranks.keys():
        raise ValueError(f"scales of {list(scales)} for layers {list(ranks)}")
    version = content["format"]
    return Description(content["product"], ranks, paths, version > 1, base, version == COMPACT, scales)


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
        require_same_layers(file, layers, ranks, product, exactly=not description.compact)
    else:
        modules = modules_by_name(model)
        kinds = adapters()
        # the model itself cannot be replaced
        unfit = sorted(name for name in ranks if not name or type(modules.get(name)) not in kinds)
        if unfit:
            raise ValueError(f"{file}: made for another model: expected layers that GLoRA adapts at {unfit}")
        own.update(_support_slots(modules, ranks, product))
    support = {f"{name}.{s}" for name in ranks for s in SUPPORT_NAMES}
    needed = set(support)
    if layers:  # a plain model's parameters all require grad: only an adapted one says what is trained
        needed |= {name for name, p in named_parameters(model) if p.requires_grad}
    if description.complete:
        needed |= set(statistics(model))
    if description.compact:
        parts = _part_slots(model, own, description)
        own = {name: slot for name, slot in own.items() if name not in support} | parts
        needed = (needed - support) | set(parts)
    return {name: slot for name, slot in own.items() if name in needed or name in tensors}


def _part_slots(model: nn.Module, own: Mapping[str, Slot], description: Description) -> dict[str, Slot]:
    """The slots of what the paths read, among ``own`` slots of whole storages."""
    assert description.paths is not None
    modules: dict[str, Any] = modules_by_name(model)
    slots = {}
    for name, path in description.paths.items():
        whole = {part: own[f"{name}.{part}"] for part in SUPPORT_NAMES}
        storages = {part: torch.empty(slot.shape, dtype=slot.dtype, device="meta") for part, slot in whole.items()}
        for part, read in parts_read(storages, path, modules[name].bias is not None).items():
            slots[f"{name}.{part}"] = Slot(tuple(read.shape), read.dtype)
    return slots


def _support_slots(modules: dict[str, Any], ranks: dict[str, int], product: str) -> dict[str, Slot]:
    """The slots of the support tensors that injecting into these layers would make."""
    kinds = adapters()
    slots = {}
    for name, rank in ranks.items():
        features, dtype = kinds[type(modules[name])].features(modules[name]), support_dtype(modules[name].weight)
        shapes = support_shapes(features, rank, product)
        slots.update({f"{name}.{part}": Slot(shape, dtype) for part, shape in shapes.items()})
    return slots
