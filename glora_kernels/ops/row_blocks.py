"""The adapted linear layer for a W0 that is read by blocks of its rows, not as a matrix: a quantised base.

Each block is read twice, in forward and again in backward, and W_eff exists one block at a time: only x and the support
tensors are kept for backward. The products are those of the torch backend.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import _torch, reference
from ..backend import BackwardCall
from ..checks import check_call, check_tensor
from ..dispatch import tracing_reason
from ..precision import cast_operands, without_autocast
from ..terms import Constant, LowRank, Structure, Term, Terms, Vector, compute_dtype
from .autograd import wanted_slots

Bounds = tuple[int, int]


class RowBlocks(Protocol):
    """W0 by blocks of rows.

    Attributes:
        shape: N and K.
        bounds: the first row of each block and the one after its last; together they cover all N.
    """

    @property
    def shape(self) -> tuple[int, int]: ...

    @property
    def bounds(self) -> list[Bounds]: ...

    def rows(self, start: int, stop: int) -> Tensor:
        """These rows of W0, ``(stop - start, K)``, in a floating dtype: the same bits at every call."""


def blocked_linear(x: Tensor, blocks: RowBlocks, bias: Tensor | None, terms: Terms) -> Tensor:
    """:func:`glora_kernels.glora_linear` with W0 by blocks of rows, cast to the dtype of ``x``.

    Args:
        x: tokens, ``(..., K)``.
        blocks: frozen ``W0``.
        bias: frozen ``b0``, ``(N,)``, or None.
        terms: support tensors, of any floating dtype.

    Returns:
        ``(..., N)`` in the dtype of ``x``; under ``torch.autocast``, in the autocast dtype. Differentiable once in
        ``x`` and in every storage; under ``torch.func`` and forward-mode AD, to any order, with W0 as a whole.

    Raises:
        TypeError, ValueError: an argument that does not fit, by name, before anything is computed.
    """
    check_tensor("x", x)
    stand_in = x.new_empty(()).expand(blocks.shape)  # W0 for the checks, without memory
    x, stand_in, bias = cast_operands(x, stand_in, bias)
    check_call(x, stand_in, bias, terms)
    with without_autocast(x.device.type):
        if tracing_reason() is not None:
            whole = torch.cat([blocks.rows(*bounds) for bounds in blocks.bounds]).to(x.dtype)
            return reference.glora_linear(x, whole, bias, terms)
        storages, structure = terms.flatten()
        return _BlockedLinear.apply(blocks, structure, x, bias, *storages)


def terms_of_rows(terms: Terms, start: int, stop: int) -> Terms:
    """The part of ``terms`` for the rows from ``start`` to before ``stop``: views of the same storages."""
    parts = {slot: _of_rows(term, start, stop) if _has_rows(slot, terms) else term for slot, term in terms.active}
    return Terms(**parts, product=terms.product)  # type: ignore[arg-type]


def _has_rows(slot: str, terms: Terms) -> bool:
    """Whether the first storage of a term has a row (or an entry) for each row of W0."""
    per_row = slot in ("B", "D", "E") or (slot == "A" and terms.product == "hadamard")
    return per_row and not isinstance(getattr(terms, slot), Constant)


def _of_rows(term: Term, start: int, stop: int) -> Term:
    if isinstance(term, LowRank):
        return LowRank(term.down[start:stop], term.up, term.rank)
    assert isinstance(term, Vector)
    return Vector(term.value[start:stop])


def _parts(
    blocks: RowBlocks, dtype: torch.dtype, bias: Tensor | None, terms: Terms
) -> Iterator[tuple[Bounds, Tensor, Tensor | None, Terms]]:
    """Each block with what belongs to its rows."""
    for start, stop in blocks.bounds:
        part = None if bias is None else bias[start:stop]
        yield (start, stop), blocks.rows(start, stop).to(dtype), part, terms_of_rows(terms, start, stop)


class _BlockedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, blocks: RowBlocks, structure: Structure, x: Tensor, bias: Tensor | None, *storages):
        terms = Terms.unflatten(storages, structure)
        ctx.blocks, ctx.structure, ctx.x_shape, ctx.dtype = blocks, structure, x.shape, x.dtype
        ctx.wanted = wanted_slots(terms, bias is not None)
        ctx.save_for_backward(x if ctx.wanted & {"A", "B"} else None, bias, *storages)
        y = x.new_empty(*x.shape[:-1], blocks.shape[0])
        for (start, stop), weight, b0, part in _parts(blocks, x.dtype, bias, terms):
            y[..., start:stop] = _torch.forward(x, weight, b0, part).y
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        with without_autocast(dy.device.type):
            return _backward(ctx, dy)


def _backward(ctx, dy: Tensor):
    x, bias, *storages = ctx.saved_tensors
    rows, columns = ctx.blocks.shape
    tokens = math.prod(ctx.x_shape[:-1])
    dy = dy.reshape(tokens, rows)
    x = None if x is None else x.reshape(tokens, columns)
    terms = Terms.unflatten(storages, ctx.structure)
    wide = compute_dtype(ctx.dtype)
    # Parts are summed in the compute dtype, and the sum is rounded once.
    dx = dy.new_zeros(tokens, columns, dtype=wide) if ctx.needs_input_grad[2] else None
    grads = {
        slot: tuple(
            storage.new_zeros(storage.shape, dtype=torch.promote_types(storage.dtype, wide))
            for storage in term.storages
        )
        for slot, term in terms.active
        if slot in ctx.wanted
    }
    for (start, stop), weight, b0, part in _parts(ctx.blocks, ctx.dtype, bias, terms):
        projected = _torch.project(weight, part)
        call = BackwardCall(dy[:, start:stop], x, weight, b0, part, None, None, projected, ctx.wanted, dx is not None)
        part_dx, part_grads = _torch.backward(call)
        if dx is not None and part_dx is not None:
            dx += part_dx
        for slot, found in part_grads.items():
            first = grads[slot][0][start:stop] if _has_rows(slot, terms) else grads[slot][0]
            for total, grad in zip((first, *grads[slot][1:]), found):
                total += grad
    flat = [
        grads[slot][i].to(storage.dtype) if slot in ctx.wanted else None
        for slot, term in terms.active
        for i, storage in enumerate(term.storages)
    ]
    masked = (grad if needed else None for grad, needed in zip(flat, ctx.needs_input_grad[4:]))
    return None, None, None if dx is None else dx.to(ctx.dtype).reshape(ctx.x_shape), None, *masked
