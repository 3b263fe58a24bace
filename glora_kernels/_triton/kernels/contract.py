"""dW contracted with W0 and the factors of the terms, tile by tile.

    H = dW * W0      dAd = H Au^T     dAu = Ad^T H     da_n = sum_k H_nk     (A one value per row)
                     dBd = dW Bu^T    dBu = Bd^T dW           sum_k dW_nk    (B one value per row)
    dc = W0^T db     dCu = Cd^T dc    W_eff as in the forward pass, for dx

The shapes are in kernels/__init__.py. dW is read (a dense product wrote it), or with GEMM formed here from dy and x, so
that no (N, K) buffer exists. A program owns one tile of dW. Sums over columns leave as one slice per block of columns,
sums over rows as one per block of rows, in fp32; ``finish`` adds them up in a fixed order. That is possible since every
result is linear in dW or db. With ONLY_LOST a program whose rows are all kept does nothing.
"""

import triton
import triton.language as tl

from ..tile import (
    LOW_RANK,
    UNWANTED,
    effective_tile,
    load_tile,
    row_part,
    span,
    store_tile,
    sum_of_products,
    sum_slices,
    term_tile,
)

# Numbers that change from call to call: a new value needs no new build.
PLACES = ["at_a", "at_au", "at_b", "at_b_sum", "at_bu", "at_db", "at_dc", "at_cu", "at_lost"]
STRIDES = ["stride_a", "stride_b", "stride_c"]  # of a storage: its rank, 1 or 0
VARYING = ["M", "slices", "rank_a", "rank_b", "rank_c", *PLACES, *STRIDES]


@triton.jit
def store_factor_gradients(
    tile,  # [BLOCK_N, BLOCK_K] of dW for B, of H for A
    left_ptr,  # Ad or Bd (N, R), read
    right_ptr,  # Au or Bu (R, K), read
    stride_left,  # left factor: to the next row
    stride_right,  # right factor: to the next rank
    down_ptr,  # slice of this block of columns, (N, R), written
    up_ptr,  # slice of this block of rows, (K, R), written
    rows,  # indices of the tile's rows, [BLOCK_N]
    columns,  # indices of its columns, [BLOCK_K]
    rank,  # ranks that are read
    row_mask,  # rows < N
    mask,  # columns < K
    BLOCK_RANK: tl.constexpr,  # rank, padded
    DTYPE: tl.constexpr,  # type of both sides of the products
    DOT: tl.constexpr,  # input_precision of the products
):
    """Store ``tile right^T`` and ``left^T tile``: what this tile adds to the gradients of left and right."""
    ranks = tl.arange(0, BLOCK_RANK)
    rank_mask = ranks < rank
    # Loaded through exchanged strides: these are right^T, [BLOCK_K, BLOCK_RANK], and left^T.
    right = load_tile(right_ptr, columns, ranks, 1, stride_right, mask, rank_mask).to(DTYPE)
    left = load_tile(left_ptr, ranks, rows, 1, stride_left, rank_mask, row_mask).to(DTYPE)
    operand = tile.to(DTYPE)
    down = tl.dot(operand, right, input_precision=DOT)
    store_tile(down_ptr, down, rows, ranks, rank, 1, row_mask, rank_mask)
    up = tl.dot(left, operand, input_precision=DOT)
    store_tile(up_ptr, up, ranks, columns, 1, rank, rank_mask, mask)


