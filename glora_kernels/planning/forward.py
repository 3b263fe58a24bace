"""The schedules of a forward pass and of merging: which kernels run, and what each is given.

The parameters are explained in the kernels (``_triton/kernels/``), where the equations are too. The strategies:

    assemble   W_eff and b_eff in one pass over W0, then one dense product
    fused      one product that forms W_eff in registers, tile by tile, and b_eff
"""

from __future__ import annotations

import torch

from .draft import Draft
from .numerics import index_type
from .operands import ADDED, EITHER, NONE, BiasOperands, Operand, absent, bias_operands, no_bias, operand, padded_rank
from .problem import LOW_RANK, Problem
from .settings import Tile
from .steps import TOKENS, Schedule, cdiv

SHARE_BLOCKS = 4  # blocks of columns that a program walks where it need not walk all


def forward(problem: Problem, strategy: str, tokens: int, index: torch.dtype, x_strides: tuple[int, ...]) -> Schedule:
    """``y = x W_eff^T + b_eff``; the results are y, V and b_eff.

    Args:
        tokens: any number of tokens of the class for which tiles are looked up.
        index: the type of offsets.
        x_strides: the strides of x, (M, K).
    """
    p = problem
    draft = Draft(p, tokens, index, ("x", "weight", "bias", *p.storages))
    if strategy == "assemble" or not p.adapts_weight:
        w_eff, b_eff, projected = _assembly(draft)
        shape = (TOKENS, p.outputs, p.inputs)
        return draft.finished(draft.product("y", "linear", "x", w_eff, shape, b_eff), projected, b_eff)
    projected = assemble(draft, writes_weight=False, writes_bias=False)[2] if p.projects else None
    y = draft.allocate("y", TOKENS, p.outputs)
    b_eff = draft.allocate("b_eff", p.outputs) if p.has_bias else None
    a, b, folded = operand(p, "A"), operand(p, "B"), bias_operands(p)
    multiply(draft, ("x", x_strides), (p.outputs, p.inputs), draft.weight_strides, y, (a, b), folded, b_eff)
    return draft.finished(y, projected, b_eff)


def assembly(problem: Problem) -> Schedule:
    """``(W_eff, b_eff)``, for merging; by the very launch of the strategy ``assemble``."""
    draft = _without_tokens(problem)
    w_eff, b_eff, _ = _assembly(draft)
    return draft.finished(w_eff, b_eff)


def projection(problem: Problem) -> Schedule:
    """V = W0 Ad (N, R), where A is a low rank of the matmul product."""
    draft = _without_tokens(problem)
    return draft.finished(assemble(draft, writes_weight=False, writes_bias=False)[2])


def _without_tokens(problem: Problem) -> Draft:
    index = index_type(0, ((problem.outputs, problem.inputs), problem.weight_strides))
    return Draft(problem, 0, index, ("weight", "bias", *problem.storages))


def _assembly(draft: Draft) -> tuple[str, str | None, str | None]:
    """The slots of W_eff, b_eff and V; an operand that no term changes stays as it is."""
    p = draft.problem
    if not p.adapts_weight and not p.adapts_bias:
        return "weight", None if p.bias is None else "bias", None
    w_eff, b_eff, projected = assemble(draft, p.adapts_weight, p.adapts_bias)
    return w_eff or "weight", b_eff or (None if p.bias is None else "bias"), projected


def assemble(draft: Draft, writes_weight: bool, writes_bias: bool) -> tuple[str | None, str | None, str | None]:
    """The slots of W_eff, b_eff and V from one launch; None for what is not asked for or not needed."""
    p, wide = draft.problem, draft.numerics.wide
    a, b = operand(p, "A"), operand(p, "B") if writes_weight else absent(p)
    folded = bias_operands(p) if writes_bias else no_bias(p)
    low = p.kind("A") == LOW_RANK
    projects, down = a.form == ADDED, p.names("A")[0] if low else a.left
    w_eff = draft.allocate("w_eff", p.outputs, p.inputs) if writes_weight else None
    b_eff = draft.allocate("b_eff", p.outputs) if writes_bias else None
    projected = draft.allocate("projected", p.outputs, a.rank, dtype=wide) if projects else None
    tile = draft.tile("assemble", a.rank, b.rank, folded.rank)
    share = share_of(p.inputs, tile, projects or folded.c_form != NONE or not writes_weight)
    draft.launch(
        "assemble",
        tile,
        cdiv(p.outputs, tile.rows) * cdiv(p.inputs, share),
        {
            "w_ptr": "weight",
            "w_eff_ptr": w_eff,
            "b_eff_ptr": b_eff or "weight",
            "v_ptr": projected,
            "a_ptr": down,
            "au_ptr": a.right,
            "b_ptr": b.left,
            "bu_ptr": b.right,
            "c_ptr": folded.c,
            "cu_ptr": folded.cu,
            "bias_ptr": None if p.bias is None else "bias",
            "d_ptr": folded.d,
            "e_ptr": folded.e,
            "N": p.outputs,
            "K": p.inputs,
            "share": share,
            "stride_wn": draft.weight_strides[0],
            "stride_wk": draft.weight_strides[1],
            "stride_a": p.part("A").storages[0].row if low else a.left_row,
            "stride_b": b.left_row,
            "stride_bu": b.right_rank,
            "stride_au": a.right_rank,
            "stride_auk": a.right_column,
            "stride_c": folded.stride_c,
            "stride_d": folded.stride_d,
            "stride_e": folded.stride_e,
            "rank_a": a.rank,
            "rank_b": b.rank,
            "rank_c": folded.rank,
            "has_d": int(folded.has_d),
            "has_e": int(folded.has_e),
            "writes_bias": int(writes_bias),
            "A": a.form,
            "B": b.form,
            "C": _either(folded.c_form, a, b),
            "BIAS": p.bias is not None,
            "WRITE_WEIGHT": writes_weight,
            "BLOCK_N": tile.rows,
            "BLOCK_K": tile.columns,
            "RANK_A": a.block_rank,
            "RANK_B": b.block_rank,
            "RANK_C": padded_rank(folded.rank),
            "FACTOR_A": a.dtype,
            "FACTOR_B": b.dtype,
            "INDEX": draft.index,
            "WIDE": wide,
            "PRECISION": draft.numerics.factors,
        },
    )
    return w_eff, b_eff, projected


