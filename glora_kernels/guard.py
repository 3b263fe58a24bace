"""Whether tensors are what they were when they were checked: one call of C++ in place of every check in Python."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

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