@triton.jit(do_not_specialize=VARYING)
def contract_kernel(
    dw_ptr,  # dW (N, K), contiguous, read without GEMM
    dy_ptr,  # dy (M, N), read with GEMM
    x_ptr,  # x (M, K), read with GEMM
    w_ptr,  # W0 (N, K), read
    w_eff_ptr,  # W_eff (N, K), contiguous, written if WRITE_WEIGHT
    a_ptr,  # Ad (N, R), read; or a (N,), read with WRITE_WEIGHT
    au_ptr,  # Au (R, K), read if A is LOW_RANK
    b_ptr,  # Bd (N, R), read with THIN_B or WRITE_WEIGHT; or a value per row (N,), read with WRITE_WEIGHT
    bu_ptr,  # Bu (R, K), read if B is LOW_RANK, with THIN_B or WRITE_WEIGHT
    c_ptr,  # Cd (K, R), read for at_cu
    partials_ptr,  # buffer of partial sums: db and lost are read, the rest written. At UNWANTED: not formed
    at_a,  # dAd (column blocks, N, R), or da (column blocks, N)
    at_au,  # dAu (row blocks, K, R)
    at_b,  # dBd (column blocks, N, R); or sum_k dW (column blocks, N)
    at_b_sum,  # sum of dW over rows and columns (tiles,), for a constant B
    at_bu,  # dBu (row blocks, K, R)
    at_db,  # db (slices, N), from the token pass
    at_dc,  # dc (row blocks, K)
    at_cu,  # Cd^T dc (tiles, R); only with dc
    at_lost,  # lost (N,), read with ONLY_LOST: 1 where the row of da is lost
    slices,  # slices of db in the buffer: blocks of tokens
    M,  # tokens
    N,  # outputs: rows of W0
    K,  # inputs: columns of W0
    stride_ym,  # dy: to the next token
    stride_yn,  # dy: to the next output
    stride_xm,  # x: to the next token
    stride_xk,  # x: to the next input
    stride_wn,  # W0: to the next row
    stride_wk,  # W0: to the next column
    stride_a,  # a_ptr: to the next row
    stride_au,  # Au: to the next rank
    stride_b,  # b_ptr: to the next row; 0 repeats a constant
    stride_bu,  # Bu: to the next rank
    stride_c,  # Cd: to the next row
    rank_a,  # ranks of A that are read; its storage may hold more. 1 of a vector
    rank_b,  # ranks of B that are read; 1 of a vector or constant, 0 without B
    rank_c,  # ranks of C that are read
    A: tl.constexpr,  # form of A: ROW or LOW_RANK
    B: tl.constexpr,  # form of B: ROW or LOW_RANK
    THIN_B: tl.constexpr,  # whether the gradients of the factors of B are formed
    WRITE_WEIGHT: tl.constexpr,  # whether W_eff is formed, for dx
    GEMM: tl.constexpr,  # whether dW is formed here, from dy and x
    ONLY_LOST: tl.constexpr,  # whether blocks of rows without a lost row are skipped
    BLOCK_M: tl.constexpr,  # tokens per step of the sum dy^T x
    BLOCK_N: tl.constexpr,  # rows per tile
    BLOCK_K: tl.constexpr,  # columns per tile
    RANK_A: tl.constexpr,  # rank_a padded to a power of two, at least 16
    RANK_B: tl.constexpr,  # rank_b padded likewise
    RANK_C: tl.constexpr,  # rank_c padded likewise
    FACTOR_A: tl.constexpr,  # type in which the factors of A meet
    FACTOR_B: tl.constexpr,  # type in which the factors of B meet
    CONTRACT: tl.constexpr,  # type in which dW meets the factors (why: planning/numerics.py)
    CONTRACT_DOT: tl.constexpr,  # input_precision of those products
    INDEX: tl.constexpr,  # type of offsets: int64 if one could pass 2^31, else int32
    WIDE: tl.constexpr,  # type of sums and of W_eff before rounding: fp32, or fp64 for fp64 layers
    PRECISION: tl.constexpr,  # input_precision of products of factors, for W_eff
    DOT: tl.constexpr,  # input_precision of products with x or dy
):
    column_blocks = tl.cdiv(K, BLOCK_K)
    # 64 bits, since a slice may begin beyond 2^31 in the buffer.
    row_block = (tl.program_id(0) // column_blocks).to(tl.int64)
    column_block = (tl.program_id(0) % column_blocks).to(tl.int64)
    rows, columns = span(row_block * BLOCK_N, BLOCK_N, INDEX), span(column_block * BLOCK_K, BLOCK_K, INDEX)
    row_mask, mask = rows < N, columns < K
    # Where no row of the block is lost, nobody reads its sums.
    wanted = True
    if ONLY_LOST:
        wanted = tl.max(tl.load(partials_ptr + at_lost + rows, mask=row_mask, other=0.0), 0) > 0
    if wanted:
        if GEMM:  # this tile of dW = dy^T x, in the order of the tokens
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
        # dBd and dBu. If B is one value per row, sum_k dW; if it is a constant, the sum of the tile.
        if THIN_B:
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
        elif not ONLY_LOST:
            if at_b_sum != UNWANTED:
                tl.store(partials_ptr + at_b_sum + row_block * column_blocks + column_block, tl.sum(tl.sum(dw, 1), 0))
            if at_b != UNWANTED:
                tl.store(partials_ptr + at_b + column_block * N + rows, tl.sum(dw, 1), mask=row_mask)
        weight = load_tile(w_ptr, rows, columns, stride_wn, stride_wk, row_mask, mask).to(WIDE)
        # The same for A, with H = dW * W0 in place of dW.
        if A == LOW_RANK:
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
        else:
            tl.store(partials_ptr + at_a + column_block * N + rows, sum_of_products(dw, weight, 1), mask=row_mask)
        # dc = W0^T db over the rows of this block. db is still in slices of the token pass.
        if not ONLY_LOST and at_dc != UNWANTED:
            db = sum_slices(partials_ptr + at_db, slices, N, rows, row_mask, BLOCK_N, WIDE)
            dc = sum_of_products(weight, db[:, None], 0)
            tl.store(partials_ptr + at_dc + row_block * K + columns, dc, mask=mask)
            if at_cu != UNWANTED:
                ranks = tl.arange(0, RANK_C)
                down = load_tile(c_ptr, columns, ranks, stride_c, 1, mask, ranks < rank_c).to(WIDE)
                at = partials_ptr + at_cu + (row_block * column_blocks + column_block) * rank_c
                tl.store(at + ranks, sum_of_products(down, dc[:, None], 0), mask=ranks < rank_c)
        if WRITE_WEIGHT:
            a_rows = row_part(a_ptr, rows, stride_a, 1, rank_a, row_mask, A, RANK_A, FACTOR_A)
            b_rows = row_part(b_ptr, rows, stride_b, 1, rank_b, row_mask, B, RANK_B, FACTOR_B)
            a = term_tile(a_rows, au_ptr, columns, stride_au, 1, rank_a, mask, A, RANK_A, FACTOR_A, WIDE, PRECISION)
            b = term_tile(b_rows, bu_ptr, columns, stride_bu, 1, rank_b, mask, B, RANK_B, FACTOR_B, WIDE, PRECISION)
            store_tile(w_eff_ptr, effective_tile(weight, a, b, A), rows, columns, K, 1, row_mask, mask)
