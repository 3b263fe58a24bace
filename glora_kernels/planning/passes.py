"""A backward pass while it is being written: its operands and sums, and what each of its kernels is given.

The parameters are explained in the kernels (``_triton/kernels/``), where the equations are too.
"""

from __future__ import annotations

import torch

from ..gradient_routes import ACCEPTED_LOSS, PROBED_TOKENS
from .draft import Draft
from .forward import share_of
from .operands import COLUMN, LOW_RANK, NONE, absent, no_bias, operand, padded_rank, prompt_operands, stand_in
from .problem import CONSTANT, Problem, route_of
from .settings import Tile
from .steps import BLOCKS, TOKENS, cdiv
from .sums import FINISH_BLOCK, TIMES_UP, UNWANTED, GradientJob, Partials, blocks_of, rows_of

FINISH_TILE = Tile(0, FINISH_BLOCK, 0, 4, 2)
OPERANDS = ("dy", "x", "weight", "bias")


class BackwardDraft(Draft):
    """A backward pass.

    Args:
        strategy: ``"assemble"`` or ``"fused"``.
        tokens: any number of tokens of the class for which tiles are looked up.
        index: the type of offsets.
        strides: the strides of dy (M, N) and of x (M, K).
        output: whether the output is at hand.
    """

    def __init__(
        self,
        problem: Problem,
        strategy: str,
        tokens: int,
        index: torch.dtype,
        strides: tuple[tuple[int, ...], tuple[int, ...]],
        output: bool,
    ):
        super().__init__(problem, tokens, index, (*OPERANDS, *problem.storages, "output", "b_eff", "projected"))
        self.strategy, self.dy_strides, self.x_strides = strategy, *strides
        self.route = route_of(problem, output)
        self.a, self.b, self.prompt = operand(problem, "A"), operand(problem, "B"), prompt_operands(problem)
        self.token_tile = self.tile("token_pass", self.a.rank, self.b.rank)
        self.weight_tile = self.tile("weight_pass", self.a.rank, self.b.rank, self.prompt.rank)
        contract = "gemm_contract" if strategy == "fused" or self.route == "solved" else "contract"
        self.contract_tile = self.tile(contract, self.a.rank, self.b.rank, self.prompt.rank)
        self.weight_share = share_of(problem.inputs, self.weight_tile, self.route in ("projected", "solved"))
        self.sums = Partials()
        self._reserve()

    def wants(self, slot: str) -> bool:
        return self.problem.wants(slot)

    @property
    def contracts_b(self) -> bool:
        """Whether B is contracted with dW: for the gradient of B, or to solve for the gradient of A."""
        return self.wants("B") or (self.route == "solved" and not self.b.absent)

    @property
    def takes_off_bias(self) -> bool:
        """Whether ``b_eff db`` is taken off to solve for the gradient of A."""
        return self.route == "solved" and self.problem.has_bias

    @property
    def partials(self) -> str | None:
        """The slot of all partial sums, if there are any."""
        return "partials" if self.sums.parts else None

    # Which partial sums there are: the number and size of the slices.

    def _reserve(self) -> None:
        self._bias_sums()
        if self.route == "dense":
            self._contraction_sums()
        else:
            self._token_sums()
            self._weight_sums()

    def _bias_sums(self) -> None:
        """The slices of ``db`` and of its sums, from the token pass."""
        constant_d, constant_e = (self.problem.kind(slot) == CONSTANT for slot in "DE")
        rows = self.wants("C") or (self.wants("D") and not constant_d) or (self.wants("E") and not constant_e)
        if rows or self.takes_off_bias:
            self.sums.reserve("db", BLOCKS, self.problem.outputs)
        if self.wants("D") and constant_d:
            self.sums.reserve("db_bias", BLOCKS, 1)
        if self.wants("E") and constant_e:
            self.sums.reserve("db_sum", BLOCKS, 1)

    def _token_sums(self) -> None:
        """The slices for A and B, from the token pass."""
        p = self.problem
        if self.route == "solved":
            self.sums.reserve("t", BLOCKS, p.outputs)
        if self.route == "projected":
            self.sums.reserve("dv", BLOCKS, p.outputs * self.a.rank)
            self.sums.reserve("au", BLOCKS, p.inputs * self.a.rank)
        if self.route == "scaled":
            self.sums.reserve("a", BLOCKS, 1 if p.kind("A") == CONSTANT else p.inputs)
        if not self.contracts_b:
            return
        if self.b.form == LOW_RANK:
            self.sums.reserve("b", BLOCKS, p.outputs * self.b.rank)
            self.sums.reserve("bu", BLOCKS, p.inputs * self.b.rank)
            return
        if p.kind("B") == CONSTANT:
            self.sums.reserve("b_sum", BLOCKS, 1)
        if p.kind("B") != CONSTANT or self.route == "solved":
            self.sums.reserve("b", BLOCKS, p.outputs)

    def _weight_sums(self) -> None:
        """The slices for C and a projected Ad, from the weight pass; those for lost rows, from the contraction."""
        p = self.problem
        row_blocks = cdiv(p.outputs, self.weight_tile.rows)
        if self.wants("C"):
            self.sums.reserve("dc", row_blocks, p.inputs)
            self._prompt_sums(row_blocks * cdiv(p.inputs, self.weight_share))
        if self.route == "projected":
            self.sums.reserve("ad", row_blocks, p.inputs * self.a.rank)
        if self.route == "solved":
            self.sums.reserve("lost", 1, p.outputs)
            self.sums.reserve("exact", cdiv(p.inputs, self.contract_tile.columns), p.outputs)

    def _contraction_sums(self) -> None:
        """The slices for A, B and C, from the contraction of dW."""
        p, tile = self.problem, self.contract_tile
        row_blocks, column_blocks = cdiv(p.outputs, tile.rows), cdiv(p.inputs, tile.columns)
        for slot, name, term in (("A", "a", self.a), ("B", "b", self.b)):
            if not self.wants(slot):
                continue
            if term.form == LOW_RANK:
                self.sums.reserve(name, column_blocks, p.outputs * term.rank)
                self.sums.reserve(name + "u", row_blocks, p.inputs * term.rank)
            elif p.kind(slot) == CONSTANT:
                self.sums.reserve(name + "_sum", row_blocks * column_blocks, 1)
            else:
                self.sums.reserve(name, column_blocks, p.outputs)
        if self.wants("C"):
            self.sums.reserve("dc", row_blocks, p.inputs)
            self._prompt_sums(row_blocks * column_blocks)

    def _prompt_sums(self, slices: int) -> None:
        if self.prompt.rank:
            self.sums.reserve("cu", slices, self.prompt.rank)


