"""Arithmetic on loaded tiles, shared by the kernels: the effective weight, the bias, partial sums.

A term acts on a tile of the weight in one of four ways. To form dx, a kernel is given the transposed weight: the
same tile with rows and columns exchanged. So no kernel knows which product it computes. A constant is a vector of
stride 0. All strides count elements; ``rank`` is what is read, BLOCK_RANK what the matrix units are given. ``rows``,
``columns`` and ``offsets`` are vectors of indices, each with a mask; ``stride_row`` leads from a row to the next.
"""

import triton
import triton.language as tl

from ..planning import operands, sums

NONE = tl.constexpr(operands.NONE)  # of C alone: an absent A or B is a ROW of rank 0
ROW = tl.constexpr(operands.ROW)  # one value per row of the tile
COLUMN = tl.constexpr(operands.COLUMN)  # one value per column
LOW_RANK = tl.constexpr(operands.LOW_RANK)  # left @ right
EITHER = tl.constexpr(operands.EITHER)  # of C alone: LOW_RANK if its rank is above 0, else ROW
ADDED = tl.constexpr(operands.ADDED)  # V @ Au (matmul product): A is added to the weight, not multiplied with it
UNWANTED = tl.constexpr(sums.UNWANTED)  # the place of a partial sum that is not formed


@triton.jit
def span(first, BLOCK: tl.constexpr, INDEX: tl.constexpr):
    """The BLOCK indices from ``first`` on. INDEX is int64 where an offset into a matrix could pass 2^31."""
    return (first + tl.arange(0, BLOCK)).to(INDEX)


@triton.jit
def load_tile(ptr, rows, columns, stride_row, stride_column, row_mask, column_mask):
    """The tile [rows, columns] of the matrix at ``ptr``; zero where one of the masks is false."""
    offsets = rows[:, None] * stride_row + columns[None, :] * stride_column
    return tl.load(ptr + offsets, mask=row_mask[:, None] & column_mask[None, :], other=0.0)


@triton.jit
def store_tile(ptr, value, rows, columns, stride_row, stride_column, row_mask, column_mask):
    """Store ``value``, [rows, columns], where both masks are true; one cast, to the type of ``ptr``."""
    offsets = rows[:, None] * stride_row + columns[None, :] * stride_column
    tl.store(ptr + offsets, value.to(ptr.dtype.element_ty), mask=row_mask[:, None] & column_mask[None, :])


@triton.jit
def row_part(
    ptr,  # left factor (rows, R), or a value per row (rows,); read
    rows,  # indices of the tile's rows
    stride_row,  # to the next row; 0 repeats a constant
    stride_rank,  # left factor: to the next rank
    rank,  # ranks that are read; 0 of an absent term
    row_mask,  # where rows are inside the matrix
    KIND: tl.constexpr,  # form of the term on the tile
    BLOCK_RANK: tl.constexpr,  # rank, padded
    DTYPE: tl.constexpr,  # type of the result
):
    """What a term needs for the rows of a tile: its left factor [rows, BLOCK_RANK], one value per row, or nothing.

    An absent term is -0 in every row: ``w * (1 + -0)`` and ``w + -0`` are the bits of w, those of -0 too.
    """
    if KIND == LOW_RANK or KIND == ADDED:
        ranks = tl.arange(0, BLOCK_RANK)
        return load_tile(ptr, rows, ranks, stride_row, stride_rank, row_mask, ranks < rank).to(DTYPE)
    elif KIND == ROW:
        value = tl.load(ptr + rows * stride_row, mask=row_mask & (rank > 0), other=0.0).to(DTYPE)
        return tl.where(rank > 0, value, value * -1.0)  # Triton makes +0 of the constant -0.0
    else:
        return 0.0


@triton.jit
def term_tile(
    row_part,  # what row_part returned for the tile's rows
    ptr,  # right factor (R, columns), or a value per column (columns,); read
    columns,  # indices of the tile's columns
    stride_rank,  # right factor: to the next rank
    stride_column,  # to the next column; 0 repeats a constant
    rank,  # ranks that are read
    column_mask,  # where columns are inside the matrix
    KIND: tl.constexpr,  # form of the term on the tile
    BLOCK_RANK: tl.constexpr,  # rank, padded
    DTYPE: tl.constexpr,  # type in which the factors meet
    WIDE: tl.constexpr,  # type of the result: fp32, or fp64 for fp64 layers
    PRECISION: tl.constexpr,  # input_precision of left @ right
):
    """The term itself in WIDE: [rows, columns], or a shape that broadcasts to it."""
    if KIND == LOW_RANK or KIND == ADDED:
        ranks = tl.arange(0, BLOCK_RANK)
        right = load_tile(ptr, ranks, columns, stride_rank, stride_column, ranks < rank, column_mask).to(DTYPE)
        return tl.dot(row_part, right, input_precision=PRECISION)
    elif KIND == ROW:
        return row_part.to(WIDE)[:, None]
    else:
        return tl.load(ptr + columns * stride_column, mask=column_mask, other=0.0).to(WIDE)[None, :]


