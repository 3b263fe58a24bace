"""The gradients of thin terms and of the bias in one pass over dy and x.

A term adds ``left right`` to W_eff: Bd Bu, or V Au where A is a low rank of the matmul product. With dW = dy^T x, which
is never formed:

    P = x right^T  (M, R)        d left  = dy^T P  (N, R)
    Q = dy left    (M, R)        d right = Q^T x   (R, K)

For B as one value per row, right is a row of ones: P = sum_k x. The bias needs ``db = sum_m dy``. Where A scales inputs
(W_eff = W0 diag(1 + a) + B), with g = dy W0 (M, K) given:

    dx = g (1 + a) + Q right     da = sum_m x g

Where A scales rows, and its gradient is solved from the output y: ``t = sum_m dy y`` (N,).

A program owns BLOCK_M tokens: it walks x for P, then dy, then x again (out of the cache) for d right. A walk that
nothing needs has no steps. Sums over tokens leave as one slice per program, (programs, N, R) and the like in fp32;
``finish`` adds them up in a fixed order. Where the padded rank of B has a column to spare, P has ones there (ONES):
``dy^T P`` then holds db too. That is exact in half types alone, since others may be rounded to TF32 first.
Other shapes are in kernels/__init__.py.
"""

import triton
import triton.language as tl

from ..tile import ADDED, COLUMN, LOW_RANK, NONE, ROW, UNWANTED, load_tile, span, store_tile, sum_of_products

# Numbers that change from call to call: a new value needs no new build.
PLACES = ["at_db", "at_db_sum", "at_db_bias", "at_t", "at_a", "at_au", "at_b", "at_b_sum", "at_bu"]
VARYING = ["M", "rank_a", "rank_b", "stride_a", "stride_b", *PLACES]


@triton.jit
def thin_product(
    tile,  # [tokens, columns] of x or dy
    ptr,  # factor (columns, R), read
    columns,  # indices of the block's columns
    stride_column,  # factor: to the next column of the tile
    stride_rank,  # factor: to the next rank
    rank,  # ranks that are read
    mask,  # where columns are inside the matrix
    acc,  # [tokens, BLOCK_RANK], the sum so far
    BLOCK_RANK: tl.constexpr,  # rank, padded
    DOT: tl.constexpr,  # input_precision of the product
):
    """``acc + tile factor`` over a block of columns, [tokens, BLOCK_RANK]; the factor takes the type of the tile."""
    ranks = tl.arange(0, BLOCK_RANK)
    factor = load_tile(ptr, columns, ranks, stride_column, stride_rank, mask, ranks < rank)
    return tl.dot(tile, factor.to(tile.dtype), acc, input_precision=DOT, out_dtype=acc.dtype)


@triton.jit
def store_slice(ptr, tile, thin, block, columns, size, rank, mask, BLOCK_RANK: tl.constexpr, DOT: tl.constexpr):
    """Store ``tile^T thin``, (columns, rank), in slice ``block`` of (slices, size, rank) at ``ptr``; size: N or K.

    ``tile`` is [tokens, columns] of dy or x; ``thin`` is P or Q, [tokens, BLOCK_RANK], and takes the type of ``tile``.
    The other parameters are those of ``thin_product``. Returns the product with all its columns, those too that are
    not stored.
    """
    ranks = tl.arange(0, BLOCK_RANK)
    product = tl.dot(tl.trans(tile), thin.to(tile.dtype), input_precision=DOT)
    store_tile(ptr + block * size * rank, product, columns, ranks, rank, 1, mask, ranks < rank)
    return product


