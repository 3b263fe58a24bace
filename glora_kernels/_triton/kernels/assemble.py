"""W_eff and b_eff in one pass over W0, for the forward pass and for merging.

    W_eff = W0 * (1 + A) + B   or   W0 + V Au + B with V = W0 Ad (matmul product)
    b_eff = b0 + b0 * D + E + W0 c

The shapes are in kernels/__init__.py. A program owns BLOCK_N rows. It walks all columns where a sum over them is needed
(V, W0 c), else a share of them. Results are formed in fp32 (fp64 for fp64 layers) and rounded once, when stored.
"""

import triton
import triton.language as tl

from ..tile import (
    ADDED,
    NONE,
    bias_tile,
    effective_tile,
    load_tile,
    prompt_tile,
    row_part,
    span,
    store_tile,
    sum_of_products,
    term_tile,
)

# Numbers that change from call to call: a new value needs no new build.
STRIDES = ["stride_a", "stride_b", "stride_c", "stride_d", "stride_e"]  # of a storage: its rank, 1 or 0
VARYING = ["rank_a", "rank_b", "rank_c", "share", "has_d", "has_e", "writes_bias", *STRIDES]


@triton.jit(do_not_specialize=VARYING)
def assemble_kernel(
    w_ptr,  # W0 (N, K), read
    w_eff_ptr,  # W_eff (N, K), contiguous, written if WRITE_WEIGHT
    b_eff_ptr,  # b_eff (N,), written if writes_bias
    v_ptr,  # V = W0 Ad (N, rank_a), written if A is ADDED
    a_ptr,  # Ad: (N, R), or (K, R) if A is ADDED; or a value per row (N,); read
    au_ptr,  # Au (R, K), or a value per column (K,) if A is COLUMN; read if WRITE_WEIGHT
    b_ptr,  # Bd (N, R), or a value per row (N,); read
    bu_ptr,  # Bu (R, K), read if B is LOW_RANK and WRITE_WEIGHT
    c_ptr,  # Cd (K, R), or c (K,); read
    cu_ptr,  # Cu (R, 1), read if C is a low rank
    bias_ptr,  # b0 (N,), read if BIAS
    d_ptr,  # D (N,), read if has_d
    e_ptr,  # E (N,), read if has_e
    N,  # outputs: rows of W0
    K,  # inputs: columns of W0
    share,  # columns that one program walks
    stride_wn,  # W0: to the next row
    stride_wk,  # W0: to the next column
    stride_a,  # a_ptr: to the next row; 0 repeats a constant
    stride_b,  # b_ptr: to the next row; 0 repeats a constant
    stride_bu,  # Bu: to the next rank
    stride_au,  # Au: to the next rank
    stride_auk,  # au_ptr: to the next column; 0 repeats a constant
    stride_c,  # c_ptr: to the next input
    stride_d,  # D: to the next output; 0 repeats a constant
    stride_e,  # E: to the next output; 0 repeats a constant
    rank_a,  # ranks of A that are read; its storage may hold more. 1 of a vector or constant, 0 without A
    rank_b,  # ranks of B that are read, likewise
    rank_c,  # ranks of C that are read; 0 of a vector
    has_d,  # whether there is a D: 1 or 0
    has_e,  # whether there is an E: 1 or 0
    writes_bias,  # whether b_eff is formed: 1 or 0
    A: tl.constexpr,  # form of A on a tile: ROW, COLUMN, LOW_RANK or ADDED (tile.py)
    B: tl.constexpr,  # form of B on a tile: ROW or LOW_RANK
    C: tl.constexpr,  # form of c: NONE, ROW (a vector), LOW_RANK, or EITHER
    BIAS: tl.constexpr,  # whether there is a b0
    WRITE_WEIGHT: tl.constexpr,  # whether W_eff is formed
    BLOCK_N: tl.constexpr,  # rows per tile
    BLOCK_K: tl.constexpr,  # columns per tile
    RANK_A: tl.constexpr,  # rank_a padded to a power of two, at least 16
    RANK_B: tl.constexpr,  # rank_b padded likewise
    RANK_C: tl.constexpr,  # rank_c padded likewise
    FACTOR_A: tl.constexpr,  # type in which the factors of A meet
    FACTOR_B: tl.constexpr,  # type in which the factors of B meet
    INDEX: tl.constexpr,  # type of offsets: int64 if one could pass 2^31, else int32
    WIDE: tl.constexpr,  # type of sums and of W_eff before rounding: fp32, or fp64 for fp64 layers
    PRECISION: tl.constexpr,  # input_precision of products of factors, and of W0 Ad
):
    # A program is one block of rows and one share of the columns.
    shares = tl.cdiv(K, share)
    row_block, part = tl.program_id(0) // shares, tl.program_id(0) % shares
    rows = span(row_block * BLOCK_N, BLOCK_N, INDEX)
    row_mask = rows < N
    # A share that ends before K is a multiple of BLOCK_K. If this is not said, every load of a tile is of one element.
    first, last = tl.multiple_of(part * share, BLOCK_K), min(K, (part + 1) * share)
    tl.assume(last > first)
    # V = W0 Ad needs every column: here a share is the whole row. V is stored, since backward reads it too.
    if A == ADDED:
        v = tl.zeros([BLOCK_N, RANK_A], dtype=WIDE)
        ranks = tl.arange(0, RANK_A)
        for k in range(0, K, BLOCK_K):
            columns = span(k, BLOCK_K, INDEX)
            weight = load_tile(w_ptr, rows, columns, stride_wn, stride_wk, row_mask, columns < K).to(WIDE)
            down = load_tile(a_ptr, columns, ranks, stride_a, 1, columns < K, ranks < rank_a).to(WIDE)
            v = tl.dot(weight, down, v, input_precision=PRECISION, out_dtype=WIDE)
        store_tile(v_ptr, v, rows, ranks, rank_a, 1, row_mask, ranks < rank_a)
        left = v.to(FACTOR_A)
    else:
        left = row_part(a_ptr, rows, stride_a, 1, rank_a, row_mask, A, RANK_A, FACTOR_A)
    b_rows = row_part(b_ptr, rows, stride_b, 1, rank_b, row_mask, B, RANK_B, FACTOR_B)
    # The second walk forms W0 c, and W_eff tile by tile.
    prompt = tl.zeros([BLOCK_N], dtype=WIDE)
    if WRITE_WEIGHT or C != NONE:
        for k in range(first, last, BLOCK_K):
            columns = span(k, BLOCK_K, INDEX)
            mask = columns < K  # not `last`, of which the compiler knows no multiple
            weight = load_tile(w_ptr, rows, columns, stride_wn, stride_wk, row_mask, mask).to(WIDE)
            if C != NONE:
                c = prompt_tile(c_ptr, cu_ptr, columns, stride_c, rank_c, mask, C, RANK_C, WIDE)
                prompt += sum_of_products(weight, c[None, :], 1)
            if WRITE_WEIGHT:
                a = term_tile(
                    left, au_ptr, columns, stride_au, stride_auk, rank_a, mask, A, RANK_A, FACTOR_A, WIDE, PRECISION
                )
                b = term_tile(b_rows, bu_ptr, columns, stride_bu, 1, rank_b, mask, B, RANK_B, FACTOR_B, WIDE, PRECISION)
                store_tile(w_eff_ptr, effective_tile(weight, a, b, A), rows, columns, K, 1, row_mask, mask)
    # With C a share is the whole row, so this program's W0 c is complete.
    if writes_bias > 0 and part == 0:
        bias = bias_tile(prompt, bias_ptr, d_ptr, e_ptr, rows, stride_d, stride_e, has_d, has_e, row_mask, BIAS, WIDE)
        tl.store(b_eff_ptr + rows, bias.to(b_eff_ptr.dtype.element_ty), mask=row_mask)
