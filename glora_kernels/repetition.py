"""Which forward pass a call repeats, where backward runs forward again (activation checkpointing)."""

from __future__ import annotations

import sys

import torch
from torch.autograd.function import BackwardCFunction

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
