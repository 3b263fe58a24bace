"""A matrix product with a weight that exists only in registers: y, or dx, for few tokens.

    y[m, o] = sum_r x[m, r] W_eff[o, r] + b_eff[o]

In the forward pass x is (M, K), W_eff (N, K) and y (M, N). To form dx (M, K), the kernel is given dy (M, N) as x, and
the weight and its terms with rows and columns exchanged; there is no bias then. So o counts the OUT = N or K rows of
the weight, and r its RED = K or N columns. W_eff is formed tile by tile in fp32, rounded once to the type of x and fed
to the matrix units; the whole of it is never in memory. SWAP forms the product as ``W_eff x^T``, so that the long side
of a small batch is the wide side of the matrix instruction.
"""

import triton
import triton.language as tl

from ..tile import (
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
VARYING = ["M", "rank_a", "rank_b", "rank_c", "has_d", "has_e"]


@triton.jit(do_not_specialize=VARYING)
def fused_kernel(
    x_ptr,  # (M, RED), read: x, or dy to form dx
    w_ptr,  # the weight (OUT, RED), read: W0, or W0^T to form dx
    y_ptr,  # (M, OUT), contiguous, written: y or dx
    b_eff_ptr,  # b_eff (OUT,), written if WRITE_BIAS
    a_ptr,  # left factor (OUT, R): Ad or V, Au^T to form dx; or a value per row (OUT,); read
    au_ptr,  # right factor (R, RED); or a value per column (RED,); read
    b_ptr,  # left factor (OUT, R): Bd, Bu^T to form dx; or a value per row (OUT,); read
    bu_ptr,  # right factor (R, RED); or a value per column (RED,); read
    c_ptr,  # Cd (RED, R), or c (RED,); read
    cu_ptr,  # Cu (R, 1), read if C is LOW_RANK
    bias_ptr,  # b0 (OUT,), read if BIAS
    d_ptr,  # D (OUT,), read if has_d
    e_ptr,  # E (OUT,), read if has_e
    M,  # tokens
    OUT,  # rows of the weight: N, or K to form dx
    RED,  # columns of the weight, summed over: K, or N to form dx
    stride_xm,  # x: to the next token
    stride_xr,  # x: to the next summed index
    stride_wo,  # weight: to the next row
    stride_wr,  # weight: to the next column
    stride_a,  # left factor of A: to the next row; 0 repeats a constant
    stride_ar,  # left factor of A: to the next rank
    stride_au,  # right factor of A: to the next rank
    stride_auc,  # right factor of A: to the next column; 0 repeats a constant
    stride_b,  # left factor of B: to the next row; 0 repeats a constant
    stride_br,  # left factor of B: to the next rank
    stride_bu,  # right factor of B: to the next rank
    stride_buc,  # right factor of B: to the next column; 0 repeats a constant
    stride_c,  # c_ptr: to the next input
    stride_d,  # D: to the next output; 0 repeats a constant
    stride_e,  # E: to the next output; 0 repeats a constant
    rank_a,  # ranks of A that are read; its storage may hold more. 1 of a vector or constant, 0 without A
    rank_b,  # ranks of B that are read, likewise
    rank_c,  # ranks of C that are read; 0 of a vector
    has_d,  # whether there is a D: 1 or 0
    has_e,  # whether there is an E: 1 or 0
    A: tl.constexpr,  # form of A on a tile: ROW, COLUMN, LOW_RANK or ADDED (tile.py)
    B: tl.constexpr,  # form of B on a tile: ROW, COLUMN or LOW_RANK
    C: tl.constexpr,  # form of c: NONE, ROW (a vector) or LOW_RANK
    BIAS: tl.constexpr,  # whether there is a b0
    WRITE_BIAS: tl.constexpr,  # whether b_eff is stored, for backward
    BLOCK_M: tl.constexpr,  # tokens per tile
    BLOCK_O: tl.constexpr,  # rows of the weight per tile
    BLOCK_R: tl.constexpr,  # columns of the weight per tile
    RANK_A: tl.constexpr,  # rank_a padded to a power of two, at least 16
    RANK_B: tl.constexpr,  # rank_b padded likewise
    RANK_C: tl.constexpr,  # rank_c padded likewise
    FACTOR_A: tl.constexpr,  # type in which the factors of A meet
    FACTOR_B: tl.constexpr,  # type in which the factors of B meet
    INDEX: tl.constexpr,  # type of offsets: int64 if one could pass 2^31, else int32
    WIDE: tl.constexpr,  # type of sums and of W_eff before rounding: fp32, or fp64 for fp64 layers
    PRECISION: tl.constexpr,  # input_precision of products of factors
    DOT: tl.constexpr,  # input_precision of products with x or dy
    SWAP: tl.constexpr,  # whether the product is formed as W_eff x^T
):
    out_blocks = tl.cdiv(OUT, BLOCK_O)
    token_block, out_block = tl.program_id(0) // out_blocks, tl.program_id(0) % out_blocks
    tokens, outs = span(token_block * BLOCK_M, BLOCK_M, INDEX), span(out_block * BLOCK_O, BLOCK_O, INDEX)
    token_mask, out_mask = tokens < M, outs < OUT
    tl.assume(RED > 0)  # a loop that may not run keeps the assembler from overlapping matrix instructions
    # What the terms need for these rows of the weight: loaded once, for the whole sum.
    a_rows = row_part(a_ptr, outs, stride_a, stride_ar, rank_a, out_mask, A, RANK_A, FACTOR_A)
    b_rows = row_part(b_ptr, outs, stride_b, stride_br, rank_b, out_mask, B, RANK_B, FACTOR_B)
    prompt = tl.zeros([BLOCK_O], dtype=WIDE)
    if SWAP:
        acc = tl.zeros([BLOCK_O, BLOCK_M], dtype=WIDE)
    else:
        acc = tl.zeros([BLOCK_M, BLOCK_O], dtype=WIDE)
    # The sum over r. W_eff is rounded to the type of x, to the bits that a merged layer multiplies by.
    # Beyond RED x is zero: what W_eff holds there adds nothing, unless a vector or constant is infinite.
    for r in range(0, RED, BLOCK_R):
        reds = span(r, BLOCK_R, INDEX)
        mask = reds < RED
        x = load_tile(x_ptr, tokens, reds, stride_xm, stride_xr, token_mask, mask)
        weight = load_tile(w_ptr, outs, reds, stride_wo, stride_wr, out_mask, mask).to(WIDE)
        if C != NONE:
            c = prompt_tile(c_ptr, cu_ptr, reds, stride_c, rank_c, mask, C, RANK_C, WIDE)
            prompt += sum_of_products(weight, c[None, :], 1)
        a = term_tile(a_rows, au_ptr, reds, stride_au, stride_auc, rank_a, mask, A, RANK_A, FACTOR_A, WIDE, PRECISION)
        b = term_tile(b_rows, bu_ptr, reds, stride_bu, stride_buc, rank_b, mask, B, RANK_B, FACTOR_B, WIDE, PRECISION)
        w_eff = effective_tile(weight, a, b, A).to(x_ptr.dtype.element_ty)
        if SWAP:
            acc = tl.dot(w_eff, tl.trans(x), acc, input_precision=DOT, out_dtype=WIDE)
        else:
            acc = tl.dot(x, tl.trans(w_eff), acc, input_precision=DOT, out_dtype=WIDE)
    bias = bias_tile(prompt, bias_ptr, d_ptr, e_ptr, outs, stride_d, stride_e, has_d, has_e, out_mask, BIAS, WIDE)
    bias = bias.to(y_ptr.dtype.element_ty)  # the bits that a merged layer adds
    # Every block of tokens has formed the same b_eff: one of them stores it.
    if WRITE_BIAS and token_block == 0:
        tl.store(b_eff_ptr + outs, bias, mask=out_mask)
    if SWAP:
        y = tl.trans((acc + bias.to(WIDE)[:, None]).to(y_ptr.dtype.element_ty))
    else:
        y = acc + bias.to(WIDE)[None, :]
    store_tile(y_ptr, y, tokens, outs, OUT, 1, token_mask, out_mask)
