"""Our adapters as folders of PEFT's."""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..config import PathConfig, parse_choice
from ..distributed import require_whole
from ..files import require_new_folder
from ..layers.linear import GLoRALinear
from ..models.contents import check_written, warn_of_buffers
from ..models.modules import require_linear_layers
from .form import FIELDS, Form, read_parts
from .writing import FILES, require_names, saved_whole, write_adapter


def export_peft(model: nn.Module, folder: str | os.PathLike) -> None:
    """Write the adapter for ``peft.PeftModel.from_pretrained(base, folder)``, which then computes the same.

    Base weights are not written. Every other trained module (the classifier head) is written whole, as one of PEFT's
    ``modules_to_save``. So are norm layers with statistics, which training changes. Tensors of the kind *none* are
    written as zeros of their full size, as PEFT does: it warns if they are missing.

    Args:
        model: with GLoRA layers, all of one path that PEFT has too.
        folder: a new one, or one to replace that holds nothing but a former export; written atomically.

    Raises:
        ValueError: no GLoRA layer, or one that is not linear; what PEFT cannot express, with the layers and reasons
            (the matmul product, A and B or D and E of different kinds, ranks or paths that differ, C or E without a
            bias, which PEFT drops); trained tensors that PEFT could not save, or that this process does not hold
            whole; a folder that holds other files. Nothing is written then.

    Warns:
        UserWarning: statistics of norm layers and other buffers that PEFT cannot save; tensors that are not finite.
    """
    require_whole(model)
    require_new_folder("folder", folder, FILES)
    layers = require_linear_layers(model)
    require_names(layers)
    form = _common_form(layers)
    saved, tensors = saved_whole(model, layers)
    for name, layer in layers.items():
        tensors |= {f"{name}.{key}": tensor for key, tensor in _exported(layer, form).items()}
    check_written(tensors)
    warn_of_buffers(model, layers.values(), tuple(saved))
    write_adapter(model, layers, folder, {"peft_type": "GLORA", "r": form.rank, **form.kinds}, saved, tensors)


def _exported(layer: GLoRALinear, form: Form) -> dict[str, Tensor]:
    parts = read_parts(layer, form.path(layer.bias is not None))
    zeros = torch.zeros((), dtype=layer.Ad.dtype)
    return {
        name: parts[name].reshape(shape) if name in parts else zeros.expand(shape)
        for name, shape in form.shapes(layer).items()
    }


def _common_form(layers: Mapping[str, GLoRALinear]) -> Form:
    """The one form of all layers. Raises ValueError, listing the layers that do not fit one."""
    faults = {name: fault for name, layer in layers.items() if (fault := _fault(layer)) is not None}
    sound = {name: layer for name, layer in layers.items() if name not in faults}
    kinds: dict[str, str] = {}
    for field, slot in FIELDS.items():
        texts = {n: getattr(layer.path, slot) for n, layer in sound.items() if slot == "A" or layer.bias is not None}
        first = next(iter(texts), None)
        kinds[field] = "none" if first is None else parse_choice(slot, texts[first]).kind
        for name, text in texts.items():
            if first is not None and text != texts[first]:
                faults.setdefault(name, f"{slot} is {text}, that of {first} is {texts[first]}")
    if faults:
        listed = "; ".join(f"{name}: {fault}" for name, fault in faults.items())
        raise ValueError(
            f"model: expected paths that PEFT's GLoRA can express, not so in {len(faults)} layers: {listed}"
        )
    rank = max(_effective(layer).rank for layer in layers.values())
    return Form(kinds, rank or max(layer.rank for layer in layers.values()))


def _effective(layer: GLoRALinear) -> PathConfig:
    """The layer's path without what has no effect: D where there is no bias."""
    path = layer.path
    return path if layer.bias is not None else PathConfig(path.A, path.B, path.C, E=path.E)


def _fault(layer: GLoRALinear) -> str | None:
    """Why PEFT has no such layer; None if it has one."""
    path = _effective(layer)
    if not layer.merges_exactly:
        return "a quantised base"
    if layer.product != "hadamard" and path.A != "none":
        return f"the {layer.product} product"
    if layer.bias is None and (path.C, path.E) != ("none", "none"):
        return f"no bias, and C is {path.C}, E is {path.E}"
    for one, other in ("AB", "DE"):
        if getattr(path, one) != getattr(path, other) and not (one == "D" and layer.bias is None):
            return f"{one} is {getattr(path, one)}, {other} is {getattr(path, other)}"
    ranks = {choice.rank for choice in path.choices.values() if choice.rank}
    return f"ranks {sorted(ranks)}" if len(ranks) > 1 else None
