"""Partial sums turned into gradients: slices added up in a fixed order, the sum cast once, zero where nothing is read.

One launch serves all gradients of a layer. A small table on the device says what to do, one row per gradient, so that a
new path needs no new kernel. A row says which slices to add up, and how an element of the gradient, which has the shape
of its storage, is found in them:

    element (c, j) of a storage of ``inner`` columns (or of the transposed right factor, ``up``)
    value     = sum_s partials[source + s * stride + c * width + min(j, width - 1)]    for c < count and j < rank

A table serves every number of tokens: a row has the number of slices, or -1 for one per block of tokens, and how far
each block of tokens moves ``source``.

The rule of a row may multiply the value by b0[c] (TIMES_BIAS, for D) or by Cu[j] (TIMES_UP, for Cd). With the rule
SOLVED it is the gradient of A as a hadamard vector, solved from the output y, where t = sum_m dy y:

    da = (t - b_eff db - sum_k B dW) / (1 + a)     and in lost rows the sum formed from dW and W0

The shapes are in kernels/__init__.py.
"""

import triton
import triton.language as tl

from ...planning import sums
from ..tile import UNWANTED, sum_slices

TABLE_WIDTH = tl.constexpr(13)
TIMES_BIAS = tl.constexpr(sums.TIMES_BIAS)  # D: times b0
TIMES_UP = tl.constexpr(sums.TIMES_UP)  # Cd: times Cu
SOLVED = tl.constexpr(sums.SOLVED)  # A from the output

# Numbers that change from call to call: a new value needs no new build.
PLACES = ["at_t", "at_db", "at_b", "at_lost", "at_exact"]
VARYING = ["jobs", "N", "slices", "exact_slices", "stride_a", "stride_b", "rank_b", *PLACES]


@triton.jit
def solve(
    rows,  # indices n, [BLOCK]
    mask,  # which of them are wanted, [BLOCK]
    partials_ptr,  # buffer of partial sums, read
    a_ptr,  # a (N,), read
    b_ptr,  # Bd (N, R), or a value per row (N,); read
    b_eff_ptr,  # b_eff (N,), read if db is there
    at_t,  # t = sum_m dy y (slices, N)
    at_db,  # db (slices, N); UNWANTED where the layer has no b_eff
    at_b,  # dBd (slices, N, R), or sum_k dW (slices, N)
    at_lost,  # lost (N,): 1 where the row is lost
    at_exact,  # da of lost rows, from dW and W0 (exact_slices, N)
    slices,  # slices of t, db and at_b: blocks of tokens
    exact_slices,  # slices of at_exact: blocks of columns
    N,  # outputs
    stride_a,  # a: to the next row
    stride_b,  # b_ptr: to the next row; 0 repeats a constant
    rank_b,  # ranks of B that are read; 1 of a value per row, 0 without B
    BLOCK: tl.constexpr,  # elements per program
    WIDE: tl.constexpr,  # type of sums: fp32, or fp64 for fp64 layers
):
    """da of the given rows, [BLOCK], by the equation above."""
    da = sum_slices(partials_ptr + at_t, slices, N, rows, mask, BLOCK, WIDE)
    if at_db != UNWANTED:
        db = sum_slices(partials_ptr + at_db, slices, N, rows, mask, BLOCK, WIDE)
        da -= tl.load(b_eff_ptr + rows, mask=mask, other=0.0).to(WIDE) * db
    # sum_k B dW = sum_r Bd dBd, since dBd = dW Bu^T; a value per row is a Bd of rank 1, and Bu a row of ones.
    for r in range(0, rank_b):
        d_left = sum_slices(partials_ptr + at_b, slices, N * rank_b, rows * rank_b + r, mask, BLOCK, WIDE)
        da -= tl.load(b_ptr + rows * stride_b + r, mask=mask, other=0.0).to(WIDE) * d_left
    # Exact sums are read for lost rows alone: where a block has none, they were never written.
    # A lost row may have 1 + a = 0: it divides by 1, and takes the exact sum.
    lost = tl.load(partials_ptr + at_lost + rows, mask=mask, other=0.0) > 0
    scale = 1.0 + tl.load(a_ptr + rows * stride_a, mask=mask, other=0.0).to(WIDE)
    exact = sum_slices(partials_ptr + at_exact, exact_slices, N, rows, mask & lost, BLOCK, WIDE)
    return tl.where(lost, exact, da / tl.where(lost, 1.0, scale))


