"""Our adapters as folders of PEFT's."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from ..config import PathConfig, parse_choice
from ..distributed import require_whole
from ..files import require_new_folder, write_folder_atomically
from ..layers.linear import GLoRALinear
from ..models.contents import check_written, statistics, warn_of_buffers
from ..models.modules import require_linear_layers
from ..models.wrappers import modules_by_name, named_modules, named_parameters, tensors_of
from ..parameters import support_ids, trained_beside
from .form import CONFIG, FIELDS, PREFIX, TENSORS, Form, read_parts

FILES = (TENSORS, CONFIG)


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
    from safetensors.torch import save

    require_whole(model)
    require_new_folder("folder", folder, FILES)
    layers = require_linear_layers(model)
    if "" in layers:
        raise ValueError("model: expected a model that contains GLoRALinear layers, got a single one; PEFT needs names")
    form = _common_form(layers)
    saved = _modules_to_save(model, layers)
    norms = _norms_to_save(model, saved)
    saved = sorted([*saved, *norms])
    inside = tuple(f"{name}." for name in saved)
    tensors = {name: t for name, t in tensors_of(model, persistent=True).items() if name.startswith(inside)}
    for name, layer in layers.items():
        tensors |= {f"{name}.{key}": tensor for key, tensor in _exported(layer, form).items()}
    check_written(tensors)
    warn_of_buffers(model, layers.values(), tuple(saved))
    config = {
        "peft_type": "GLORA",
        "task_type": None,
        "base_model_name_or_path": getattr(model, "name_or_path", None) or None,
        "inference_mode": True,
        "bias": "none",
        "r": form.rank,
        "target_modules": _target_modules(model, layers),
        "modules_to_save": saved or None,
        **form.kinds,
    }
    contiguous = {PREFIX + name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    files = {
        TENSORS: save(contiguous, metadata={"format": "pt"}),
        CONFIG: (json.dumps(config, indent=2) + "\n").encode(),
    }
    write_folder_atomically("folder", folder, files)


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


def _modules_to_save(model: nn.Module, layers: Mapping[str, GLoRALinear]) -> list[str]:
    """The modules that hold all that is trained beside the adapters, none within another."""
    support, trained = support_ids(layers), trained_beside(model, layers)
    named = list(named_parameters(model, remove_duplicate=False))
    count = Counter(id(p) for _, p in named)
    shared = [name for name, p in named if id(p) in trained | support and count[id(p)] > 1]
    if shared:
        raise ValueError(f"model: expected trained tensors of one module each, PEFT would part the shared {shared}")
    owners = {name.rpartition(".")[0] for name, p in named if id(p) in trained}
    outermost = sorted(owner for owner in owners if not any(_within(owner, other) for other in owners))
    theirs = _names_of_theirs(model)
    for owner in outermost:
        held = [name for name in layers if not owner or _within(name, owner)]
        alike = [name for name in theirs if name != PREFIX + owner and name.endswith(owner)]
        if held or alike:
            reason = f"it holds the adapted {held}" if held else f"PEFT would take {alike} for it"
            raise ValueError(f"model: PEFT cannot save the trained module {owner!r}: {reason}; freeze it first")
    return outermost


def _norms_to_save(model: nn.Module, saved: Iterable[str]) -> set[str]:
    """Norm layers with statistics that PEFT can save whole: each in one place, and no other name ends in its name."""
    places = Counter(module for _, module in named_modules(model, remove_duplicate=False))
    modules, theirs = modules_by_name(model), _names_of_theirs(model)
    within = tuple(f"{name}." for name in saved)
    norms = {n for n in statistics(model).values() if places[modules[n]] == 1 and not f"{n}.".startswith(within)}
    while True:
        known = {PREFIX + name for name in (*saved, *norms)}
        taken = {norm for norm in norms if any(name.endswith(norm) and name not in known for name in theirs)}
        if not taken:
            return norms
        norms -= taken


def _names_of_theirs(model: nn.Module) -> list[str]:
    """The names of all modules in PEFT's model."""
    return ["base_model", "base_model.model", *(PREFIX + name for name, _ in named_modules(model) if name)]


def _within(name: str, module: str) -> bool:
    return name.startswith(module + ".")


def _target_modules(model: nn.Module, layers: Iterable[str]) -> list[str] | str:
    """A list, which PEFT compares with the ends of names; a regular expression if the list would match others."""
    names = sorted(layers)
    ends = tuple("." + name for name in names)
    others = [name for name, _ in named_modules(model) if name.endswith(ends) and name not in names]
    return "|".join(re.escape(name) for name in names) if others else names
