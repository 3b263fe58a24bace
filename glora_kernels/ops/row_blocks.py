"""The adapted linear layer for a W0 that is read by blocks of its rows, not as a matrix: a quantised base.

Each block is read twice, in forward and again in backward, and W_eff exists one block at a time: only x and the support
tensors are kept for backward. The products are those of the torch backend.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import reference
from .._torch import TorchPlan
from ..checks import check_call, check_tensor
from ..dispatch import tracing_reason
from ..precision import cast_operands, without_autocast
from ..terms import Constant, LowRank, Term, Terms, Vector, compute_dtype
from .autograd import wanted_slots
from .recompute import to_keep, x_and_rest

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
        wanted = wanted_slots(terms, bias is not None)
        plan = TorchPlan(x.dtype, terms, wanted, x.requires_grad)
        parts = [
            _Storage(i == 0 and _has_rows(slot, terms), slot in wanted)
            for slot, term in terms.active
            for i in range(len(term.storages))
        ]
        return _BlockedLinear.apply(blocks, plan, parts, bool(wanted & {"A", "B"}), x, bias, *terms.storages)


class _Storage(NamedTuple):
    """Whether a storage has a row (or an entry) for each row of W0, and whether it wants a gradient."""

    has_rows: bool
    wanted: bool


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


def _of_blocks(
    blocks: RowBlocks, dtype: torch.dtype, bias: Tensor | None, storages: Sequence[Tensor], kinds: list[_Storage]
) -> Iterator[tuple[Bounds, Tensor, Tensor | None, list[Tensor]]]:
    """The weight, bias and storages of the rows of each block."""
    for start, stop in blocks.bounds:
        part = None if bias is None else bias[start:stop]
        own = [storage[start:stop] if kind.has_rows else storage for storage, kind in zip(storages, kinds)]
        yield (start, stop), blocks.rows(start, stop).to(dtype), part, own


class _BlockedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        blocks: RowBlocks,
        plan: TorchPlan,
        kinds: list[_Storage],
        keeps_x: bool,
        x: Tensor,
        bias: Tensor | None,
        *storages: Tensor,
    ):
        ctx.blocks, ctx.plan, ctx.kinds, ctx.x_shape, ctx.dtype = blocks, plan, kinds, x.shape, x.dtype
        kept, ctx.form_x = to_keep(x) if keeps_x else ((None,), None)
        ctx.save_for_backward(*kept, bias, *storages)
        y = x.new_empty(*x.shape[:-1], blocks.shape[0])
        for (start, stop), weight, b0, own in _of_blocks(blocks, x.dtype, bias, storages, kinds):
            y[..., start:stop] = plan.forward(x, weight, b0, own).y
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        with without_autocast(dy.device.type):
            return _backward(ctx, dy)


def _backward(ctx, dy: Tensor):
    x, (bias, *storages) = x_and_rest(ctx)
    rows, columns = ctx.blocks.shape
    tokens = math.prod(ctx.x_shape[:-1])
    dy = dy.reshape(tokens, rows)
    x = None if x is None else x.reshape(tokens, columns)
    wide = compute_dtype(ctx.dtype)
    # Parts are summed in the compute dtype, and the sum is rounded once.
    dx = dy.new_zeros(tokens, columns, dtype=wide) if ctx.needs_input_grad[4] else None
    grads = [
        storage.new_zeros(storage.shape, dtype=torch.promote_types(storage.dtype, wide)) if kind.wanted else None
        for storage, kind in zip(storages, ctx.kinds)
    ]
    for (start, stop), weight, b0, own in _of_blocks(ctx.blocks, ctx.dtype, bias, storages, ctx.kinds):
        part_dx, found = ctx.plan.backward(dy[:, start:stop], x, weight, b0, own, None, None, None, None)
        if dx is not None:
            dx += part_dx
        for total, grad, kind in zip(grads, found, ctx.kinds):
            if total is not None:
                (total[start:stop] if kind.has_rows else total).add_(grad)
    masked = (
        grad.to(storage.dtype) if grad is not None and needed else None
        for grad, storage, needed in zip(grads, storages, ctx.needs_input_grad[6:])
    )
    return None, None, None, None, None if dx is None else dx.to(ctx.dtype).reshape(ctx.x_shape), None, *masked