def token_pass(draft: BackwardDraft, g: str | None = None) -> str | None:
    """The launch, if anything needs it; given the slot of ``g = dy W0`` (M, K), the slot of dx if that is wanted."""
    p, sums, route = draft.problem, draft.sums, draft.route
    contracts_b = draft.contracts_b and route != "dense"
    sums_bias = any(name in sums for name in ("db", "db_sum", "db_bias"))
    if not (contracts_b or sums_bias or route in ("projected", "scaled", "solved")):
        return None
    dx = draft.allocate("dx", TOKENS, p.inputs) if g is not None and p.wants_x else None
    a = draft.a if route in ("projected", "scaled") else absent(p)
    b = draft.b if contracts_b or dx is not None else absent(p)
    thin_b = contracts_b and b.form == LOW_RANK
    # A constant scales rows and inputs alike: here it is passed as a value per input, of stride 0.
    over_inputs = a.right if a.form == COLUMN else a.left
    reads_x = contracts_b or route in ("projected", "scaled")
    x, x_strides = ("x", draft.x_strides) if reads_x else ("dy", draft.dy_strides)  # a stand-in
    tile = draft.token_tile
    draft.launch(
        "token_pass",
        tile,
        1,
        {
            "x_ptr": x,
            "dy_ptr": "dy",
            "other_ptr": "output" if route == "solved" else g,
            "dx_ptr": dx,
            "a_ptr": over_inputs if route == "scaled" else a.left,
            "au_ptr": a.right,
            "b_ptr": b.left,
            "bu_ptr": b.right,
            "bias_ptr": None if p.bias is None else "bias",
            "partials_ptr": draft.partials,
            "at_db": sums.at("db"),
            "at_db_sum": sums.at("db_sum"),
            "at_db_bias": sums.at("db_bias"),
            "at_t": sums.at("t"),
            "at_a": sums.at("dv" if route == "projected" else "a"),
            "at_au": sums.at("au"),
            "at_b": sums.at("b") if contracts_b else UNWANTED,
            "at_b_sum": sums.at("b_sum") if contracts_b else UNWANTED,
            "at_bu": sums.at("bu"),
            "M": TOKENS,
            "N": p.outputs,
            "K": p.inputs,
            "stride_xm": x_strides[0],
            "stride_xk": x_strides[1],
            "stride_ym": draft.dy_strides[0],
            "stride_yn": draft.dy_strides[1],
            "stride_a": a.right_column if a.form == COLUMN else a.left_row,
            "stride_au": a.right_rank,
            "stride_b": b.left_row,
            "stride_bu": b.right_rank,
            "rank_a": a.rank,
            "rank_b": b.rank,
            "A": COLUMN if route == "scaled" else a.form if route == "projected" else NONE,
            "B": b.form,
            "THIN_B": thin_b,
            "SUM_A": route == "scaled" and p.kind("A") == CONSTANT,
            "BIAS": p.bias is not None,
            "ONES": thin_b and b.rank < b.block_rank and p.element == 2,
            "OUTPUT": route == "solved",
            "WRITE_DX": dx is not None,
            "BLOCK_M": tile.tokens,
            "BLOCK_N": tile.rows,
            "BLOCK_K": tile.columns,
            "RANK_A": a.block_rank,
            "RANK_B": b.block_rank,
            "INDEX": draft.index,
            "WIDE": draft.numerics.wide,
            "DOT": draft.numerics.stream,
        },
        token_block=tile.tokens,
    )
    return dx


