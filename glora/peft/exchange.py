"""Adapters as PEFT's GLoRA keeps them: a folder of ``adapter_config.json`` and ``adapter_model.safetensors``.

PEFT has one form for a whole adapter: a kind for A and B, one for C, one for D and E, and one rank. It
stores what is read and no more, under ``base_model.model.<layer>.glora_<slot>.``:

=========  ======================================  =============
kind       A and B; C                              D and E
=========  ======================================  =============
lora       ``Xd (N, r)``, ``Xu (r, K)``; C ``Xd    -
           (K, r)``, ``Xu (r, 1)``
vector     ``X (N, 1)``; C ``X (K, 1)``            ``X (N,)``
constant   ``X (1,)``; C has none                  ``X (1,)``
none       ``zeros (N, K)``; C ``zeros (K, 1)``    ``zeros (N,)``
=========  ======================================  =============

Layers without bias have none of C, D and E there, whatever the form says. Needs no PEFT.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from glora_kernels.checks import FLOATING
from glora_kernels.terms import LowRank, Vector

from ..config import KINDS, PathConfig, parse_choice
from ..files import write_folder_atomically
from ..injection import adapt
from ..layer import GLoRALinear
from ..modules import glora_layers, require_layers
from ..parameters import trainable_parameters
from ..paths import set_paths

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
FORM = {"config_A_B": "A", "config_C": "C", "config_D_E": "D"}  # the slot that a field speaks for


def export_peft(model: nn.Module, folder: str | os.PathLike) -> None:
    """Write the adapter for ``peft.PeftModel.from_pretrained(base, folder)``, which then computes the same.

    Base weights are not written. Every other trained module (the classifier head) is, whole, as one of PEFT's
    ``modules_to_save``. Tensors of a kind *none* are written as zeros of their full size, as PEFT does: it
    warns where they are missing.

    Args:
        model: with GLoRA layers, all of one path that PEFT has too.
        folder: a new one, or one to replace that holds nothing else than a former export; written atomically.

    Raises:
        ValueError: no GLoRA layer; what PEFT cannot express, with the layers and reasons (the matmul product,
            A and B or D and E of different kinds, ranks or paths that differ, C or E without a bias, which PEFT
            drops); trained tensors that PEFT could not save; a folder that holds other files.
    """
    from safetensors.torch import save

    layers = require_layers(model)
    form = _common_form(layers)
    saved = _modules_to_save(model, layers)
    tensors = {
        f"{name}.{key}": tensor for name in saved for key, tensor in model.get_submodule(name).state_dict().items()
    }
    for name, layer in layers.items():
        tensors |= {f"{name}.{key}": tensor for key, tensor in _exported(layer, form).items()}
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


def import_peft(model: nn.Module, folder: str | os.PathLike) -> nn.Module:
    """Load a GLoRA adapter that PEFT (or :func:`export_peft`) wrote; a model without GLoRA gets it injected.

    Everything is checked before anything is changed. Modules that PEFT saved whole (``modules_to_save``) are
    loaded too. PEFT's storages hold only what is read; the rest of ours stays as it is.

    Args:
        model: the base model, as it was given to PEFT; or that model with GLoRA in exactly the adapter's layers,
            at a rank not below the adapter's.
        folder: that of one adapter.

    Returns:
        ``model`` itself, its paths set to the adapter's.

    Raises:
        FileNotFoundError: one of the two files is missing.
        ValueError: not a GLoRA adapter, damaged, with trained biases, or made for another model; what differs is
            listed.
    """
    form, tensors = _read(Path(folder))
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError("model: expected real tensors, got parameters on meta; load the base weights first")
    pattern = re.compile(r"(.+)\.glora_[A-E]\.(?:Xd|Xu|X|zeros)")
    found = (pattern.fullmatch(name) for name in tensors)
    names = list(dict.fromkeys(match[1] for match in found if match is not None))
    linears = _matching_layers(model, names, form, folder)
    _check_tensors(model, linears, tensors, form, folder)
    if not glora_layers(model):
        saved = {id(p) for name, p in model.named_parameters() if name in tensors}
        adapt(model, linears.values(), form.rank, "hadamard", saved)
    _load(model, glora_layers(model), tensors, form)
    return model


class _Form(NamedTuple):
    """What PEFT says of a whole adapter: fields of its GloraConfig."""

    kinds: dict[str, str]
    rank: int

    def path(self, bias: bool) -> PathConfig:
        """Ours that does the same."""
        a, c, d = (f"lora_{self.rank}" if kind == "lora" else kind for kind in self.kinds.values())
        return PathConfig(a, a, c, d, d) if bias else PathConfig(a, a)

    def shapes(self, linear: nn.Linear | GLoRALinear) -> dict[str, tuple[int, ...]]:
        """Of everything that PEFT keeps for a layer, by ``glora_<slot>.<name>``."""
        sizes = linear.out_features, linear.in_features
        return {
            f"glora_{slot}.{name}": shape
            for slot, choice in self.path(linear.bias is not None).choices.items()
            for name, shape in _stored(slot, choice.kind, self.rank, *sizes).items()
        }


def _stored(slot: str, kind: str, rank: int, rows: int, columns: int) -> dict[str, tuple[int, ...]]:
    """The table at the top of this file."""
    first, *others = {"A": (rows, columns), "B": (rows, columns), "C": (columns, 1)}.get(slot, (rows,))
    if kind == "lora":
        return {"Xd": (first, rank), "Xu": (rank, *others)}
    if kind == "vector":
        return {"X": (first, 1) if others else (first,)}
    return {"X": (1,)} if kind == "constant" else {"zeros": (first, *others)}


def _read_parts(layer: GLoRALinear, path: PathConfig) -> dict[str, Tensor]:
    """Views of what ``path`` reads of the layer's storages, by PEFT's names."""
    parts: dict[str, Tensor] = {}
    for slot, term in layer.terms(path).active:
        if isinstance(term, LowRank):
            parts[f"glora_{slot}.Xd"], parts[f"glora_{slot}.Xu"] = term.factors
        else:
            parts[f"glora_{slot}.X"] = term.entries if isinstance(term, Vector) else term.entry
    return parts


# -- export ------------------------------------------------------------------------------------------


def _exported(layer: GLoRALinear, form: _Form) -> dict[str, Tensor]:
    parts = _read_parts(layer, form.path(layer.bias is not None))
    zeros = torch.zeros((), dtype=layer.Ad.dtype)
    return {
        name: parts[name].reshape(shape) if name in parts else zeros.expand(shape)
        for name, shape in form.shapes(layer).items()
    }


def _common_form(layers: Mapping[str, GLoRALinear]) -> _Form:
    """The one form of all layers. Raises ValueError, listing the layers that stand against it."""
    faults = {name: fault for name, layer in layers.items() if (fault := _fault(layer)) is not None}
    sound = {name: layer for name, layer in layers.items() if name not in faults}
    kinds: dict[str, str] = {}
    for field, slot in FORM.items():
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
    return _Form(kinds, rank or max(layer.rank for layer in layers.values()))


def _effective(layer: GLoRALinear) -> PathConfig:
    """The layer's path without what has no effect: D where there is no bias."""
    path = layer.path
    return path if layer.bias is not None else PathConfig(path.A, path.B, path.C, E=path.E)


