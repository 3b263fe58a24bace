"""Arithmetic on loaded tiles, shared by the kernels: the effective weight, the bias, thin products, partial sums.

A term acts on a tile of the weight in one of five ways. The transposed weight, which dx multiplies by, is the
same tile with rows and columns exchanged, so that no kernel knows which product it computes.
A constant is a vector of stride 0.
"""

import triton
import triton.language as tl

NONE = tl.constexpr(0)
ROW = tl.constexpr(1)  # one value a row of the tile
COLUMN = tl.constexpr(2)  # one value a column
LOW_RANK = tl.constexpr(3)  # left @ right
ADDED = tl.constexpr(4)  # left @ right as well, but of A: added to the weight (matmul product), not multiplied


@triton.jit
def span(first, BLOCK: tl.constexpr, INDEX: tl.constexpr):
    """The indices of a block from ``first`` on. INDEX is int64 where an offset into a matrix could pass 2^31."""
    return (first + tl.arange(0, BLOCK)).to(INDEX)


@triton.jit
def load_tile(ptr, rows, columns, stride_row, stride_column, row_mask, column_mask):
    """[rows, columns] of a matrix, zero outside."""
    offsets = rows[:, None] * stride_row + columns[None, :] * stride_column
    return tl.load(ptr + offsets, mask=row_mask[:, None] & column_mask[None, :], other=0.0)


@triton.jit
def store_tile(ptr, value, rows, columns, stride_row, stride_column, row_mask, column_mask):
    """One cast, to the type of the pointer."""
    offsets = rows[:, None] * stride_row + columns[None, :] * stride_column
    tl.store(ptr + offsets, value.to(ptr.dtype.element_ty), mask=row_mask[:, None] & column_mask[None, :])


@triton.jit
def row_part(
    ptr,
    rows,
    stride_row,
    stride_rank,
    rank,
    row_mask,
    KIND: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """What a term needs of its rows: the left factor [rows, BLOCK_RANK], a value a row, or nothing."""
    if KIND == LOW_RANK or KIND == ADDED:
        ranks = tl.arange(0, BLOCK_RANK)
        return load_tile(ptr, rows, ranks, stride_row, stride_rank, row_mask, ranks < rank).to(DTYPE)
    elif KIND == ROW:
        return tl.load(ptr + rows * stride_row, mask=row_mask, other=0.0).to(DTYPE)
    else:
        return 0.0


@triton.jit
def term_tile(
    row_part,
    ptr,
    columns,
    stride_rank,
    stride_column,
    rank,
    column_mask,
    KIND: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    DTYPE: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The term itself, [rows, columns] or what broadcasts to it, in WIDE."""
    if KIND == LOW_RANK or KIND == ADDED:
        ranks = tl.arange(0, BLOCK_RANK)
        right = load_tile(ptr, ranks, columns, stride_rank, stride_column, ranks < rank, column_mask).to(DTYPE)
        return tl.dot(row_part, right, input_precision=PRECISION)
    elif KIND == ROW:
        return row_part.to(WIDE)[:, None]
    elif KIND == COLUMN:
        return tl.load(ptr + columns * stride_column, mask=column_mask, other=0.0).to(WIDE)[None, :]
    else:
        return 0.0


@triton.jit
def effective_tile(weight, a, b, A: tl.constexpr, B: tl.constexpr):
    """``weight * (1 + a) + b``, or ``weight + a + b`` where A is added.

    Written as fused multiply-adds: a plain ``+`` would be folded into the accumulator of the dot that made b,
    and the load of the weight would no longer be pipelined (guides/kernels.md, 3.5).
    """
    if A == ADDED:
        result = tl.fma(weight, 1.0, a)
        if B != NONE:
            result = tl.fma(result, 1.0, b)
    elif A != NONE:
        if B != NONE:
            result = tl.fma(weight, a + 1.0, b)
        else:
            result = tl.fma(weight, a, weight)
    elif B != NONE:
        result = tl.fma(weight, 1.0, b)
    else:
        result = weight
    return result


@triton.jit
def prompt_tile(
    ptr, up_ptr, columns, stride_row, rank, column_mask, C: tl.constexpr, BLOCK_RANK: tl.constexpr, WIDE: tl.constexpr
):
    """c of ``W0 c``, [columns]."""
    if C == LOW_RANK:
        ranks = tl.arange(0, BLOCK_RANK)
        down = load_tile(ptr, columns, ranks, stride_row, 1, column_mask, ranks < rank).to(WIDE)
        up = tl.load(up_ptr + ranks, mask=ranks < rank, other=0.0).to(WIDE)
        return tl.sum(down * up[None, :], 1)
    else:
        return tl.load(ptr + columns * stride_row, mask=column_mask, other=0.0).to(WIDE)


@triton.jit
def bias_tile(
    prompt,
    bias_ptr,
    d_ptr,
    e_ptr,
    rows,
    stride_d,
    stride_e,
    row_mask,
    BIAS: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
    WIDE: tl.constexpr,
):
    """``b0 + b0 * D + E + W0 c``, [rows], given ``W0 c``."""
    result = prompt
    if BIAS:
        bias = tl.load(bias_ptr + rows, mask=row_mask, other=0.0).to(WIDE)
        if D:
            bias = tl.fma(bias, tl.load(d_ptr + rows * stride_d, mask=row_mask, other=0.0).to(WIDE), bias)
        result += bias
    if E:
        result += tl.load(e_ptr + rows * stride_e, mask=row_mask, other=0.0).to(WIDE)
    return result


@triton.jit
def sum_slices(ptr, slices, stride, offsets, mask, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    """Partial sums added up in a fixed order: ``sum_s ptr[s * stride + offsets]``, [BLOCK]."""
    total = tl.zeros([BLOCK], dtype=WIDE)
    for first in range(0, slices, 16):
        index = (first + tl.arange(0, 16)).to(tl.int64)  # slices are many: their offsets may pass 2^31
        total += tl.sum(load_tile(ptr, index, offsets, stride, 1, index < slices, mask), 0)
    return total