def weight_pass(draft: BackwardDraft) -> str | None:
    """The launch, if anything needs it; the slot of W_eff if dx is to be formed from it."""
    p, sums, probes = draft.problem, draft.sums, draft.route == "solved"
    writes = p.wants_x and p.adapts_weight and draft.strategy != "fused" and draft.route != "scaled"
    if not (writes or probes or "dc" in sums or "ad" in sums):
        return None
    w_eff = draft.allocate("w_eff", p.outputs, p.inputs) if writes else None
    a, b = (draft.a, draft.b) if writes or probes else (absent(p), absent(p))
    tile, numerics = draft.weight_tile, draft.numerics
    draft.launch(
        "weight_pass",
        tile,
        cdiv(p.outputs, tile.rows) * cdiv(p.inputs, draft.weight_share),
        {
            "w_ptr": "weight",
            "w_eff_ptr": w_eff,
            "a_ptr": a.left,
            "au_ptr": a.right,
            "b_ptr": b.left,
            "bu_ptr": b.right,
            "c_ptr": draft.prompt.c or stand_in(p),
            "x_ptr": "x" if probes else None,
            "dy_ptr": "dy" if probes else None,
            "b_eff_ptr": ("b_eff" if draft.takes_off_bias else "dy") if probes else None,
            "partials_ptr": draft.partials,
            "at_db": sums.at("db"),
            "at_dv": sums.at("dv"),
            "at_dc": sums.at("dc"),
            "at_cu": sums.at("cu"),
            "at_ad": sums.at("ad"),
            "at_t": sums.at("t"),
            "at_lost": sums.at("lost"),
            "slices": BLOCKS,
            "M": TOKENS,
            "N": p.outputs,
            "K": p.inputs,
            "share": draft.weight_share,
            "stride_wn": draft.weight_strides[0],
            "stride_wk": draft.weight_strides[1],
            "stride_xm": draft.x_strides[0] if probes else 0,
            "stride_xk": draft.x_strides[1] if probes else 0,
            "stride_ym": draft.dy_strides[0] if probes else 0,
            "stride_yn": draft.dy_strides[1] if probes else 0,
            "stride_a": a.left_row,
            "stride_au": a.right_rank,
            "stride_auk": a.right_column,
            "stride_b": b.left_row,
            "stride_bu": b.right_rank,
            "stride_c": draft.prompt.stride_c,
            "rank_a": draft.a.rank,
            "rank_b": b.rank,
            "rank_c": draft.prompt.rank,
            "loss": ACCEPTED_LOSS[p.dtype],
            "A": a.form,
            "B": b.form,
            "WRITE_WEIGHT": writes,
            "DC": "dc" in sums,
            "DV": "ad" in sums,
            "PROBE": probes,
            "BLOCK_N": tile.rows,
            "BLOCK_K": tile.columns,
            "RANK_A": draft.a.block_rank,
            "RANK_B": b.block_rank,
            "RANK_C": padded_rank(draft.prompt.rank),
            "PROBES": PROBED_TOKENS,
            "FACTOR_A": a.dtype,
            "FACTOR_B": b.dtype,
            "INDEX": draft.index,
            "WIDE": numerics.wide,
            "PRECISION": numerics.factors,
            "ROUGH": numerics.rough,
        },
    )
    return w_eff