def _either(c_form: int, a: Operand, b: Operand) -> int:
    """One build for both forms of C, unless A and B both have factors: such a build spills on sm_80 and sm_100."""
    return c_form if c_form == NONE or (a.low and b.low) else EITHER


def multiply(
    draft: Draft,
    x: tuple[str, tuple[int, ...]],
    shape: tuple[int, int],
    weight_strides: tuple[int, ...],
    y: str,
    terms: tuple[Operand, Operand],
    folded: BiasOperands,
    b_eff: str | None,
) -> None:
    """``y = x W_eff^T + b_eff`` with W_eff in registers only.

    Args:
        x: slot and strides of x, or of dy to form dx.
        shape, weight_strides: of the weight, (OUT, RED); transposed to form dx.
        y: the slot of the result.
        terms: A and B, transposed to form dx.
        folded: what b_eff is made of.
        b_eff: the slot in which b_eff is kept, or None.
    """
    (a, b), (outputs, reduced) = terms, shape
    tile = draft.tile("fused", a.rank, b.rank, folded.rank)
    draft.launch(
        "fused",
        tile,
        cdiv(outputs, tile.rows),
        {
            "x_ptr": x[0],
            "w_ptr": "weight",
            "y_ptr": y,
            "b_eff_ptr": b_eff,
            "a_ptr": a.left,
            "au_ptr": a.right,
            "b_ptr": b.left,
            "bu_ptr": b.right,
            "c_ptr": folded.c,
            "cu_ptr": folded.cu,
            "bias_ptr": folded.bias,
            "d_ptr": folded.d,
            "e_ptr": folded.e,
            "M": TOKENS,
            "OUT": outputs,
            "RED": reduced,
            "stride_xm": x[1][0],
            "stride_xr": x[1][1],
            "stride_wo": weight_strides[0],
            "stride_wr": weight_strides[1],
            "stride_a": a.left_row,
            "stride_ar": a.left_rank,
            "stride_au": a.right_rank,
            "stride_auc": a.right_column,
            "stride_b": b.left_row,
            "stride_br": b.left_rank,
            "stride_bu": b.right_rank,
            "stride_buc": b.right_column,
            "stride_c": folded.stride_c,
            "stride_d": folded.stride_d,
            "stride_e": folded.stride_e,
            "rank_a": a.rank,
            "rank_b": b.rank,
            "rank_c": folded.rank,
            "has_d": int(folded.has_d),
            "has_e": int(folded.has_e),
            "A": a.form,
            "B": b.form,
            "C": folded.c_form,
            "BIAS": folded.bias is not None,
            "WRITE_BIAS": b_eff is not None,
            "BLOCK_M": tile.tokens,
            "BLOCK_O": tile.rows,
            "BLOCK_R": tile.columns,
            "RANK_A": a.block_rank,
            "RANK_B": b.block_rank,
            "RANK_C": padded_rank(folded.rank),
            "FACTOR_A": a.dtype,
            "FACTOR_B": b.dtype,
            "INDEX": draft.index,
            "WIDE": draft.numerics.wide,
            "PRECISION": draft.numerics.factors,
            "DOT": draft.numerics.stream,
            "SWAP": tile.swap,
        },
        token_block=tile.tokens,
    )


def share_of(inputs: int, tile: Tile, whole_rows: bool) -> int:
    """Columns that one program walks: all where rows are summed up, else a few blocks, so as to fill the machine."""
    return inputs if whole_rows else tile.columns * SHARE_BLOCKS
