"""The forward pass and merging: which kernels run, on what."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from ..precision import tf32_allowed
from ..step import Forward
from ..terms import LowRank, Terms, compute_dtype
from .assemble import assemble_kernel
from .device import architecture, is_hip
from .fused import fused_kernel
from .launch import launch
from .numerics import Numerics, index_type, numerics
from .operands import (
    ADDED,
    NONE,
    BiasOperands,
    Operand,
    a_operand,
    b_operand,
    bias_operands,
    cdiv,
    dense,
    padded_rank,
)
from .settings import Tile, tile_for

SHARE_BLOCKS = 4  # blocks of columns that a program walks where it may choose


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
    writes_bias = bias_operands(terms, bias).adapts
    if not terms.adapts_weight and not writes_bias:
        return weight, bias, None
    w_eff, b_eff, projected = _assemble(weight, bias, terms, shared, terms.adapts_weight, writes_bias)
    return weight if w_eff is None else w_eff, b_eff if writes_bias else bias, projected


def _assemble(
    weight: Tensor, bias: Tensor | None, terms: Terms, shared: Context, write_weight: bool, write_bias: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """What is asked for, by one launch; see assemble.py."""
    outputs, inputs = weight.shape
    a, folded = a_operand(terms, None, weight.dtype), bias_operands(terms if write_bias else Terms(), bias)
    b = b_operand(terms, weight.dtype) if write_weight else Operand(NONE)
    down = dense(terms.A.down) if isinstance(terms.A, LowRank) else a.left
    w_eff = weight.new_empty(outputs, inputs) if write_weight else None
    b_eff = weight.new_empty(outputs) if write_bias else None
    projected = weight.new_empty(outputs, a.rank, dtype=compute_dtype(weight.dtype)) if a.kind == ADDED else None
    tile = shared.tile("assemble", a.rank, b.rank, folded.rank)
    share = share_of(inputs, tile, a.kind == ADDED or folded.c_kind != NONE or not write_weight)
    launch(
        assemble_kernel,
        cdiv(outputs, tile.rows) * cdiv(inputs, share),
        tile,
        w_ptr=weight,
        w_eff_ptr=w_eff,
        b_eff_ptr=b_eff,
        v_ptr=projected,
        a_ptr=down,
        au_ptr=a.right,
        b_ptr=b.left,
        bu_ptr=b.right,
        c_ptr=folded.c,
        cu_ptr=folded.cu,
        bias_ptr=folded.bias,
        d_ptr=folded.d,
        e_ptr=folded.e,
        N=outputs,
        K=inputs,
        share=share,
        stride_wn=weight.stride(0),
        stride_wk=weight.stride(1),
        stride_a=down.shape[1] if isinstance(terms.A, LowRank) and down is not None else a.left_row,
        stride_b=b.left_row,
        stride_bu=b.right_rank,
        stride_au=a.right_rank,
        stride_auk=a.right_column,
        stride_c=folded.stride_c,
        stride_d=folded.stride_d,
        stride_e=folded.stride_e,
        rank_a=a.rank,
        rank_b=b.rank,
        rank_c=folded.rank,
        A=a.kind,
        B=b.kind,
        C=folded.c_kind,
        D=folded.d is not None,
        E=folded.e is not None,
        BIAS=folded.bias is not None,
        WRITE_WEIGHT=write_weight,
        WRITE_BIAS=write_bias,
        BLOCK_N=tile.rows,
        BLOCK_K=tile.columns,
        RANK_A=a.block_rank,
        RANK_B=b.block_rank,
        RANK_C=padded_rank(folded.rank),
        FACTOR_A=a.dtype,
        FACTOR_B=b.dtype,
        INDEX=shared.index,
        WIDE=shared.numerics.wide,
        PRECISION=shared.numerics.factors,
    )
    return w_eff, b_eff, projected


def share_of(inputs: int, tile: Tile, whole_rows: bool) -> int:
    """Columns that one program walks: all of them where a row is summed up, else a few blocks, to fill the machine."""
    return inputs if whole_rows else tile.columns * SHARE_BLOCKS


def multiply(
    x: Tensor,
    weight: Tensor,
    y: Tensor,
    a: Operand,
    b: Operand,
    folded: BiasOperands,
    b_eff: Tensor | None,
    shared: Context,
) -> None:
    """``y = x W_eff^T + b_eff`` with W_eff in registers only; ``weight``, ``a`` and ``b`` may all be transposed."""
    tile = shared.tile("fused", a.rank, b.rank, folded.rank)
    launch(
        fused_kernel,
        cdiv(x.shape[0], tile.tokens) * cdiv(weight.shape[0], tile.rows),
        tile,
        x_ptr=x,
        w_ptr=weight,
        y_ptr=y,
        b_eff_ptr=b_eff,
        a_ptr=a.left,
        au_ptr=a.right,
        b_ptr=b.left,
        bu_ptr=b.right,
        c_ptr=folded.c,
        cu_ptr=folded.cu,
        bias_ptr=folded.bias,
        d_ptr=folded.d,
        e_ptr=folded.e,
        M=x.shape[0],
        OUT=weight.shape[0],
        RED=weight.shape[1],
        stride_xm=x.stride(0),
        stride_xr=x.stride(1),
        stride_wo=weight.stride(0),
        stride_wr=weight.stride(1),
        stride_a=a.left_row,
        stride_ar=a.left_rank,
        stride_au=a.right_rank,
        stride_auc=a.right_column,
        stride_b=b.left_row,
        stride_br=b.left_rank,
        stride_bu=b.right_rank,
        stride_buc=b.right_column,
        stride_c=folded.stride_c,
        stride_d=folded.stride_d,
        stride_e=folded.stride_e,
        rank_a=a.rank,
        rank_b=b.rank,
        rank_c=folded.rank,
        A=a.kind,
        B=b.kind,
        C=folded.c_kind,
        D=folded.d is not None,
        E=folded.e is not None,
        BIAS=folded.bias is not None,
        WRITE_BIAS=b_eff is not None,
        BLOCK_M=tile.tokens,
        BLOCK_O=tile.rows,
        BLOCK_R=tile.columns,
        RANK_A=a.block_rank,
        RANK_B=b.block_rank,
        RANK_C=padded_rank(folded.rank),
        FACTOR_A=a.dtype,
        FACTOR_B=b.dtype,
        INDEX=shared.index,
        WIDE=shared.numerics.wide,
        PRECISION=shared.numerics.factors,
        DOT=shared.numerics.stream,
        SWAP=tile.swap,
    )
