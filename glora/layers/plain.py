"""Plain modules: the name of their type, whether they are nothing more than it, and new ones to be filled."""

from __future__ import annotations

from collections.abc import Hashable
from functools import cache
from types import MethodType
from typing import Any, TypeVar

import torch
from torch import nn

from glora_kernels.torch_private import has_call_hooks, has_state_hooks, held_parameters, is_compiled_in_place

Plain = TypeVar("Plain", bound=nn.Module)


def unfilled(kind: type[Plain], *arguments: Hashable) -> Plain:
    """``kind(*arguments)`` without parameters, for :meth:`GLoRALayer._fill`; nothing is allocated or drawn at random.

    ``kind`` is a module that holds plain data beside its parameters. Its constructor runs once for each ``arguments``:
    the initial weights that it draws, which even on meta cost more than merging a small layer, would be thrown away.
    """
    module = kind.__new__(kind)
    nn.Module.__init__(module)
    vars(module).update(_settings(kind, *arguments))  # type: ignore[arg-type]  # a type is hashable
    return module


@cache
def _settings(kind: type[nn.Module], *arguments: Hashable) -> dict[str, Any]:
    """What the constructor gives ``kind(*arguments)`` beside parameters and what every module has."""
    with torch.device("meta"):
        module = kind(*arguments)
    every = vars(nn.Module())
    return {name: value for name, value in vars(module).items() if name not in every}


def require_plain(argument: str, module: nn.Module, kind: type[nn.Module]) -> None:
    """Raise TypeError if ``module`` is not exactly a ``kind``, or something on it would be lost by replacing it."""
    if type(module) is not kind:
        raise TypeError(f"{argument}: expected exactly {qualified_name(kind)}, got {qualified_name(type(module))}")
    if not is_bare(module) or "weight" not in held_parameters(module):
        raise TypeError(f"{argument}: expected one without hooks, pruning or weight norm; they would be lost")
    if _holds_more(module):
        raise TypeError(
            f"{argument}: expected one with a weight and a bias alone and without hooks on its state dict, got more, "
            "which would be lost"
        )
    if is_compiled_in_place(module):
        raise TypeError(
            f"{argument}: expected one that is not compiled yet, which would be lost; compile it afterwards"
        )


def is_bare(module: nn.Module) -> bool:
    """Whether calling ``module`` runs the forward of its class and nothing else: no hooks, no wrapper."""
    if has_call_hooks(module):
        return False
    # accelerate leaves behind the class's own forward when it takes its hooks away
    return "forward" not in vars(module) or module.forward == MethodType(type(module).forward, module)


def qualified_name(kind: type) -> str:
    """The name to import ``kind`` by."""
    module = "torch.nn" if getattr(nn, kind.__name__, None) is kind else kind.__module__
    return f"{module}.{kind.__qualname__}"


def _holds_more(module: nn.Module) -> bool:
    """Whether a module of PyTorch's own has tensors, children or hooks that its class does not give it."""
    if not type(module).__module__.startswith("torch.nn."):
        return False
    others = {name for name, _ in module.named_parameters(recurse=False)} - {"weight", "bias"}
    others |= {name for name, _ in module.named_buffers(recurse=False)} | set(dict(module.named_children()))
    return bool(others) or has_state_hooks(module)
