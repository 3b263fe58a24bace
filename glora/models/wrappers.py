"""Names of a model without its wrappers: ``fc1.Ad``, not ``module.fc1.Ad``.

``torch.compile``, data parallelism, averaged models and activation checkpointing put a module around another, at the
top or anywhere in a model. Files and paths use names without wrappers, so that they fit the model with and without
them. A wrapper is known by its type: a user's model may well have a child named ``module``.
"""

from __future__ import annotations

import os
from collections.abc import Container, Iterator, Mapping
from itertools import accumulate

from torch import Tensor, nn

from glora_kernels.torch_private import COMPILED, WRAPPERS, is_compiled_in_place

from ..layers.packages import is_a, loaded

# No module of a model itself has these names.
_MARKS = {place for *_, place in WRAPPERS} - {"module"}


def is_fsdp1(module: nn.Module) -> bool:
    """Whether ``module`` is a ``FullyShardedDataParallel``, which ``fully_shard`` does not make."""
    return is_a(module, "torch.distributed.fsdp", "FullyShardedDataParallel")


def compiled_modules(model: nn.Module) -> set[nn.Module]:
    """What ``torch.compile`` is around, be it ``model`` or a part of it."""
    *kind, place = COMPILED
    return {getattr(module, place) for module in model.modules() if is_a(module, *kind)}


def is_compiled(model: nn.Module) -> bool:
    """Whether ``torch.compile`` is around the model or a part of it, or either was compiled in place."""
    return bool(compiled_modules(model)) or any(map(is_compiled_in_place, model.modules()))


def named_modules(model: nn.Module, remove_duplicate: bool = True) -> Iterator[tuple[str, nn.Module]]:
    """As ``model.named_modules()``, without the wrappers and by the names that a model without them has."""
    kinds = {kind: place for where, name, place in WRAPPERS if (kind := loaded(where, name)) is not None}
    wrappers, places = tuple(kinds), set()
    for name, module in model.named_modules(remove_duplicate=remove_duplicate):
        if isinstance(module, wrappers):
            places |= {_join(name, place) for kind, place in kinds.items() if isinstance(module, kind)}
        else:
            yield _without(name, places) if places else name, module


def modules_by_name(model: nn.Module) -> dict[str, nn.Module]:
    """Every module by name without wrappers, a shared one by all its names."""
    return dict(named_modules(model, remove_duplicate=False))


def named_parameters(model: nn.Module, remove_duplicate: bool = True) -> Iterator[tuple[str, nn.Parameter]]:
    """As ``model.named_parameters()``, by the names that a model without wrappers has."""
    seen: set[int] = set()
    for name, module in named_modules(model, remove_duplicate):
        for own, parameter in module.named_parameters(recurse=False, remove_duplicate=remove_duplicate):
            if not (remove_duplicate and id(parameter) in seen):
                seen.add(id(parameter))
                yield _join(name, own), parameter


def named_buffers(
    model: nn.Module, persistent: bool = False, remove_duplicate: bool = True
) -> Iterator[tuple[str, Tensor]]:
    """As ``model.named_buffers()``, by the names that a model without wrappers has, and without the wrappers' own.

    Args:
        persistent: leave out those that are not in ``model.state_dict()``.
    """
    seen: set[int] = set()
    for name, module in named_modules(model, remove_duplicate):
        buffers = dict(module.named_buffers(recurse=False, remove_duplicate=remove_duplicate))
        kept = module.state_dict() if persistent and buffers else buffers
        for own, buffer in buffers.items():
            if own in kept and not (remove_duplicate and id(buffer) in seen):
                seen.add(id(buffer))
                yield _join(name, own), buffer


def tensors_of(model: nn.Module, persistent: bool = False) -> dict[str, Tensor]:
    """Every parameter and buffer by every name that it has without wrappers.

    Args:
        persistent: leave out buffers that are not in ``model.state_dict()``.
    """
    parameters = named_parameters(model, remove_duplicate=False)
    return {**dict(parameters), **dict(named_buffers(model, persistent, remove_duplicate=False))}


def name_in(known: Container[str], name: str) -> str:
    """The known name that ``name`` stands for. Known names are without wrappers; ``name`` may have parts that they add.

    Files of earlier versions contain the names of wrappers. If no known name fits, the result is ``name`` without the
    parts that only wrappers have; ``module`` stays, since it may be a model's own.
    """
    parts = [part for part in name.split(".") if part not in _MARKS]
    certain = ".".join(parts)
    candidates = [name, certain]
    while "module" in parts:
        parts.remove("module")
        candidates.append(".".join(parts))
    return next((candidate for candidate in candidates if candidate in known), certain)


def key_in(known: Container[str], prefix: str, key: str) -> str:
    """As :func:`name_in`, for LyCORIS' names: a prefix, and underscores in place of dots."""
    rest = key.removeprefix(f"{prefix}_")
    for mark in _MARKS:
        rest = rest.replace(f"{mark}_", "")
    candidates = [key, f"{prefix}_{rest}"]
    while rest.startswith("module_"):
        rest = rest.removeprefix("module_")
        candidates.append(f"{prefix}_{rest}")
    return next((candidate for candidate in candidates if candidate in known), key)


def tensors_in(known: Container[str], tensors: Mapping[str, Tensor], file: str | os.PathLike) -> dict[str, Tensor]:
    """The tensors of ``file`` by the names that a model with the ``known`` modules has for them (:func:`name_in`).

    Raises:
        ValueError: two of them would have one name.
    """
    renamed = {_tensor_in(known, name): tensor for name, tensor in tensors.items()}
    if len(renamed) != len(tensors):
        raise ValueError(f"{file}: expected each tensor once, got some with and without the name of a wrapper")
    return renamed


def _tensor_in(known: Container[str], name: str) -> str:
    """The tensor's module is the longest beginning of its name that is known."""
    parts = name.split(".")
    for end in range(len(parts) - 1, 0, -1):
        module = name_in(known, ".".join(parts[:end]))
        if module in known:
            return _join(module, *parts[end:])
    return name


def _join(*names: str) -> str:
    return ".".join(name for name in names if name)


def _without(name: str, places: set[str]) -> str:
    """Drop each component of ``name`` that leads to a wrapped module, one of ``places``."""
    beginnings = accumulate(name.split("."), _join)
    return ".".join(start.rpartition(".")[2] for start in beginnings if start not in places)