def _fault(layer: GLoRALinear) -> str | None:
    """Why PEFT has no such layer, if it has none."""
    path = _effective(layer)
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
    """The modules of all that is trained beside the adapters, none within another."""
    support = {id(p) for layer in layers.values() for p in layer.support_parameters()}
    trained = {id(p) for p in trainable_parameters(model)} - support
    named = list(model.named_parameters(remove_duplicate=False))
    count = Counter(id(p) for _, p in named)
    shared = [name for name, p in named if id(p) in trained | support and count[id(p)] > 1]
    if shared:
        raise ValueError(f"model: expected trained tensors of one module each, PEFT would part the shared {shared}")
    owners = {name.rpartition(".")[0] for name, p in named if id(p) in trained}
    outermost = sorted(owner for owner in owners if not any(_within(owner, other) for other in owners))
    theirs = ["base_model", "base_model.model", *(PREFIX + name for name, _ in model.named_modules() if name)]
    for owner in outermost:
        held = [name for name in layers if not owner or _within(name, owner)]
        alike = [name for name in theirs if name != PREFIX + owner and name.endswith(owner)]
        if held or alike:
            reason = f"it holds the adapted {held}" if held else f"PEFT would take {alike} for it"
            raise ValueError(f"model: PEFT cannot save the trained module {owner!r}: {reason}; freeze it first")
    return outermost


def _within(name: str, module: str) -> bool:
    return name.startswith(module + ".")