@triton.jit
def effective_tile(weight, a, b, A: tl.constexpr):
    """``weight * (1 + a) + b``, or ``weight + a + b`` if A is ADDED: [rows, columns], in WIDE as all three are.

    ``a`` and ``b`` are what term_tile returned, A is the form of the first. Written as fused multiply-adds: Triton
    would fold a plain ``+`` into the accumulator of the dot that made b, and would then no longer pipeline the load of
    the weight (from a study that is not in this repository).
    """
    if A == ADDED:
        result = tl.fma(tl.fma(weight, 1.0, a), 1.0, b)
    else:
        result = tl.fma(weight, a + 1.0, b)
    return result


@triton.jit
def prompt_tile(
    ptr, up_ptr, columns, stride_row, rank, column_mask, C: tl.constexpr, BLOCK_RANK: tl.constexpr, WIDE: tl.constexpr
):
    """c of ``W0 c``, [columns]: at ``ptr`` lies c (K,), or if C is LOW_RANK Cd (K, R), with Cu (R, 1) at ``up_ptr``."""
    if C == EITHER:
        if rank > 0:
            c = prompt_tile(ptr, up_ptr, columns, stride_row, rank, column_mask, LOW_RANK, BLOCK_RANK, WIDE)
        else:
            c = prompt_tile(ptr, up_ptr, columns, stride_row, rank, column_mask, ROW, BLOCK_RANK, WIDE)
    elif C == LOW_RANK:
        ranks = tl.arange(0, BLOCK_RANK)
        down = load_tile(ptr, columns, ranks, stride_row, 1, column_mask, ranks < rank).to(WIDE)
        up = tl.load(up_ptr + ranks, mask=ranks < rank, other=0.0).to(WIDE)
        c = sum_of_products(down, up[None, :], 1)
    else:
        c = tl.load(ptr + columns * stride_row, mask=column_mask, other=0.0).to(WIDE)
    return c


@triton.jit
def bias_tile(
    prompt,  # W0 c of the rows, [rows]; zero without C
    bias_ptr,  # b0 (N,), read if BIAS
    d_ptr,  # D (N,), read if has_d
    e_ptr,  # E (N,), read if has_e
    rows,  # indices of the rows
    stride_d,  # D: to the next output; 0 repeats a constant
    stride_e,  # E: to the next output; 0 repeats a constant
    has_d,  # whether there is a D: 1 or 0
    has_e,  # whether there is an E: 1 or 0
    row_mask,  # rows < N
    BIAS: tl.constexpr,  # whether there is a b0
    WIDE: tl.constexpr,  # type of the result: fp32, or fp64 for fp64 layers
):
    """``b0 + b0 * D + E + W0 c``, [rows], given ``W0 c``. What is absent is not a zero: that times inf would be NaN."""
    result = prompt
    if BIAS:
        bias = tl.load(bias_ptr + rows, mask=row_mask, other=0.0).to(WIDE)
        if has_d > 0:
            bias = tl.fma(bias, tl.load(d_ptr + rows * stride_d, mask=row_mask, other=0.0).to(WIDE), bias)
        result += bias
    if has_e > 0:
        result += tl.load(e_ptr + rows * stride_e, mask=row_mask, other=0.0).to(WIDE)
    return result


@triton.jit
def sum_of_products(x, y, axis: tl.constexpr):
    """``sum x * y`` along an axis, the same bits in every lane that holds it.

    A plain product would be fused with the first addition across lanes. Of two lanes each would then round the other's
    product, and not its own.
    """
    return tl.sum(tl.fma(x, y, 0.0), axis)


@triton.jit
def sum_slices(ptr, slices, stride, offsets, mask, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    """``sum_s ptr[s * stride + offsets]`` over ``slices`` slices, in a fixed order, [BLOCK]; zero if not ``mask``."""
    total = tl.zeros([BLOCK], dtype=WIDE)
    for first in range(0, slices, 16):
        index = (first + tl.arange(0, 16)).to(tl.int64)  # slices are many: their offsets may pass 2^31
        total += tl.sum(load_tile(ptr, index, offsets, stride, 1, index < slices, mask), 0)
    return total
