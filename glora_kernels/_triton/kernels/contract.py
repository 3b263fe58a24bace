"""dW contracted with W0 and the factors, tile by tile.

    H = dW * W0      dAd = H Au^T     dAu = Ad^T H     da = sum_k H (A a value a row)
                     dBd = dW Bu^T    dBu = Bd^T dW    db_n = sum_k dW (B a value a row)
    dc = W0^T db     W_eff as in the forward pass, for dx

dW is read (a dense product wrote it), or with GEMM formed here from dy and x, so that no (N, K) buffer exists.
Every result is linear in dW: sums over columns leave as one slice a block of columns, sums over rows as one a block of
rows, fp32, and ``finish`` adds them up in a fixed order. With ONLY_LOST a program whose rows are all kept does nothing.
"""

import triton
import triton.language as tl
from torch import Tensor

from ..launch import launch
from ..operands import cdiv, padded_rank
from ..run import BackwardRun, stride
from ..tile import LOW_RANK, effective_tile, load_tile, row_part, span, store_tile, sum_slices, term_tile

# Numbers that change from call to call: a new value needs no new build.
VARYING = ["M", "slices", "rank_a", "rank_b", "rank_c", "at_a", "at_au", "at_b", "at_bu", "at_db", "at_dc", "at_cu"]


@triton.jit
def store_factor_gradients(
    tile,  # [BLOCK_N, BLOCK_K]
    left_ptr,
    right_ptr,
    stride_left,
    stride_right,
    down_ptr,  # this block's slice of (slices, N, rank)
    up_ptr,  # this block's slice of (slices, K, rank)
    rows,
    columns,
    rank,
    row_mask,
    mask,
    BLOCK_RANK: tl.constexpr,
    DTYPE: tl.constexpr,
    DOT: tl.constexpr,
):
    """``tile right^T`` and ``left^T tile``."""
    ranks = tl.arange(0, BLOCK_RANK)
    rank_mask = ranks < rank
    right = load_tile(right_ptr, columns, ranks, 1, stride_right, mask, rank_mask).to(DTYPE)
    left = load_tile(left_ptr, ranks, rows, 1, stride_left, rank_mask, row_mask).to(DTYPE)
    operand = tile.to(DTYPE)
    down = tl.dot(operand, right, input_precision=DOT)
    store_tile(down_ptr, down, rows, ranks, rank, 1, row_mask, rank_mask)
    up = tl.dot(left, operand, input_precision=DOT)
    store_tile(up_ptr, up, ranks, columns, 1, rank, rank_mask, mask)


