"""Partial sums turned into gradients: every slice added up in a fixed order, cast once, zero where nothing is read.

One launch serves all gradients of a layer. What there is to do stands in a small table on the device, one row a
gradient, so that a new path needs no new kernel. A row says which slices to add up and how the elements of the
gradient, which has the shape of its storage, are found in them:

    element o = (c, j) of a storage of ``inner`` columns (or of the transposed right factor, ``up``)
    value     = sum_s partials[source + s * stride + c * width + min(j, width - 1)]    for c < count and j < rank

The gradient of a row scale, solved from the output (SOLVED), is

    da = (t - b_eff db - sum_k B dW) / (1 + a)     and in lost rows the sum formed from dW and W0
"""

import triton
import triton.language as tl
from torch import Tensor

from ...planning.settings import Tile
from .. import jobs as rules
from .. import operands
from ..jobs import FINISH_BLOCK, GradientJob, blocks, table
from ..launch import launch
from ..operands import dense
from ..run import BackwardRun
from ..tile import LOW_RANK, ROW, sum_slices

TABLE_WIDTH = tl.constexpr(12)
TIMES_BIAS = tl.constexpr(rules.TIMES_BIAS)  # D: times b0
TIMES_UP = tl.constexpr(rules.TIMES_UP)  # Cd: times Cu
SOLVED = tl.constexpr(rules.SOLVED)  # A from the output

# Numbers that change from call to call: a new value needs no new build.
VARYING = ["jobs", "N", "slices", "exact_slices", "stride_a", "stride_b", "rank_b", "at_t", "at_db", "at_b", "at_exact"]


@triton.jit
def solve(
    rows,
    mask,
    partials_ptr,
    a_ptr,
    b_ptr,
    b_eff_ptr,
    lost_ptr,
    at_t,
    at_db,
    at_b,
    at_exact,
    slices,
    exact_slices,
    N,
    stride_a,
    stride_b,
    rank_b,
    B: tl.constexpr,
    B_EFF: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
):
    """da of the given rows, [BLOCK]."""
    da = sum_slices(partials_ptr + at_t, slices, N, rows, mask, BLOCK, WIDE)
    if B_EFF:
        db = sum_slices(partials_ptr + at_db, slices, N, rows, mask, BLOCK, WIDE)
        da -= tl.load(b_eff_ptr + rows, mask=mask, other=0.0).to(WIDE) * db
    if B == LOW_RANK:
        for r in range(0, rank_b):
            d_left = sum_slices(partials_ptr + at_b, slices, N * rank_b, rows * rank_b + r, mask, BLOCK, WIDE)
            da -= tl.load(b_ptr + rows * stride_b + r, mask=mask, other=0.0).to(WIDE) * d_left
    elif B == ROW:
        d_rows = sum_slices(partials_ptr + at_b, slices, N, rows, mask, BLOCK, WIDE)
        da -= tl.load(b_ptr + rows * stride_b, mask=mask, other=0.0).to(WIDE) * d_rows
    lost = tl.load(lost_ptr + rows, mask=mask, other=0) > 0
    scale = 1.0 + tl.load(a_ptr + rows * stride_a, mask=mask, other=0.0).to(WIDE)
    exact = sum_slices(partials_ptr + at_exact, exact_slices, N, rows, mask & lost, BLOCK, WIDE)
    return tl.where(lost, exact, da / tl.where(lost, 1.0, scale))


@triton.jit(do_not_specialize=VARYING)
def finish_kernel(
    table_ptr,  # (jobs, TABLE_WIDTH) int64
    partials_ptr,
    grads_ptr,  # all gradients, one after the other: written
    bias_ptr,
    cu_ptr,
    a_ptr,
    b_ptr,
    b_eff_ptr,
    lost_ptr,
    jobs,
    at_t,
    at_db,
    at_b,
    at_exact,
    slices,
    exact_slices,
    N,
    stride_a,
    stride_b,
    rank_b,
    BIAS: tl.constexpr,
    UP: tl.constexpr,
    SOLVE: tl.constexpr,
    B: tl.constexpr,
    B_EFF: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
):
    block = tl.program_id(0)
    job = 0
    for index in range(1, jobs):
        if block >= tl.load(table_ptr + index * TABLE_WIDTH):
            job = index
    row = table_ptr + job * TABLE_WIDTH
    first_block, source, job_slices, stride = tl.load(row), tl.load(row + 1), tl.load(row + 2), tl.load(row + 3)
    target, size, inner, up = tl.load(row + 4), tl.load(row + 5), tl.load(row + 6), tl.load(row + 7)
    width, rank, count, rule = tl.load(row + 8), tl.load(row + 9), tl.load(row + 10), tl.load(row + 11)
    o = (block - first_block) * BLOCK + tl.arange(0, BLOCK)
    c = tl.where(up != 0, o % inner, o // inner)
    j = tl.where(up != 0, o // inner, o % inner)
    mask = (o < size) & (c < count) & (j < rank)
    element = c * width + tl.minimum(j, width - 1)
    value = sum_slices(partials_ptr + source, job_slices, stride, element, mask, BLOCK, WIDE)
    if BIAS:
        if rule == TIMES_BIAS:
            value *= tl.load(bias_ptr + c, mask=mask, other=0.0).to(WIDE)
    if UP:
        if rule == TIMES_UP:
            value *= tl.load(cu_ptr + j, mask=mask, other=0.0).to(WIDE)
    if SOLVE:
        if rule == SOLVED:
            value = solve(
                c,
                mask,
                partials_ptr,
                a_ptr,
                b_ptr,
                b_eff_ptr,
                lost_ptr,
                at_t,
                at_db,
                at_b,
                at_exact,
                slices,
                exact_slices,
                N,
                stride_a,
                stride_b,
                rank_b,
                B,
                B_EFF,
                BLOCK,
                WIDE,
            )
    value = tl.where(mask, value, 0.0)  # not read: zero, whatever a NaN beside it was multiplied with
    tl.store(grads_ptr + target + o, value.to(grads_ptr.dtype.element_ty), mask=o < size)


FINISH_TILE = Tile(0, FINISH_BLOCK, 0, 4, 2)


def finish(run: BackwardRun, jobs: tuple[GradientJob, ...], grads: Tensor) -> None:
    """See finish.py: the jobs' gradients, one after the other in ``grads``."""
    call, solved = run.call, run.route == "solved"
    asked = {job.rule for job in jobs}
    launch(
        finish_kernel,
        blocks(jobs),
        FINISH_TILE,
        table_ptr=table(jobs, grads.device),
        partials_ptr=run.buffer,
        grads_ptr=grads,
        bias_ptr=None if call.bias is None else dense(call.bias),
        cu_ptr=run.prompt.cu,
        a_ptr=run.a.left if solved else None,
        b_ptr=run.b.left if solved else None,
        b_eff_ptr=call.b_eff if solved else None,
        lost_ptr=run.lost,
        jobs=len(jobs),
        at_t=run.at("t"),
        at_db=run.at("db"),
        at_b=run.at("b"),
        at_exact=run.at("exact"),
        slices=run.token_blocks,
        exact_slices=run.of("exact").number,
        N=call.weight.shape[0],
        stride_a=run.a.left_row,
        stride_b=run.b.left_row,
        rank_b=run.b.rank,
        BIAS=rules.TIMES_BIAS in asked,
        UP=rules.TIMES_UP in asked,
        SOLVE=solved,
        B=run.b.form if solved else operands.NONE,
        B_EFF=solved and call.b_eff is not None,
        BLOCK=FINISH_BLOCK,
        WIDE=run.shared.numerics.wide,
    )
