"""Folders of PEFT's GLoRA as our adapters."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..config import KINDS
from ..distributed import require_whole
from ..injection import adapt
from ..layers.base import GLoRALayer, support_dtype
from ..models.contents import Slot, require_fit, require_same_layers, slots
from ..models.modules import glora_layers, require_real
from ..models.wrappers import modules_by_name, tensors_in, tensors_of
from ..paths import require_unused, set_paths
from ..scales import Scales
from .form import CONFIG, FIELDS, PREFIX, TENSORS, Form, read_parts


def import_peft(model: nn.Module, folder: str | os.PathLike) -> nn.Module:
    """Load a GLoRA adapter that PEFT (or :func:`export_peft`) wrote; a model without GLoRA gets it injected.

    Everything is checked before anything is changed. Modules that PEFT saved whole (``modules_to_save``) are
    loaded too, statistics and all, and in a plain model their parameters stay trainable, as PEFT means them. PEFT's
    storages hold only what is read; the rest of ours stays as it is.

    Args:
        model: the base model, as it was given to PEFT; or that model with GLoRA in exactly the adapter's layers,
            at a rank not below the adapter's.
        folder: the folder of one adapter.

    Returns:
        ``model`` itself, its paths set to the adapter's.

    Raises:
        FileNotFoundError: one of the two files is missing.
        ValueError: not a GLoRA adapter, damaged, with trained biases, or made for another model; what differs is
            listed. Values that are not finite, or not floating. A model whose parameters are sharded.
        TypeError: a layer that cannot be adapted (see :func:`glora.inject`).
    """
    require_whole(model)
    form, tensors = _read(Path(folder))
    require_real(model)
    require_unused(glora_layers(model).values())
    tensors = tensors_in(modules_by_name(model), tensors, Path(folder) / TENSORS)
    pattern = re.compile(r"(.+)\.glora_[A-E]\.(?:Xd|Xu|X|zeros)")
    found = (pattern.fullmatch(name) for name in tensors)
    names = list(dict.fromkeys(match[1] for match in found if match is not None))
    linears = _matching_layers(model, names, form, folder)
    _check_tensors(model, linears, tensors, form, folder)
    if not glora_layers(model):
        saved = {id(tensor) for name, tensor in tensors_of(model).items() if name in tensors}
        adapt(model, dict.fromkeys(linears.values(), form.rank), "hadamard", saved)
    _load(model, glora_layers(model), tensors, form)
    return model


def _read(folder: Path) -> tuple[Form, dict[str, Tensor]]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    for file in (CONFIG, TENSORS):
        if not (folder / file).is_file():
            raise FileNotFoundError(
                f"folder: expected a PEFT adapter with {CONFIG} and {TENSORS}, no {file} in {folder}"
            )
    try:
        tensors = load_file(folder / TENSORS)
    except SafetensorError as error:
        raise ValueError(f"{folder / TENSORS}: expected a safetensors file, it is damaged ({error})") from None
    strangers = [name for name in tensors if not name.startswith(PREFIX)]
    if strangers:
        raise ValueError(f"{folder / TENSORS}: expected names that start with {PREFIX!r}, got {strangers}")
    return _read_form(folder / CONFIG), {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}


def _read_form(file: Path) -> Form:
    try:
        config = json.loads(file.read_text())
        kind, bias, rank = config["peft_type"], config.get("bias", "none"), config["r"]
        kinds = {field: config[field] for field in FIELDS}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file}: expected the configuration of a GLoRA adapter ({error!r})") from None
    unknown = {field: kinds[field] for field, slot in FIELDS.items() if kinds[field] not in KINDS[slot]}
    if kind != "GLORA" or unknown or type(rank) is not int or rank < 1:
        raise ValueError(f"{file}: expected a GLORA adapter, got {kind!r} of r={rank!r}, unknown kinds {unknown}")
    if bias != "none":
        raise ValueError(f"{file}: expected bias 'none', got {bias!r}: PEFT trained biases of the base model")
    return Form(kinds, rank)


def _matching_layers(model: nn.Module, names: list[str], form: Form, folder: str | os.PathLike) -> dict[str, Any]:
    """The layers of the adapter, in the model. Raises ValueError if they are not there or do not fit."""
    layers = glora_layers(model)
    if not names:
        raise ValueError(f"{folder}: expected the tensors of a GLoRA adapter, got none")
    if not layers:
        modules = modules_by_name(model)
        unfit = [name for name in names if type(modules.get(name)) is not nn.Linear]
        if unfit:
            raise ValueError(f"{folder}: made for another model: expected an nn.Linear at {unfit}")
        return {name: modules[name] for name in names}
    require_same_layers(folder, layers, dict.fromkeys(names, form.rank), "hadamard")
    return dict(layers)


def _check_tensors(
    model: nn.Module,
    linears: Mapping[str, nn.Linear | GLoRALayer],
    tensors: Mapping[str, Tensor],
    form: Form,
    folder: str | os.PathLike,
) -> None:
    own = slots(model)
    expected = {
        f"{name}.{key}": Slot(
            shape, linear.Ad.dtype if isinstance(linear, GLoRALayer) else support_dtype(linear.weight)
        )
        for name, linear in linears.items()
        for key, shape in form.shapes(linear).items()
    }
    adapted = tuple(name + "." for name in linears)
    expected |= {name: own[name] for name in tensors if name in own and not name.startswith(adapted)}
    require_fit(folder, tensors, expected)
    odd = [name for name in expected if name.endswith(".zeros") and bool(tensors[name].any())]
    if odd:
        raise ValueError(f"{folder}: expected zeros for the kind none; not so: {odd}")


@torch.no_grad()
def _load(model: nn.Module, layers: Mapping[str, GLoRALayer], tensors: Mapping[str, Tensor], form: Form) -> None:
    paths = {name: form.path(layer.bias is not None) for name, layer in layers.items()}
    for name, layer in layers.items():
        layer.scales = Scales()
        for key, part in read_parts(layer, paths[name]).items():
            part.copy_(tensors[f"{name}.{key}"].reshape(part.shape))
    own = tensors_of(model)
    for name, tensor in tensors.items():
        if name in own:
            own[name].copy_(tensor)
    set_paths(model, paths)