def contraction(draft: BackwardDraft, dw: str | None) -> str | None:
    """The launch on the slot ``dw``, or else on dy and x; the slot of W_eff if dx is to be formed from it.

    On the route ``solved`` it forms the lost rows of da, and nothing else.
    """
    p, sums, solved = draft.problem, draft.sums, draft.route == "solved"
    writes, gemm = dw is not None and p.wants_x, dw is None
    w_eff = draft.allocate("w_eff", p.outputs, p.inputs) if writes else None
    b, prompt = (absent(p), no_bias(p)) if solved else (draft.b, draft.prompt)
    grad_b = draft.wants("B") and not solved
    tile, numerics = draft.contract_tile, draft.numerics
    draft.launch(
        "contract",
        tile,
        cdiv(p.outputs, tile.rows) * cdiv(p.inputs, tile.columns),
        {
            "dw_ptr": dw,
            "dy_ptr": "dy" if gemm else None,
            "x_ptr": "x" if gemm else None,
            "w_ptr": "weight",
            "w_eff_ptr": w_eff,
            "a_ptr": draft.a.left,
            "au_ptr": draft.a.right,
            "b_ptr": b.left,
            "bu_ptr": b.right,
            "c_ptr": prompt.c or stand_in(p),
            "partials_ptr": draft.partials,
            "at_a": sums.at("exact" if solved else "a"),
            "at_au": sums.at("au"),
            "at_b": sums.at("b") if grad_b else UNWANTED,
            "at_b_sum": sums.at("b_sum") if grad_b else UNWANTED,
            "at_bu": sums.at("bu"),
            "at_db": sums.at("db"),
            "at_dc": UNWANTED if solved else sums.at("dc"),
            "at_cu": UNWANTED if solved else sums.at("cu"),
            "at_lost": sums.at("lost"),
            "slices": BLOCKS,
            "M": TOKENS,
            "N": p.outputs,
            "K": p.inputs,
            "stride_ym": draft.dy_strides[0] if gemm else 0,
            "stride_yn": draft.dy_strides[1] if gemm else 0,
            "stride_xm": draft.x_strides[0] if gemm else 0,
            "stride_xk": draft.x_strides[1] if gemm else 0,
            "stride_wn": draft.weight_strides[0],
            "stride_wk": draft.weight_strides[1],
            "stride_a": draft.a.left_row,
            "stride_au": draft.a.right_rank,
            "stride_b": b.left_row,
            "stride_bu": b.right_rank,
            "stride_c": prompt.stride_c,
            "rank_a": draft.a.rank,
            "rank_b": b.rank,
            "rank_c": prompt.rank,
            "A": draft.a.form,
            "B": b.form,
            "THIN_B": grad_b and b.form == LOW_RANK,
            "WRITE_WEIGHT": writes,
            "GEMM": gemm,
            "ONLY_LOST": solved,
            "BLOCK_M": tile.tokens,
            "BLOCK_N": tile.rows,
            "BLOCK_K": tile.columns,
            "RANK_A": draft.a.block_rank,
            "RANK_B": b.block_rank,
            "RANK_C": padded_rank(prompt.rank),
            "FACTOR_A": draft.a.dtype,
            "FACTOR_B": b.dtype,
            "CONTRACT": numerics.contract,
            "CONTRACT_DOT": numerics.contract_precision,
            "INDEX": draft.index,
            "WIDE": numerics.wide,
            "PRECISION": numerics.factors,
            "DOT": numerics.stream,
        },
    )
    return w_eff


def finish(draft: BackwardDraft, jobs: tuple[GradientJob, ...]) -> None:
    """The launch that writes the gradients of all jobs into the slot ``grads``, one after the other."""
    p, sums, solved, other = draft.problem, draft.sums, draft.route == "solved", stand_in(draft.problem)
    rules = {job.rule for job in jobs}
    draft.launch(
        "finish",
        FINISH_TILE,
        sum(map(blocks_of, jobs)),
        {
            "table_ptr": rows_of(jobs),
            "partials_ptr": draft.partials,
            "grads_ptr": "grads",
            "bias_ptr": None if p.bias is None else "bias",
            "cu_ptr": draft.prompt.cu if TIMES_UP in rules else other,
            "a_ptr": draft.a.left if solved else other,
            "b_ptr": draft.b.left if solved else other,
            "b_eff_ptr": "b_eff" if draft.takes_off_bias else "dy",
            "jobs": len(jobs),
            "at_t": sums.at("t"),
            "at_db": sums.at("db"),
            "at_b": sums.at("b"),
            "at_lost": sums.at("lost"),
            "at_exact": sums.at("exact"),
            "slices": BLOCKS,
            "exact_slices": sums.of("exact").number,
            "N": p.outputs,
            "stride_a": draft.a.left_row,
            "stride_b": draft.b.left_row,
            "rank_b": draft.b.rank,
            "BIAS": p.bias is not None,
            "BLOCK": FINISH_BLOCK,
            "WIDE": draft.numerics.wide,
        },
    )
