"""Mutants that cannot change a result, each with the reason; reviewed by hand, printed in every report."""

from __future__ import annotations

from typing import NamedTuple

from tests.mutants.sites import Mutant


class Equivalent(NamedTuple):
    """Mutants of one statement by one operator.

    Attributes:
        statement: its text on one line (its head, if it holds other statements); "" is any in the function.
        replacement: what the mutant puts there; "" is anything.
    """

    file: str
    function: str
    operator: str
    statement: str
    replacement: str
    reason: str

    def covers(self, mutant: Mutant) -> bool:
        return (
            (self.file, self.function, self.operator) == (mutant.file, mutant.function, mutant.operator)
            and self.statement in ("", mutant.statement)
            and self.replacement in ("", mutant.replacement)
        )


EQUIVALENT: tuple[Equivalent, ...] = (
    Equivalent(
        "finish.py",
        "finish_kernel",
        "conjunct_dropped",
        "mask = (o < size) & (c < count) & (j < rank)",
        "(o < size)",
        "every job has as many rows as size / inner: o < size says the same",
    ),
    Equivalent(
        "assemble.py",
        "assemble_kernel",
        "cast_dropped",
        "weight = load_tile(w_ptr, rows, columns, stride_wn, stride_wk, row_mask, mask).to(WIDE)",
        "load_tile(w_ptr, rows, columns, stride_wn, stride_wk, row_mask, mask)",
        "a, b and c are WIDE: a sum or product with one of them widens the weight just the same",
    ),
    Equivalent(
        "weight_pass.py",
        "weight_pass_kernel",
        "cast_dropped",
        "down = load_tile(c_ptr, columns, ranks_c, stride_c, 1, mask, ranks_c < rank_c).to(WIDE)",
        "load_tile(c_ptr, columns, ranks_c, stride_c, 1, mask, ranks_c < rank_c)",
        "dc is WIDE: a product with it widens the other side just the same",
    ),
    Equivalent(
        "token_pass.py",
        "token_pass_kernel",
        "default_changed",
        "values = tl.load(b_ptr + rows * stride_b, mask=mask, other=0.0).to(WIDE)",
        "1.0",
        "dy is zero outside the mask, and it is what the values are multiplied with",
    ),
    Equivalent(
        "tile.py",
        "prompt_tile",
        "default_changed",
        "up = tl.load(up_ptr + ranks, mask=ranks < rank, other=0.0).to(WIDE)",
        "1.0",
        "the other factor is zero where the rank mask is false",
    ),
    Equivalent(
        "tile.py",
        "prompt_tile",
        "default_changed",
        "c = tl.load(ptr + columns * stride_row, mask=column_mask, other=0.0).to(WIDE)",
        "1.0",
        "the weight, masked by the same columns, is zero where c is multiplied with it",
    ),
    Equivalent(
        "token_pass.py",
        "token_pass_kernel",
        "default_changed",
        "scale = 1.0 + tl.load(a_ptr + columns * stride_a, mask=mask, other=0.0).to(WIDE)",
        "1.0",
        "g is zero outside the mask, and dx is stored under it",
    ),
    Equivalent(
        "finish.py",
        "solve",
        "default_changed",
        "da -= tl.load(b_eff_ptr + rows, mask=mask, other=0.0).to(WIDE) * db",
        "1.0",
        "finish_kernel puts zero where the mask is false, whatever was computed there",
    ),
    Equivalent(
        "finish.py",
        "finish_kernel",
        "default_changed",
        "value *= tl.load(cu_ptr + j, mask=mask, other=0.0).to(WIDE)",
        "1.0",
        "the last tl.where puts zero where the mask is false, whatever was computed there",
    ),
    Equivalent(
        "contract.py",
        "contract_kernel",
        "default_changed",
        "wanted = tl.max(tl.load(partials_ptr + at_lost + rows, mask=row_mask, other=0.0), 0) > 0",
        "1.0",
        "a ragged last block is formed although no row of it is lost: nobody reads those sums",
    ),
    Equivalent(
        "assemble.py",
        "assemble_kernel",
        "condition_shortened",
        "if writes_bias > 0 and part == 0:         ",
        "(writes_bias > 0)",
        "every part of a row forms the same bias (with a prompt there is one part): the same bits are stored twice",
    ),
    Equivalent(
        "fused.py",
        "fused_kernel",
        "condition_shortened",
        "if WRITE_BIAS and token_block == 0:         ",
        "(WRITE_BIAS)",
        "every block of tokens forms the same bias: the same bits are stored twice",
    ),
    Equivalent(
        "fused.py",
        "fused_kernel",
        "cast_dropped",
        "y = acc + bias.to(WIDE)[None, :]",
        "bias",
        "acc is WIDE: a sum with it widens the bias, rounded before, just the same",
    ),
    Equivalent(
        "assemble.py",
        "assemble_kernel",
        "number_off_by_one",
        "first, last = part * share, min(K, (part + 1) * share)",
        "2",
        "parts overlap and store the same bits twice: where sums are taken over columns there is one part",
    ),
    Equivalent(
        "assemble.py",
        "assemble_kernel",
        "bound_dropped",
        "first, last = part * share, min(K, (part + 1) * share)",
        "K",
        "parts overlap and store the same bits twice: where sums are taken over columns there is one part",
    ),
    Equivalent(
        "finish.py",
        "solve",
        "conjunct_dropped",
        "exact = sum_slices(partials_ptr + at_exact, exact_slices, N, rows, mask & lost, BLOCK, WIDE)",
        "lost",
        "lost is false outside the mask: it was loaded under it with zero elsewhere",
    ),
    Equivalent(
        "finish.py",
        "solve",
        "conjunct_dropped",
        "exact = sum_slices(partials_ptr + at_exact, exact_slices, N, rows, mask & lost, BLOCK, WIDE)",
        "mask",
        "exact sums of rows that are not lost are read, and dropped by the tl.where that follows",
    ),
)
