"""One pass over W0 in backward: W_eff for dx, and what else needs all of W0 on the way.

    W_eff            as in the forward pass, with V = W0 Ad kept from there
    dc = W0^T db     for C; and dCu = Cd^T dc where C is a low rank
    dAd = W0^T dV    for A as a low rank of the matmul product
    lost (N,)        the rows where da cannot be solved from the output

The shapes are in kernels/__init__.py. db and dV are still slices of ``token_pass``: each program adds up those of its
own rows. Sums over rows leave as one slice per block of rows. ``lost`` compares, on a few tokens p, the scales of two
rounding errors (docs/numerics.md): that of what is taken off the output, and the one allowed for da. A row is kept
if, with ``|Bd| |Bu|`` in place of ``|B|`` (which is no larger) where B is a low rank,

    sum_p |dy| (|b_eff| + |x| |B|^T)   <   loss * |1 + a| sum_p |dy| |x| |W0|^T     and     |t| < inf
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
PLACES = ["at_db", "at_dv", "at_dc", "at_cu", "at_ad", "at_t", "at_lost"]
STRIDES = ["stride_a", "stride_b", "stride_c"]  # of a storage: its rank, 1 or 0
VARYING = ["M", "share", "slices", "rank_a", "rank_b", "rank_c", *PLACES, *STRIDES]


@triton.jit(do_not_specialize=VARYING)
def weight_pass_kernel(
    w_ptr,  # W0 (N, K), read
    w_eff_ptr,  # W_eff (N, K), contiguous, written if WRITE_WEIGHT
    a_ptr,  # Ad (N, R); or V (N, R) if A is ADDED; or a value per row (N,); read
    au_ptr,  # Au (R, K), or a value per column (K,) if A is COLUMN; read with WRITE_WEIGHT
    b_ptr,  # Bd (N, R), or a value per row (N,); read
    bu_ptr,  # Bu (R, K), read if B is LOW_RANK, with WRITE_WEIGHT or PROBE
    c_ptr,  # Cd (K, R), read for at_cu
    x_ptr,  # x (M, K), read with PROBE
    dy_ptr,  # dy (M, N), read with PROBE
    b_eff_ptr,  # b_eff (N,), read with PROBE, if the layer has one: then db is there too
    partials_ptr,  # buffer of partial sums: db, dV and t are read, the rest written
    at_db,  # db (slices, N), read with DC
    at_dv,  # dV (slices, N, R), read with DV
    at_dc,  # dc (row blocks, K), written with DC
    at_cu,  # Cd^T dc (programs, R), for dCu; UNWANTED if C is a vector
    at_ad,  # dAd (row blocks, K, R), written with DV
    at_t,  # t = sum_m dy y (slices, N), read with PROBE
    at_lost,  # lost (N,), written with PROBE: 1 where a row of da is lost, else 0
    slices,  # slices of db, dV and t: blocks of tokens
    M,  # tokens
    N,  # outputs: rows of W0
    K,  # inputs: columns of W0
    share,  # columns that one program walks
    stride_wn,  # W0: to the next row
    stride_wk,  # W0: to the next column
    stride_xm,  # x: to the next token
    stride_xk,  # x: to the next input
    stride_ym,  # dy: to the next token
    stride_yn,  # dy: to the next output
    stride_a,  # a_ptr: to the next row; 0 repeats a constant
    stride_au,  # Au: to the next rank
    stride_auk,  # au_ptr: to the next column; 0 repeats a constant
    stride_b,  # b_ptr: to the next row; 0 repeats a constant
    stride_bu,  # Bu: to the next rank
    stride_c,  # Cd: to the next row
    rank_a,  # ranks of A that are read; its storage may hold more. 1 of a vector or constant, 0 without A
    rank_b,  # ranks of B that are read, likewise
    rank_c,  # ranks of C that are read
    loss,  # largest accepted ratio of the two scales (gradient_routes.ACCEPTED_LOSS)
    A: tl.constexpr,  # form of A on a tile: ROW, COLUMN, LOW_RANK or ADDED (tile.py)
    B: tl.constexpr,  # form of B on a tile: ROW or LOW_RANK
    WRITE_WEIGHT: tl.constexpr,  # whether W_eff is formed, for dx
    DC: tl.constexpr,  # whether dc is formed
    DV: tl.constexpr,  # whether dAd is formed from dV
    PROBE: tl.constexpr,  # whether lost rows are looked for; A is then ROW
    BLOCK_N: tl.constexpr,  # rows per tile
    BLOCK_K: tl.constexpr,  # columns per tile
    RANK_A: tl.constexpr,  # rank_a padded to a power of two, at least 16
    RANK_B: tl.constexpr,  # rank_b padded likewise
    RANK_C: tl.constexpr,  # rank_c padded likewise
    PROBES: tl.constexpr,  # number of tokens p
    FACTOR_A: tl.constexpr,  # type in which the factors of A meet
    FACTOR_B: tl.constexpr,  # type in which the factors of B meet
    INDEX: tl.constexpr,  # type of offsets: int64 if one could pass 2^31, else int32
    WIDE: tl.constexpr,  # type of sums and of W_eff before rounding: fp32, or fp64 for fp64 layers
    PRECISION: tl.constexpr,  # input_precision of products of factors, and of W0^T dV
    ROUGH: tl.constexpr,  # input_precision of the comparison of scales
):
    # A program is one block of rows and one share of the columns.
    shares = tl.cdiv(K, share)
    row_block, part = tl.program_id(0) // shares, tl.program_id(0) % shares
    row_block = row_block.to(tl.int64)  # a slice may begin beyond 2^31 in the buffer
    rows = span(row_block * BLOCK_N, BLOCK_N, INDEX)
    row_mask = rows < N
    # A share that ends before K is a multiple of BLOCK_K. If this is not said, every load of a tile is of one element.
    first, last = tl.multiple_of(part * share, BLOCK_K), min(K, (part + 1) * share)
    tl.assume(last > first)
    a_rows = row_part(a_ptr, rows, stride_a, 1, rank_a, row_mask, A, RANK_A, FACTOR_A)
    b_rows = row_part(b_ptr, rows, stride_b, 1, rank_b, row_mask, B, RANK_B, FACTOR_B)
    ranks_a = tl.arange(0, RANK_A)
    ranks_b = tl.arange(0, RANK_B)
    ranks_c = tl.arange(0, RANK_C)
    # db and dV of these rows, added up from their slices.
    if DC:
        db = sum_slices(partials_ptr + at_db, slices, N, rows, row_mask, BLOCK_N, WIDE)
        d_up = tl.zeros([RANK_C], dtype=WIDE)
    if DV:
        dv = tl.zeros([BLOCK_N, RANK_A], dtype=WIDE)
        at = partials_ptr + at_dv
        for _ in range(0, slices):
            dv += load_tile(at, rows, ranks_a, rank_a, 1, row_mask, ranks_a < rank_a)
            at += N * rank_a
    # Evenly spaced tokens p, and the sums over the columns that the comparison needs of them.
    if PROBE:
        probes = (tl.arange(0, PROBES).to(tl.int64) * M // PROBES).to(INDEX)
        every = probes < M
        through = tl.zeros([PROBES, RANK_B], dtype=WIDE)  # |x| |B's right factor|^T
        x_sum = tl.zeros([PROBES], dtype=WIDE)
        reach = tl.zeros([PROBES, BLOCK_N], dtype=WIDE)  # |x| |W0|^T
    for k in range(first, last, BLOCK_K):
        columns = span(k, BLOCK_K, INDEX)
        mask = columns < K  # not `last`, of which the compiler knows no multiple
        weight = load_tile(w_ptr, rows, columns, stride_wn, stride_wk, row_mask, mask).to(WIDE)
        if WRITE_WEIGHT:
            a = term_tile(
                a_rows, au_ptr, columns, stride_au, stride_auk, rank_a, mask, A, RANK_A, FACTOR_A, WIDE, PRECISION
            )
            b = term_tile(b_rows, bu_ptr, columns, stride_bu, 1, rank_b, mask, B, RANK_B, FACTOR_B, WIDE, PRECISION)
            store_tile(w_eff_ptr, effective_tile(weight, a, b, A), rows, columns, K, 1, row_mask, mask)
        # dc and dAd of these columns, over the rows of this block.
        if DC:
            dc = sum_of_products(weight, db[:, None], 0)
            tl.store(partials_ptr + at_dc + row_block * K + columns, dc, mask=mask)
            if at_cu != UNWANTED:
                down = load_tile(c_ptr, columns, ranks_c, stride_c, 1, mask, ranks_c < rank_c).to(WIDE)
                d_up += sum_of_products(down, dc[:, None], 0)
        if DV:
            d_down = tl.dot(tl.trans(weight), dv, input_precision=PRECISION)
            at = partials_ptr + at_ad + row_block * K * rank_a
            store_tile(at, d_down, columns, ranks_a, rank_a, 1, mask, ranks_a < rank_a)
        # |x| |W0|^T, and of |x| |B|^T what comes before the left factor.
        if PROBE:
            x = tl.abs(load_tile(x_ptr, probes, columns, stride_xm, stride_xk, every, mask).to(WIDE))
            reach = tl.dot(x, tl.trans(tl.abs(weight)), reach, input_precision=ROUGH, out_dtype=WIDE)
            if B == LOW_RANK:
                up = load_tile(bu_ptr, columns, ranks_b, 1, stride_bu, mask, ranks_b < rank_b).to(WIDE)
                through = tl.dot(x, tl.abs(up), through, input_precision=ROUGH, out_dtype=WIDE)
            elif rank_b > 0:
                x_sum += tl.sum(x, 1)
    if DC:  # no rank is stored if C is a vector
        tl.store(partials_ptr + at_cu + (row_block * shares + part) * rank_c + ranks_c, d_up, mask=ranks_c < rank_c)
    # The comparison. Here a share is the whole row, so the sums over columns are complete.
    if PROBE:
        dy = tl.abs(load_tile(dy_ptr, probes, rows, stride_ym, stride_yn, every, row_mask).to(WIDE))
        taken = tl.zeros([PROBES, BLOCK_N], dtype=WIDE)
        if at_db != UNWANTED:
            taken += tl.abs(tl.load(b_eff_ptr + rows, mask=row_mask, other=0.0).to(WIDE))[None, :]
        if B == LOW_RANK:
            taken += tl.dot(through, tl.trans(tl.abs(b_rows.to(WIDE))), input_precision=ROUGH)
        else:
            taken += x_sum[:, None] * tl.abs(b_rows.to(WIDE))[None, :]
        allowed = loss * tl.abs(1.0 + a_rows.to(WIDE)) * sum_of_products(dy, reach, 0)
        t = sum_slices(partials_ptr + at_t, slices, N, rows, row_mask, BLOCK_N, WIDE)
        kept = (sum_of_products(dy, taken, 0) < allowed) & (tl.abs(t) < float("inf"))  # false for NaN
        tl.store(partials_ptr + at_lost + rows, tl.where(kept, 0.0, 1.0), mask=row_mask)