def _target_modules(model: nn.Module, layers: Iterable[str]) -> list[str] | str:
    """A list, which PEFT compares with the ends of names; a regular expression where that takes in others."""
    names = sorted(layers)
    ends = tuple("." + name for name in names)
    others = [name for name, _ in model.named_modules() if name.endswith(ends) and name not in names]
    return "|".join(re.escape(name) for name in names) if others else names


# -- import ------------------------------------------------------------------------------------------


def _read(folder: Path) -> tuple[_Form, dict[str, Tensor]]:
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


def _read_form(file: Path) -> _Form:
    try:
        config = json.loads(file.read_text())
        kind, bias, rank = config["peft_type"], config.get("bias", "none"), config["r"]
        kinds = {field: config[field] for field in FORM}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file}: expected the configuration of a GLoRA adapter ({error!r})") from None
    unknown = {field: kinds[field] for field, slot in FORM.items() if kinds[field] not in KINDS[slot]}
    if kind != "GLORA" or unknown or type(rank) is not int or rank < 1:
        raise ValueError(f"{file}: expected a GLORA adapter, got {kind!r} of r={rank!r}, unknown kinds {unknown}")
    if bias != "none":
        raise ValueError(f"{file}: expected bias 'none', got {bias!r}: PEFT trained biases of the base model")
    return _Form(kinds, rank)


def _matching_layers(model: nn.Module, names: list[str], form: _Form, folder: object) -> dict[str, Any]:
    """The layers of the adapter, in the model. Raises ValueError if they are not there or do not fit."""
    layers = glora_layers(model)
    if not names:
        raise ValueError(f"{folder}: expected the tensors of a GLoRA adapter, got none")
    if not layers:
        modules = dict(model.named_modules())
        unfit = [name for name in names if type(modules.get(name)) is not nn.Linear]
        if unfit:
            raise ValueError(f"{folder}: made for another model: expected an nn.Linear at {unfit}")
        return {name: modules[name] for name in names}
    missing, unknown = sorted(set(layers) - set(names)), sorted(set(names) - set(layers))
    differing = [
        f"{name}: rank {layer.rank} {layer.product}"
        for name, layer in layers.items()
        if layer.product != "hadamard" or layer.rank < form.rank
    ]
    if missing or unknown or differing:
        raise ValueError(
            f"{folder}: expected the adapted layers of the model, hadamard and of rank {form.rank} or more; "
            f"missing {missing}, unknown {unknown}, differing {differing}"
        )
    return dict(layers)


def _check_tensors(
    model: nn.Module, linears: Mapping[str, nn.Linear | GLoRALinear], tensors: Mapping[str, Tensor], form: _Form, folder: object
) -> None:
    own = model.state_dict()
    expected = {
        f"{name}.{key}": shape for name, linear in linears.items() for key, shape in form.shapes(linear).items()
    }
    adapted = tuple(name + "." for name in linears)
    whole = {name: tuple(own[name].shape) for name in tensors if name in own and not name.startswith(adapted)}
    expected |= whole
    missing, unknown = sorted(set(expected) - set(tensors)), sorted(set(tensors) - set(expected))
    differing = [
        f"{name}: expected {shape}, got {tuple(tensors[name].shape)}"
        for name, shape in expected.items()
        if name in tensors and tuple(tensors[name].shape) != shape
    ]
    if missing or unknown or differing:
        raise ValueError(
            f"{folder}: made for another model or form: missing tensors {missing}, unknown tensors {unknown}, "
            f"shapes that differ {differing}"
        )
    odd = [name for name in expected if name not in whole and tensors[name].dtype not in FLOATING]
    odd += [name for name in expected if name.endswith(".zeros") and bool(tensors[name].any())]
    if odd:
        raise ValueError(f"{folder}: expected floating tensors, and zeros for the kind none; not so: {odd}")


@torch.no_grad()
def _load(model: nn.Module, layers: Mapping[str, GLoRALinear], tensors: Mapping[str, Tensor], form: _Form) -> None:
    paths = {name: form.path(layer.bias is not None) for name, layer in layers.items()}
    for name, layer in layers.items():
        for key, part in _read_parts(layer, paths[name]).items():
            part.copy_(tensors[f"{name}.{key}"].reshape(part.shape))
    own = model.state_dict()
    for name, tensor in tensors.items():
        if name in own:
            own[name].copy_(tensor)
    set_paths(model, paths)