@triton.jit(do_not_specialize=VARYING)
def token_pass_kernel(
    x_ptr,  # x (M, K), read if A or B needs it
    dy_ptr,  # dy (M, N), read
    other_ptr,  # y (M, N) with OUTPUT; g = dy W0 (M, K) if A is COLUMN; contiguous, read
    dx_ptr,  # dx (M, K), contiguous, written with WRITE_DX
    a_ptr,  # V (N, R), read if A is ADDED; a over the inputs (K,), read if A is COLUMN and with WRITE_DX
    au_ptr,  # Au (R, K), read if A is ADDED
    b_ptr,  # Bd (N, R), read if B is LOW_RANK; or a value per row (N,), read with WRITE_DX
    bu_ptr,  # Bu (R, K), read if B is LOW_RANK
    bias_ptr,  # b0 (N,), read for at_db_bias
    partials_ptr,  # buffer of partial sums, written: one slice per program. At UNWANTED: nobody wants the sum
    at_db,  # db (programs, N)
    at_db_sum,  # sum_n db (programs,), for a constant E
    at_db_bias,  # sum_n db b0 (programs,), for a constant D
    at_t,  # t = sum_m dy y (programs, N)
    at_a,  # dV (programs, N, R) if A is ADDED; da (programs, K) if COLUMN; (programs,) with SUM_A
    at_au,  # dAu (programs, K, R)
    at_b,  # dBd (programs, N, R), or sum_k dW (programs, N)
    at_b_sum,  # sum of dW over rows and columns (programs,)
    at_bu,  # dBu (programs, K, R)
    M,  # tokens
    N,  # outputs: rows of W0
    K,  # inputs: columns of W0
    stride_xm,  # x: to the next token
    stride_xk,  # x: to the next input
    stride_ym,  # dy: to the next token
    stride_yn,  # dy: to the next output
    stride_a,  # a_ptr: to the next row of V or the next input; 0 repeats a constant
    stride_au,  # Au: to the next rank
    stride_b,  # b_ptr: to the next row; 0 repeats a constant
    stride_bu,  # Bu: to the next rank
    rank_a,  # ranks of A that are read; its storage may hold more
    rank_b,  # ranks of B that are read; 1 of a value per row, 0 without B
    A: tl.constexpr,  # NONE if the gradient of A is not formed here, else ADDED or COLUMN (tile.py)
    B: tl.constexpr,  # form of B: ROW or LOW_RANK
    THIN_B: tl.constexpr,  # whether the factors of B meet dW: for their gradients, or to solve for da
    SUM_A: tl.constexpr,  # whether A is a constant: its gradient is one number per slice
    BIAS: tl.constexpr,  # whether there is a b0
    ONES: tl.constexpr,  # whether db comes from P, whose last column is free for it: only with THIN_B
    OUTPUT: tl.constexpr,  # whether t is formed, from the output y
    WRITE_DX: tl.constexpr,  # whether dx is formed, from g
    BLOCK_M: tl.constexpr,  # tokens per program
    BLOCK_N: tl.constexpr,  # outputs per step
    BLOCK_K: tl.constexpr,  # inputs per step
    RANK_A: tl.constexpr,  # rank_a padded to a power of two, at least 16
    RANK_B: tl.constexpr,  # rank_b padded likewise
    INDEX: tl.constexpr,  # type of offsets: int64 if one could pass 2^31, else int32
    WIDE: tl.constexpr,  # type of sums: fp32, or fp64 for fp64 layers
    DOT: tl.constexpr,  # input_precision of products with x or dy
):
    # 64 bits, since a slice may begin beyond 2^31 in the buffer.
    block = tl.program_id(0).to(tl.int64)
    tokens = span(block * BLOCK_M, BLOCK_M, INDEX)
    token_mask = tokens < M
    sums_bias = (at_db != UNWANTED) | (at_db_sum != UNWANTED) | (at_db_bias != UNWANTED)
    sums_rows = (at_b != UNWANTED) | (at_b_sum != UNWANTED)  # of dW, for a B of one value per row
    tl.assume(K > 0)
    tl.assume(N > 0)

    # First walk, over x: P = x right^T.
    p_a = tl.zeros([BLOCK_M, RANK_A], dtype=WIDE)
    p_b = tl.zeros([BLOCK_M, RANK_B], dtype=WIDE)
    x_sum = tl.zeros([BLOCK_M], dtype=WIDE)
    inputs = K
    if A != ADDED and not THIN_B:
        inputs = tl.where(sums_rows, K, 0)
    for k in range(0, inputs, BLOCK_K):
        columns = span(k, BLOCK_K, INDEX)
        mask = columns < K
        x = load_tile(x_ptr, tokens, columns, stride_xm, stride_xk, token_mask, mask)
        if A == ADDED:
            p_a = thin_product(x, au_ptr, columns, 1, stride_au, rank_a, mask, p_a, RANK_A, DOT)
        if THIN_B:
            p_b = thin_product(x, bu_ptr, columns, 1, stride_bu, rank_b, mask, p_b, RANK_B, DOT)
        elif sums_rows:
            x_sum += tl.sum(x.to(WIDE), 1)
    if ONES:  # then the last column of dy^T P is the sum of dy over tokens
        p_b = tl.where(tl.arange(0, RANK_B)[None, :] == RANK_B - 1, 1.0, p_b)

    # Second walk, over dy: db, t, d left = dy^T P, and Q = dy left.
    q_a = tl.zeros([BLOCK_M, RANK_A], dtype=WIDE)
    q_b = tl.zeros([BLOCK_M, RANK_B], dtype=WIDE)
    y_sum = tl.zeros([BLOCK_M], dtype=WIDE)
    db_sum = tl.zeros([BLOCK_N], dtype=WIDE)
    db_bias = tl.zeros([BLOCK_N], dtype=WIDE)
    b_sum = tl.zeros([BLOCK_N], dtype=WIDE)
    outputs = N
    if A != ADDED and B == ROW and not OUTPUT:
        needed = sums_bias | sums_rows
        if WRITE_DX:
            needed = needed | (rank_b > 0)
        outputs = tl.where(needed, N, 0)
    for n in range(0, outputs, BLOCK_N):
        rows = span(n, BLOCK_N, INDEX)
        mask = rows < N
        dy = load_tile(dy_ptr, tokens, rows, stride_ym, stride_yn, token_mask, mask)
        if OUTPUT:
            y = load_tile(other_ptr, tokens, rows, N, 1, token_mask, mask)
            t = sum_of_products(dy.to(WIDE), y.to(WIDE), 0)
            tl.store(partials_ptr + at_t + block * N + rows, t, mask=mask)
        if A == ADDED:
            store_slice(partials_ptr + at_a, dy, p_a, block, rows, N, rank_a, mask, RANK_A, DOT)
            q_a = thin_product(dy, a_ptr, rows, stride_a, 1, rank_a, mask, q_a, RANK_A, DOT)
        if THIN_B:
            d_left = store_slice(partials_ptr + at_b, dy, p_b, block, rows, N, rank_b, mask, RANK_B, DOT)
        elif sums_rows:
            d_rows = sum_of_products(dy.to(WIDE), x_sum[:, None], 0)
            b_sum += d_rows
            tl.store(partials_ptr + at_b + block * N + rows, d_rows, mask=mask & (at_b != UNWANTED))
        if sums_bias:
            if ONES:
                db = tl.sum(tl.where(tl.arange(0, RANK_B)[None, :] == RANK_B - 1, d_left, 0.0), 1)
            else:
                db = tl.sum(dy.to(WIDE), 0)
            db_sum += db
            if at_db != UNWANTED:
                tl.store(partials_ptr + at_db + block * N + rows, db, mask=mask)
            if BIAS and at_db_bias != UNWANTED:
                db_bias += db * tl.load(bias_ptr + rows, mask=mask, other=0.0).to(WIDE)
        if B == LOW_RANK:
            q_b = thin_product(dy, b_ptr, rows, stride_b, 1, rank_b, mask, q_b, RANK_B, DOT)
        elif WRITE_DX:
            if rank_b > 0:
                values = tl.load(b_ptr + rows * stride_b, mask=mask, other=0.0).to(WIDE)
                y_sum += sum_of_products(dy.to(WIDE), values[None, :], 1)
    if at_db_sum != UNWANTED:
        tl.store(partials_ptr + at_db_sum + block, tl.sum(db_sum, 0))
    if at_db_bias != UNWANTED:
        tl.store(partials_ptr + at_db_bias + block, tl.sum(db_bias, 0))
    if at_b_sum != UNWANTED:
        tl.store(partials_ptr + at_b_sum + block, tl.sum(b_sum, 0))

    # Third walk, over x again: d right = Q^T x, and da and dx where A scales inputs.
    a_sum = tl.zeros([BLOCK_K], dtype=WIDE)
    if A != NONE or THIN_B:
        for k in range(0, K, BLOCK_K):
            columns = span(k, BLOCK_K, INDEX)
            mask = columns < K
            x = load_tile(x_ptr, tokens, columns, stride_xm, stride_xk, token_mask, mask)
            if A == ADDED:
                store_slice(partials_ptr + at_au, x, q_a, block, columns, K, rank_a, mask, RANK_A, DOT)
            if THIN_B:
                store_slice(partials_ptr + at_bu, x, q_b, block, columns, K, rank_b, mask, RANK_B, DOT)
            if A == COLUMN:
                g = load_tile(other_ptr, tokens, columns, K, 1, token_mask, mask).to(WIDE)
                da = sum_of_products(x.to(WIDE), g, 0)
                if SUM_A:
                    a_sum += da
                else:
                    tl.store(partials_ptr + at_a + block * K + columns, da, mask=mask)
                if WRITE_DX:
                    scale = 1.0 + tl.load(a_ptr + columns * stride_a, mask=mask, other=0.0).to(WIDE)
                    dx = g * scale[None, :]
                    if B == LOW_RANK:
                        ranks = tl.arange(0, RANK_B)
                        right = load_tile(bu_ptr, ranks, columns, stride_bu, 1, ranks < rank_b, mask).to(x.dtype)
                        dx = tl.fma(g, scale[None, :], tl.dot(q_b.to(x.dtype), right, input_precision=DOT))
                    else:
                        dx += y_sum[:, None]
                    store_tile(dx_ptr, dx, tokens, columns, K, 1, token_mask, mask)
    if SUM_A:
        tl.store(partials_ptr + at_a + block, tl.sum(a_sum, 0))
