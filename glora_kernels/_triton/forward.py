"""The forward pass and merging: which kernels run, on what."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from ..step import Forward
from ..terms import LowRank, Terms, compute_dtype
from .assemble import assemble_kernel
from .device import architecture, is_hip
from .fused import fused_kernel
from .launch import launch
from .numerics import Numerics, index_type, numerics, tf32_allowed
from .operands import (
    ADDED,
    NONE,
    BiasOperands,
    Operand,
    a_operand,
    b_operand,
    bias_operands,
    dense,
    padded_rank,
    row_stride,
)
from .settings import Tile, tile_for


class Context(NamedTuple):
    """What every launch of a call shares."""

    architecture: str
    numerics: Numerics
    index: tl.dtype
    element: int
    tokens: int

    def tile(self, kernel: str, *ranks: int) -> Tile:
        return tile_for(kernel, self.architecture, self.element, self.tokens, max(padded_rank(r) for r in ranks))


def context(tokens: int, weight: Tensor, *matrices: Tensor) -> Context:
    """``matrices``: what is read beside the weight, by (row, column)."""
    name = architecture(weight.device)
    found = numerics(weight.dtype, is_hip(name), tf32_allowed())
    return Context(name, found, index_type(tokens, weight, *matrices), weight.element_size(), tokens)


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, terms: Terms, strategy: str) -> Forward:
    """y for x of shape (M, K), by the given strategy."""
    shared = context(x.shape[0], weight, x)
    if strategy == "assemble" or not terms.adapts_weight:
        w_eff, b_eff, projected = assemble(weight, bias, terms, shared)
        return Forward(F.linear(x, w_eff, b_eff), projected, b_eff)
    projected = project(weight, terms, shared)
    folded = bias_operands(terms, bias)
    y = torch.empty(x.shape[0], weight.shape[0], dtype=x.dtype, device=x.device)
    b_eff = torch.empty(weight.shape[0], dtype=x.dtype, device=x.device) if folded.exists else None
    a, b = a_operand(terms, projected, weight.dtype), b_operand(terms, weight.dtype)
    multiply(x, weight, y, a, b, folded, b_eff, shared)
    return Forward(y, projected, b_eff)


def project(weight: Tensor, terms: Terms, shared: Context) -> Tensor | None:
    """V = W0 Ad where A is a low rank of the matmul product; nothing else is written."""
    if a_operand(terms, None, weight.dtype).kind != ADDED:
        return None
    return _assemble(weight, None, terms, shared, write_weight=False, write_bias=False)[2]


def assemble(
    weight: Tensor, bias: Tensor | None, terms: Terms, shared: Context
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """``(W_eff, b_eff, V)``; an operand that no term changes is returned as it is."""
    write_bias = bias_operands(terms, bias).adapts
    if not terms.adapts_weight and not write_bias:
        return weight, bias, None
    w_eff, b_eff, projected = _assemble(weight, bias, terms, shared, terms.adapts_weight, write_bias)
    return (w_eff if terms.adapts_weight else weight), (b_eff if write_bias else bias), projected


def _assemble(
    weight: Tensor, bias: Tensor | None, terms: Terms, shared: Context, write_weight: bool, write_bias: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    outputs, inputs = weight.shape
    a, b, folded = a_operand(terms, None, weight.dtype), b_operand(terms, weight.dtype), bias_operands(terms, bias)
    if not write_weight:
        b = Operand(NONE)
    c_kind, d, e, has_bias = folded.kinds if write_bias else (NONE, False, False, False)
    tile = shared.tile("assemble", a.rank, b.rank, folded.rank)
    new = weight.new_empty
    w_eff = new(outputs, inputs) if write_weight else None
    b_eff = new(outputs) if write_bias else None
    projected = new(outputs, a.rank, dtype=compute_dtype(weight.dtype)) if a.kind == ADDED else None
    whole_rows = a.kind == ADDED or c_kind != NONE
    share = share_of(inputs, tile, whole_rows or not write_weight)
    left = dense(terms.A.down) if isinstance(terms.A, LowRank) else a.left
    tensors = (weight, w_eff, b_eff, projected, left, a.right, b.left, b.right)
    tensors += (folded.c, folded.cu, folded.bias, folded.d, folded.e)
    left_row = a.left_row if a.kind != ADDED else row_stride(left)
    numbers = (outputs, inputs, share, *weight.stride(), left_row, b.left_row, b.right_rank)
    numbers += (a.right_rank, a.right_column, *folded.strides, a.rank, b.rank, folded.rank)
    constants = (a.kind, b.kind, c_kind, d, e, has_bias, write_weight, write_bias, tile.rows, tile.columns)
    constants += (a.block_rank, b.block_rank, padded_rank(folded.rank), a.dtype, b.dtype)
    constants += (shared.index, shared.numerics.wide, shared.numerics.factors)
    grid = triton.cdiv(outputs, tile.rows) * triton.cdiv(inputs, share)
    launch(assemble_kernel, grid, tensors, numbers, constants, tile)
    return w_eff, b_eff, projected


def share_of(inputs: int, tile: Tile, whole_rows: bool) -> int:
    """Columns that one program walks: all of them where a row is summed up, else a few blocks, to fill the machine."""
    return inputs if whole_rows else tile.columns * SHARE_BLOCKS


SHARE_BLOCKS = 4


def multiply(
    x: Tensor,
    weight: Tensor,
    y: Tensor,
    a: Operand,
    b: Operand,
    folded: BiasOperands | None,
    b_eff: Tensor | None,
    shared: Context,
) -> None:
    """``y = x W_eff^T + b_eff`` with W_eff in registers only; ``weight``, ``a`` and ``b`` may all be transposed."""
    c_kind, d, e, has_bias = (NONE, False, False, False) if folded is None else folded.kinds
    rank_c = 0 if folded is None else folded.rank
    tile = shared.tile("fused", a.rank, b.rank, rank_c)
    tensors = (x, weight, y, b_eff, a.left, a.right, b.left, b.right)
    tensors += (None,) * 5 if folded is None else (folded.c, folded.cu, folded.bias, folded.d, folded.e)
    numbers = (x.shape[0], *weight.shape, *x.stride(), *weight.stride())
    numbers += (a.left_row, a.left_rank, a.right_rank, a.right_column)
    numbers += (b.left_row, b.left_rank, b.right_rank, b.right_column)
    numbers += ((0, 0, 0) if folded is None else folded.strides) + (a.rank, b.rank, rank_c)
    constants = (a.kind, b.kind, c_kind, d, e, has_bias, b_eff is not None)
    constants += (tile.tokens, tile.rows, tile.columns, a.block_rank, b.block_rank, padded_rank(rank_c))
    numerics = shared.numerics
    constants += (a.dtype, b.dtype, shared.index, numerics.wide, numerics.factors, numerics.stream, tile.swap)
    grid = triton.cdiv(x.shape[0], tile.tokens) * triton.cdiv(weight.shape[0], tile.rows)
    launch(fused_kernel, grid, tensors, numbers, constants, tile)