@triton.jit(do_not_specialize=VARYING)
def finish_kernel(
    table_ptr,  # (jobs, TABLE_WIDTH) int64, read: one row per gradient
    partials_ptr,  # buffer of partial sums, read
    grads_ptr,  # all gradients, one after the other, written
    bias_ptr,  # b0 (N,), read by the rule TIMES_BIAS
    cu_ptr,  # Cu (R, 1), read by the rule TIMES_UP
    a_ptr,  # a (N,), read by the rule SOLVED, as all that follows
    b_ptr,  # Bd (N, R), or a value per row (N,)
    b_eff_ptr,  # b_eff (N,), read if db is there
    jobs,  # gradients to make: rows of the table
    at_t,  # t = sum_m dy y (slices, N)
    at_db,  # db (slices, N); UNWANTED where the layer has no b_eff
    at_b,  # dBd (slices, N, R), or sum_k dW (slices, N)
    at_lost,  # lost (N,): 1 where the row is lost
    at_exact,  # da of lost rows, from dW and W0 (exact_slices, N)
    slices,  # slices of t, db and at_b: blocks of tokens
    exact_slices,  # slices of at_exact: blocks of columns
    N,  # outputs
    stride_a,  # a: to the next row
    stride_b,  # b_ptr: to the next row; 0 repeats a constant
    rank_b,  # ranks of B that are read; 1 of a value per row, 0 without B
    BIAS: tl.constexpr,  # whether there is a b0
    BLOCK: tl.constexpr,  # elements per program
    WIDE: tl.constexpr,  # type of sums: fp32, or fp64 for fp64 layers
):
    block = tl.program_id(0)
    # The job of this block: the last one whose first block is not beyond it.
    job = 0
    for index in range(1, jobs):
        if block >= tl.load(table_ptr + index * TABLE_WIDTH):
            job = index
    row = table_ptr + job * TABLE_WIDTH
    first_block, source, job_slices, stride = tl.load(row), tl.load(row + 1), tl.load(row + 2), tl.load(row + 3)
    target, size, inner, up = tl.load(row + 4), tl.load(row + 5), tl.load(row + 6), tl.load(row + 7)
    width, rank, count, rule = tl.load(row + 8), tl.load(row + 9), tl.load(row + 10), tl.load(row + 11)
    # What depends on the number of tokens: where slices begin, and how many there are (-1: one per block of tokens).
    source += slices * tl.load(row + 12)
    job_slices = tl.where(job_slices < 0, slices, job_slices)
    # Row c and column j of the storage; of a right factor (R, columns), c is the column, j the rank. Its sums lie
    # column by column, in many slices: programs walk in their order, and scatter what they store.
    number = (block - first_block) * BLOCK + tl.arange(0, BLOCK)
    across = tl.where(up != 0, size // inner, inner)
    c, j = number // across, number % across
    o = tl.where(up != 0, j * inner + c, number)
    mask = (number < size) & (c < count) & (j < rank)
    # With width 1 every j reads the same sum: dCd[c, j] = dc[c] Cu[j].
    element = c * width + tl.minimum(j, width - 1)
    value = sum_slices(partials_ptr + source, job_slices, stride, element, mask, BLOCK, WIDE)
    if BIAS:
        if rule == TIMES_BIAS:
            value *= tl.load(bias_ptr + c, mask=mask, other=0.0).to(WIDE)
    if rule == TIMES_UP:
        value *= tl.load(cu_ptr + j, mask=mask, other=0.0).to(WIDE)
    if rule == SOLVED:
        value = solve(
            c,
            mask,
            partials_ptr,
            a_ptr,
            b_ptr,
            b_eff_ptr,
            at_t,
            at_db,
            at_b,
            at_lost,
            at_exact,
            slices,
            exact_slices,
            N,
            stride_a,
            stride_b,
            rank_b,
            BLOCK,
            WIDE,
        )
    value = tl.where(mask, value, 0.0)  # what is not read becomes zero, even if it is NaN by now
    tl.store(grads_ptr + target + o, value.to(grads_ptr.dtype.element_ty), mask=number < size)
