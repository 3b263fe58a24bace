"""What every adapter folder of PEFT's has beside the adapters, and how it is written."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from ..files import write_folder_atomically
from ..layers.base import GLoRALayer
from ..models.contents import statistics
from ..models.wrappers import modules_by_name, named_modules, named_parameters, tensors_of
from ..parameters import support_ids, trained_beside
from .form import CONFIG, PREFIX, TENSORS

FILES = (TENSORS, CONFIG)


def require_names(layers: Mapping[str, GLoRALayer]) -> None:
    """Raise ValueError if the model is itself an adapted layer: it has no name, by which PEFT finds layers."""
    if "" in layers:
        kind = type(layers[""]).__name__
        raise ValueError(f"model: expected a model that contains {kind} layers, got a single one; PEFT needs names")


def saved_whole(model: nn.Module, layers: Mapping[str, GLoRALayer]) -> tuple[list[str], dict[str, Tensor]]:
    """The modules to save whole, and their tensors by name.

    These are all that is trained beside the adapters, and norm layers with statistics, which training changes.

    Raises:
        ValueError: trained tensors that PEFT could not save.
    """
    saved = _modules_to_save(model, layers)
    saved = sorted([*saved, *_norms_to_save(model, saved)])
    inside = tuple(f"{name}." for name in saved)
    return saved, {name: t for name, t in tensors_of(model, persistent=True).items() if name.startswith(inside)}


def write_adapter(
    model: nn.Module,
    layers: Iterable[str],
    folder: str | os.PathLike,
    kind: Mapping[str, Any],
    saved: list[str],
    tensors: Mapping[str, Tensor],
) -> None:
    """Write the two files of PEFT's, atomically.

    Args:
        layers: the names of the adapted ones.
        kind: the entries of the config that are the adapter's own, ``peft_type`` first.
        saved: the names of the modules that are saved whole.
        tensors: by their names in ``model``.
    """
    from safetensors.torch import save

    config = {
        **kind,
        "task_type": None,
        "base_model_name_or_path": getattr(model, "name_or_path", None) or None,
        "inference_mode": True,
        "bias": "none",
        "target_modules": _target_modules(model, layers),
        "modules_to_save": saved or None,
    }
    contiguous = {PREFIX + name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    files = {
        TENSORS: save(contiguous, metadata={"format": "pt"}),
        CONFIG: (json.dumps(config, indent=2) + "\n").encode(),
    }
    write_folder_atomically("folder", folder, files)


def _modules_to_save(model: nn.Module, layers: Mapping[str, GLoRALayer]) -> list[str]:
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
