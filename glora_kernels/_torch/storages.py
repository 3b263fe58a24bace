"""Gradients in the shape of the storages that they belong to."""

from __future__ import annotations

import torch
from torch import Tensor

from ..terms import LowRank, Term, Vector


def into_storages(term: Term, *values: Tensor) -> tuple[Tensor, ...]:
    """Gradients in the shape and dtype of the term's storages: ``values`` in the part that is read, else zero.

    For a constant, ``values`` has one value per row, and the gradient is their sum.
    """
    if isinstance(term, LowRank):
        rank = term.read_rank
        if rank == term.up.shape[0]:
            return values[0].to(term.down.dtype), values[1].to(term.up.dtype)
        down, up = (torch.zeros_like(storage) for storage in term.storages)
        down[:, :rank] = values[0]
        up[:rank] = values[1]
        return down, up
    if isinstance(term, Vector) and term.value.dim() == 1:
        return (values[0].to(term.value.dtype),)
    grad = torch.zeros_like(term.value)
    if isinstance(term, Vector):
        grad[:, 0] = values[0]
    else:
        grad[(0,) * grad.dim()] = values[0].sum()
    return (grad,)
