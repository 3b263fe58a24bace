"""Checks of tensors: of a file's, before a model is changed, and of a model's, before anything is written."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from glora_kernels.checks import FLOATING
from glora_kernels.torch_private import BATCH_NORMS

from ..arguments import listed
from ..layers.base import GLoRALayer
from .wrappers import named_buffers, named_modules, tensors_of

# Norm layers that gather statistics in training mode, whatever is frozen; the first ones over a batch.
NORMS = (*BATCH_NORMS, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
File = str | os.PathLike


class Slot(NamedTuple):
    """Where a tensor of a file goes.

    Attributes:
        infinite: whether values that are not finite may be meant, as in a mask.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    infinite: bool = False


def slots(model: nn.Module) -> dict[str, Slot]:
    """A slot for every parameter and buffer, by every name that it has without wrappers."""
    meant = {name for name, _ in named_buffers(model, remove_duplicate=False)} - set(statistics(model))
    return {name: Slot(tuple(t.shape), t.dtype, name in meant) for name, t in tensors_of(model).items()}


def statistics(model: nn.Module) -> dict[str, str]:
    """The statistics buffers of norm layers, each with its layer's name; all names are without wrappers."""
    norms = [
        (name, module)
        for name, module in named_modules(model)
        if isinstance(module, NORMS) and module.track_running_stats
    ]
    return {f"{name}.{key}".removeprefix("."): name for name, norm in norms for key, _ in named_buffers(norm, True)}


def require_fit(file: File, tensors: Mapping[str, Tensor], expected: Mapping[str, Slot]) -> None:
    """Raise ValueError, listing names, if ``tensors`` are not those ``expected``, or do not fit their slots.

    For a floating slot: floating, of fp16 or more, and finite, also in the slot's dtype. Otherwise: of the very dtype.
    """
    missing, unknown = sorted(set(expected) - set(tensors)), sorted(set(tensors) - set(expected))
    differing = [
        f"{name}: {slot.shape} in the model, {tuple(tensors[name].shape)} in the file"
        for name, slot in expected.items()
        if name in tensors and tuple(tensors[name].shape) != slot.shape
    ]
    if missing or unknown or differing:
        raise ValueError(
            f"{file}: made for another model: missing tensors {missing}, unknown tensors {unknown}, "
            f"shapes that differ {differing}"
        )
    faults = {name: fault for name, slot in expected.items() if (fault := _fault(tensors[name], slot))}
    if faults:
        raise ValueError(f"{file}: expected finite tensors of a floating dtype, got {_with_reasons(faults)}")


def require_same_layers(
    file: File, layers: Mapping[str, GLoRALayer], ranks: Mapping[str, int], product: str, exactly: bool = False
) -> None:
    """Raise ValueError, listing names, unless the layers are the file's, of its ranks (or more, if not ``exactly``)."""
    missing, unknown = sorted(set(layers) - set(ranks)), sorted(set(ranks) - set(layers))
    differing = [
        f"{name}: rank {layer.rank} {layer.product} in the model, {ranks[name]} {product} in the file"
        for name, layer in layers.items()
        if name in ranks
        and (layer.product != product or layer.rank < ranks[name] or (exactly and layer.rank > ranks[name]))
    ]
    if missing or unknown or differing:
        raise ValueError(
            f"{file}: expected the adapted layers of the model; missing {missing}, unknown {unknown}, "
            f"differing {differing}"
        )


def _fault(tensor: Tensor, slot: Slot) -> str | None:
    """What is wrong with a tensor; None if it fits."""
    form = _odd_form(tensor, None if slot.dtype in FLOATING else slot.dtype)
    if form or slot.dtype not in FLOATING:
        return form
    if slot.infinite:
        return None
    if not tensor.isfinite().all():
        return "NaN or infinite"
    # a value may round to infinity in a narrower type
    fits = tensor.dtype == slot.dtype or tensor.to(slot.dtype).isfinite().all()
    return None if fits else f"infinite in {slot.dtype}"


def _odd_form(tensor: Tensor, dtype: torch.dtype | None = None) -> str | None:
    """None for a dense tensor of ``dtype`` (None: of any floating dtype); otherwise what it is instead."""
    if tensor.is_meta or tensor.layout != torch.strided:
        return "on meta" if tensor.is_meta else str(tensor.layout)
    right = tensor.dtype in FLOATING if dtype is None else tensor.dtype == dtype
    return None if right else str(tensor.dtype)


def require_floating(file: File, tensors: Mapping[str, Tensor]) -> None:
    """Raise ValueError, listing names, unless all are dense and of fp16 or more."""
    faults = {name: fault for name, tensor in tensors.items() if (fault := _odd_form(tensor))}
    if faults:
        raise ValueError(f"{file}: expected tensors of a floating dtype, got {_with_reasons(faults)}")


def _with_reasons(faults: Mapping[str, str]) -> str:
    return listed(f"{name} ({fault})" for name, fault in faults.items())


def check_written(tensors: Mapping[str, Tensor]) -> None:
    """Check parameters that are to be written.

    Raises:
        ValueError: some of them have no values here: they are on meta, or emptied (as ZeRO-3 does).

    Warns:
        UserWarning: some are not finite; the file of a diverged model can be inspected, but no loader accepts it.
    """
    require_held(name for name, tensor in tensors.items() if tensor.is_meta or tuple(tensor.shape) == (0,))
    infinite = [name for name, tensor in tensors.items() if tensor.dtype in FLOATING and not tensor.isfinite().all()]
    if infinite:
        warnings.warn(
            f"training has diverged: not finite are {listed(infinite)}; they are written, but no loader takes them",
            stacklevel=3,
        )


def require_held(absent: Iterable[str]) -> None:
    """Raise ValueError unless no parameter is ``absent``."""
    names = list(absent)
    if names:
        raise ValueError(
            f"model: expected whole parameters, but this process holds no values of {listed(names)}; gather them first "
            "(ZeRO-3: deepspeed.zero.GatheredParameters(list(model.parameters()))), or load what is on meta"
        )


def buffers_beside(model: nn.Module, layers: Iterable[nn.Module]) -> dict[str, Tensor]:
    """The buffers that training may change: those of the state dict that are in none of ``layers``.

    These are statistics of norm layers, floating ones and single numbers (counters), not indices or packed weights.
    """
    inside = {id(buffer) for layer in layers for buffer in layer.buffers()}
    norms = statistics(model)
    return {
        name: buffer
        for name, buffer in named_buffers(model, persistent=True)
        if id(buffer) not in inside and (name in norms or buffer.is_floating_point() or buffer.numel() == 1)
    }


def warn_of_buffers(model: nn.Module, layers: Iterable[nn.Module], carried: tuple[str, ...] = ()) -> None:
    """Warn, by name, of buffers that training may change but another library's format cannot hold.

    These are the statistics of norm layers and every other floating buffer of the state dict, except those of
    ``layers`` and of the modules ``carried``.
    """
    norms = statistics(model)
    names = [norms.get(name, name) for name in buffers_beside(model, layers)]
    within = tuple(f"{name}." for name in carried)
    if lost := [name for name in dict.fromkeys(names) if not f"{name}.".startswith(within)]:
        warnings.warn(
            f"the file cannot hold the statistics of norm layers and other buffers, as in {listed(lost)}: if training "
            "changed them, whoever loads it computes something else; glora.save_adapter keeps them",
            stacklevel=3,
        )
