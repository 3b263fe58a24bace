"""Whether tensors are what they were when they were checked: one call of C++ in place of every check in Python."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction

TensorGuards: Any
try:  # what torch.compile asks before it runs a graph again; PyTorch promises nobody to keep it
    from torch._C._dynamo.guards import TensorGuards
except ImportError:
    TensorGuards = None


def can_guard() -> bool:
    """Whether this PyTorch can tell."""
    return TensorGuards is not None


def guard(x: Tensor, operands: Sequence[Tensor]) -> Callable[..., bool]:
    """A function that is called as ``found(x, *operands)``.

    It returns True only if every tensor has the type, dtype, device, layout and need of a gradient that it has now,
    ``operands`` their sizes and strides and ``x`` its number of dimensions and its last one; and if autocast, inference
    mode, ``torch.func`` transforms and dispatch modes are on or off as they are now. (Forward-mode AD is not seen.)
    """
    sizes = [[None] * (x.dim() - 1) + [x.shape[-1]], *(list(tensor.shape) for tensor in operands)]
    strides = [[None] * x.dim(), *(list(tensor.stride()) for tensor in operands)]
    return TensorGuards(x, *operands, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides).check


# What the engine calls of a custom function; newer versions of PyTorch have two.
_ENTRIES = {
    getattr(BackwardCFunction, name).__code__ for name in ("apply", "apply_boxed") if hasattr(BackwardCFunction, name)
}


def in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


def repeated_node() -> int | None:
    """The number of the autograd node for which backward runs forward again; None outside of backward, and at its end.

    Nodes are numbered in the order in which a thread makes them, so that the number tells when the first run was. A
    reentrant checkpoint runs a backward pass of its own inside of backward, over nodes that it has just made; the
    outermost custom function on the stack is the one that was made by the first run.
    """
    if not in_backward():
        return None
    node, frame = torch._C._current_autograd_node(), sys._getframe()
    while frame is not None:
        if frame.f_code in _ENTRIES:
            node = frame.f_locals["self"]
        frame = frame.f_back  # type: ignore[assignment]
    return None if node is None else node._sequence_nr()


def next_node() -> int:
    """The number of the next autograd node that this thread makes."""
    return torch._C._autograd._get_sequence_nr()
