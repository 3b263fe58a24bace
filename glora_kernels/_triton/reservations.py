"""Which partial sums a backward pass makes: the number and size of the slices, decided before anything runs."""

from __future__ import annotations

from ..terms import Constant, LowRank
from .operands import LOW_RANK, cdiv
from .run import BackwardRun


def reserve(run: BackwardRun) -> None:
    """Reserve every slice that the passes of ``run.route`` write, and allocate the buffer."""
    if run.route == "dense":
        _bias_sums(run)
        _contraction(run)
    else:
        _bias_sums(run)
        _token_sums(run)
        _weight_sums(run)
    run.buffer = run.partials.allocate(run.call.dy, run.wide)


def _bias_sums(run: BackwardRun) -> None:
    """The slices of ``db`` and of its sums, from the token pass."""
    call, terms = run.call, run.call.terms
    outputs, slices = call.weight.shape[0], run.token_blocks
    constant_d, constant_e = isinstance(terms.D, Constant), isinstance(terms.E, Constant)
    rows = run.wants("C") or (run.wants("D") and not constant_d) or (run.wants("E") and not constant_e)
    if rows or (run.route == "solved" and call.b_eff is not None):
        run.reserve("db", slices, outputs)
    if run.wants("D") and constant_d:
        run.reserve("db_bias", slices, 1)
    if run.wants("E") and constant_e:
        run.reserve("db_sum", slices, 1)


def _token_sums(run: BackwardRun) -> None:
    """The slices for A and B, from the token pass."""
    call, terms = run.call, run.call.terms
    outputs, inputs = call.weight.shape
    slices = run.token_blocks
    if run.route == "solved":
        run.reserve("t", slices, outputs)
    if run.route == "projected":
        run.reserve("dv", slices, outputs * run.a.rank)
        run.reserve("au", slices, inputs * run.a.rank)
    if run.route == "scaled":
        run.reserve("a", slices, 1 if isinstance(terms.A, Constant) else inputs)
    if not run.contracts_b:
        return
    if isinstance(terms.B, LowRank):
        run.reserve("b", slices, outputs * run.b.rank)
        run.reserve("bu", slices, inputs * run.b.rank)
        return
    if isinstance(terms.B, Constant):
        run.reserve("b_sum", slices, 1)
    if not isinstance(terms.B, Constant) or run.route == "solved":
        run.reserve("b", slices, outputs)


def _weight_sums(run: BackwardRun) -> None:
    """The slices for C and for Ad of a projected A, from the weight pass; those for lost rows, from the contraction."""
    outputs, inputs = run.call.weight.shape
    row_blocks = cdiv(outputs, run.weight_tile.rows)
    if run.wants("C"):
        run.reserve("dc", row_blocks, inputs)
        _prompt_sums(run, row_blocks * cdiv(inputs, run.weight_share))
    if run.route == "projected":
        run.reserve("ad", row_blocks, inputs * run.a.rank)
    if run.route == "solved":
        run.reserve("exact", cdiv(inputs, run.contract_tile.columns), outputs)


def _contraction(run: BackwardRun) -> None:
    """The slices for A, B and C, from the contraction of dW."""
    terms = run.call.terms
    outputs, inputs = run.call.weight.shape
    row_blocks = cdiv(outputs, run.contract_tile.rows)
    column_blocks = cdiv(inputs, run.contract_tile.columns)
    for slot, name, operand in (("A", "a", run.a), ("B", "b", run.b)):
        if not run.wants(slot):
            continue
        if operand.form == LOW_RANK:
            run.reserve(name, column_blocks, outputs * operand.rank)
            run.reserve(name + "u", row_blocks, inputs * operand.rank)
        elif isinstance(getattr(terms, slot), Constant):
            run.reserve(name + "_sum", row_blocks * column_blocks, 1)
        else:
            run.reserve(name, column_blocks, outputs)
    if run.wants("C"):
        run.reserve("dc", row_blocks, inputs)
        _prompt_sums(run, row_blocks * column_blocks)


def _prompt_sums(run: BackwardRun, slices: int) -> None:
    if run.prompt.rank:
        run.reserve("cu", slices, run.prompt.rank)