@triton.jit(do_not_specialize=VARYING)
def contract_kernel(
    dw_ptr,  # (N, K) read, contiguous
    dy_ptr,  # (M, N) read with GEMM
    x_ptr,  # (M, K) read with GEMM
    w_ptr,
    w_eff_ptr,  # (N, K) written
    a_ptr,
    au_ptr,
    b_ptr,
    bu_ptr,
    c_ptr,
    lost_ptr,  # (N,) read with ONLY_LOST
    partials_ptr,
    at_a,
    at_au,
    at_b,
    at_bu,
    at_db,
    at_dc,
    at_cu,
    slices,
    M,
    N,
    K,
    stride_ym,
    stride_yn,
    stride_xm,
    stride_xk,
    stride_wn,
    stride_wk,
    stride_a,
    stride_au,
    stride_b,
    stride_bu,
    stride_c,
    rank_a,
    rank_b,
    rank_c,
    A: tl.constexpr,
    B: tl.constexpr,
    GRAD_A: tl.constexpr,
    GRAD_B: tl.constexpr,
    SUM_B: tl.constexpr,
    DC: tl.constexpr,
    DCU: tl.constexpr,  # Cd^T dc
    WRITE_WEIGHT: tl.constexpr,
    GEMM: tl.constexpr,
    ONLY_LOST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    RANK_A: tl.constexpr,
    RANK_B: tl.constexpr,
    RANK_C: tl.constexpr,
    FACTOR_A: tl.constexpr,
    FACTOR_B: tl.constexpr,
    CONTRACT: tl.constexpr,  # the type in which dW meets the factors
    CONTRACT_DOT: tl.constexpr,
    INDEX: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    DOT: tl.constexpr,
):
    column_blocks = tl.cdiv(K, BLOCK_K)
    row_block = (tl.program_id(0) // column_blocks).to(tl.int64)
    column_block = (tl.program_id(0) % column_blocks).to(tl.int64)
    rows, columns = span(row_block * BLOCK_N, BLOCK_N, INDEX), span(column_block * BLOCK_K, BLOCK_K, INDEX)
    row_mask, mask = rows < N, columns < K
    wanted = True
    if ONLY_LOST:
        wanted = tl.max(tl.load(lost_ptr + rows, mask=row_mask, other=0), 0) > 0
    if wanted:
        if GEMM:
            dw = tl.zeros([BLOCK_N, BLOCK_K], dtype=WIDE)
            tl.assume(M > 0)
            for m in range(0, M, BLOCK_M):
                tokens = span(m, BLOCK_M, INDEX)
                token_mask = tokens < M
                dy = load_tile(dy_ptr, tokens, rows, stride_ym, stride_yn, token_mask, row_mask)
                x = load_tile(x_ptr, tokens, columns, stride_xm, stride_xk, token_mask, mask)
                dw = tl.dot(tl.trans(dy), x, dw, input_precision=DOT, out_dtype=WIDE)
        else:
            dw = load_tile(dw_ptr, rows, columns, K, 1, row_mask, mask).to(WIDE)
        if GRAD_B and B == LOW_RANK:
            store_factor_gradients(
                dw,
                b_ptr,
                bu_ptr,
                stride_b,
                stride_bu,
                partials_ptr + at_b + column_block * N * rank_b,
                partials_ptr + at_bu + row_block * K * rank_b,
                rows,
                columns,
                rank_b,
                row_mask,
                mask,
                RANK_B,
                CONTRACT,
                CONTRACT_DOT,
            )
        elif GRAD_B and SUM_B:
            tl.store(partials_ptr + at_b + row_block * column_blocks + column_block, tl.sum(tl.sum(dw, 1), 0))
        elif GRAD_B:
            tl.store(partials_ptr + at_b + column_block * N + rows, tl.sum(dw, 1), mask=row_mask)
        if GRAD_A or DC or WRITE_WEIGHT:
            weight = load_tile(w_ptr, rows, columns, stride_wn, stride_wk, row_mask, mask).to(WIDE)
        if GRAD_A and A == LOW_RANK:
            store_factor_gradients(
                dw * weight,
                a_ptr,
                au_ptr,
                stride_a,
                stride_au,
                partials_ptr + at_a + column_block * N * rank_a,
                partials_ptr + at_au + row_block * K * rank_a,
                rows,
                columns,
                rank_a,
                row_mask,
                mask,
                RANK_A,
                CONTRACT,
                CONTRACT_DOT,
            )
        elif GRAD_A:
            tl.store(partials_ptr + at_a + column_block * N + rows, tl.sum(dw * weight, 1), mask=row_mask)
        if DC:
            db = sum_slices(partials_ptr + at_db, slices, N, rows, row_mask, BLOCK_N, WIDE)
            dc = tl.sum(weight * db[:, None], 0)
            tl.store(partials_ptr + at_dc + row_block * K + columns, dc, mask=mask)
            if DCU:
                ranks = tl.arange(0, RANK_C)
                down = load_tile(c_ptr, columns, ranks, stride_c, 1, mask, ranks < rank_c).to(WIDE)
                at = partials_ptr + at_cu + (row_block * column_blocks + column_block) * rank_c
                tl.store(at + ranks, tl.sum(down * dc[:, None], 0), mask=ranks < rank_c)
        if WRITE_WEIGHT:
            a_rows = row_part(a_ptr, rows, stride_a, 1, rank_a, row_mask, A, RANK_A, FACTOR_A)
            b_rows = row_part(b_ptr, rows, stride_b, 1, rank_b, row_mask, B, RANK_B, FACTOR_B)
            a = term_tile(a_rows, au_ptr, columns, stride_au, 1, rank_a, mask, A, RANK_A, FACTOR_A, WIDE, PRECISION)
            b = term_tile(b_rows, bu_ptr, columns, stride_bu, 1, rank_b, mask, B, RANK_B, FACTOR_B, WIDE, PRECISION)
            store_tile(w_eff_ptr, effective_tile(weight, a, b, A, B), rows, columns, K, 1, row_mask, mask)


def contraction(run: BackwardRun, dw: Tensor | None) -> Tensor | None:
    """See contract.py, from ``dw`` or else from dy and x; returns W_eff if dx is to be formed from it.

    On the route ``solved`` it forms the lost rows of da, and nothing else.
    """
    call, solved = run.call, run.route == "solved"
    outputs, inputs = call.weight.shape
    dy, x = (call.dy, call.x) if dw is None else (None, None)
    writes = dw is not None and call.wants_x
    w_eff = call.weight.new_empty(outputs, inputs) if writes else None
    tile, numerics = run.contract_tile, run.shared.numerics
    launch(
        contract_kernel,
        cdiv(outputs, tile.rows) * cdiv(inputs, tile.columns),
        tile,
        dw_ptr=dw,
        dy_ptr=dy,
        x_ptr=x,
        w_ptr=call.weight,
        w_eff_ptr=w_eff,
        a_ptr=run.a.left,
        au_ptr=run.a.right,
        b_ptr=run.b.left,
        bu_ptr=run.b.right,
        c_ptr=run.prompt.c,
        lost_ptr=run.lost,
        partials_ptr=run.buffer,
        at_a=run.at("exact" if solved else "a"),
        at_au=run.at("au"),
        at_b=run.at("b_sum" if run.has("b_sum") else "b"),
        at_bu=run.at("bu"),
        at_db=run.at("db"),
        at_dc=run.at("dc"),
        at_cu=run.at("cu"),
        slices=run.token_blocks,
        M=call.dy.shape[0],
        N=outputs,
        K=inputs,
        stride_ym=stride(dy, 0),
        stride_yn=stride(dy, 1),
        stride_xm=stride(x, 0),
        stride_xk=stride(x, 1),
        stride_wn=call.weight.stride(0),
        stride_wk=call.weight.stride(1),
        stride_a=run.a.left_row,
        stride_au=run.a.right_rank,
        stride_b=run.b.left_row,
        stride_bu=run.b.right_rank,
        stride_c=run.prompt.stride_c,
        rank_a=run.a.rank,
        rank_b=run.b.rank,
        rank_c=run.prompt.rank,
        A=run.a.form,
        B=run.b.form,
        GRAD_A=True,
        GRAD_B=run.wants("B") and not solved,
        SUM_B=run.has("b_sum") and not solved,
        DC=run.has("dc") and not solved,
        DCU=run.has("cu") and not solved,
        WRITE_WEIGHT=writes,
        GEMM=dw is None,
        ONLY_LOST=solved,
        BLOCK_M=tile.tokens,
        BLOCK_N=tile.rows,
        BLOCK_K=tile.columns,
        RANK_A=run.a.block_rank,
        RANK_B=run.b.block_rank,
        RANK_C=padded_rank(run.prompt.rank),
        FACTOR_A=run.a.dtype,
        FACTOR_B=run.b.dtype,
        CONTRACT=numerics.contract,
        CONTRACT_DOT=numerics.contract_precision,
        INDEX=run.shared.index,
        WIDE=numerics.wide,
        PRECISION=numerics.factors,
        DOT=numerics.stream,
    )
    return w_eff
