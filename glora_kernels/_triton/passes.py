"""The launches of a backward pass."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from ..reuse import ACCEPTED_LOSS, PROBED_TOKENS
from ..step import Step
from ..terms import Constant, Terms, compute_dtype
from .contract import contract_kernel
from .finish import finish_kernel
from .forward import Context, share_of
from .launch import launch
from .operands import COLUMN, NONE, BiasOperands, Operand, bias_operands, cdiv, dense, padded_rank
from .partials import FINISH_BLOCK, NO_SLICES, TIMES_BIAS, TIMES_UP, Job, Partials, Slices, blocks, table
from .settings import Tile
from .token_pass import token_pass_kernel
from .weight_pass import weight_pass_kernel

FINISH_TILE = Tile(0, FINISH_BLOCK, 0, 4, 2)


@dataclass
class Run:
    """One backward pass: its operands, and the slices of its buffer of partial sums."""

    step: Step
    strategy: str
    shared: Context
    route: str
    a: Operand
    b: Operand
    partials: Partials = field(default_factory=Partials)
    slices: dict[str, Slices] = field(default_factory=dict)
    buffer: Tensor | None = None
    lost: Tensor | None = None

    @cached_property
    def prompt(self) -> BiasOperands:
        """C alone, of what forms the bias."""
        return bias_operands(Terms(C=self.step.terms.C), None)

    @cached_property
    def token_tile(self) -> Tile:
        return self.shared.tile("token_pass", self.a.rank, self.b.rank)

    @cached_property
    def weight_tile(self) -> Tile:
        return self.shared.tile("weight_pass", self.a.rank, self.b.rank, self.prompt.rank)

    @cached_property
    def contract_tile(self) -> Tile:
        kernel = "gemm_contract" if self.strategy == "fused" or self.route == "solved" else "contract"
        return self.shared.tile(kernel, self.a.rank, self.b.rank, self.prompt.rank)

    @property
    def token_blocks(self) -> int:
        return cdiv(self.step.dy.shape[0], self.token_tile.tokens)

    @property
    def weight_share(self) -> int:
        return share_of(self.step.weight.shape[1], self.weight_tile, self.route in ("projected", "solved"))

    @property
    def wide(self) -> torch.dtype:
        return compute_dtype(self.step.weight.dtype)

    @property
    def contracts_b(self) -> bool:
        """Whether the token pass contracts B: for its own gradient, or to solve for A's."""
        return self.wants("B") or (self.route == "solved" and self.b.kind != NONE)

    @property
    def sums_bias(self) -> bool:
        return any(map(self.has, ("db", "db_sum", "db_bias")))

    def wants(self, slot: str) -> bool:
        return slot in self.step.wanted

    def has(self, name: str) -> bool:
        return name in self.slices

    def reserve(self, name: str, count: int, size: int) -> None:
        self.slices[name] = self.partials.reserve(count, size)

    def of(self, name: str) -> Slices:
        return self.slices.get(name, NO_SLICES)

    def at(self, name: str) -> int:
        return self.of(name).at


def token_pass(run: Run, g: Tensor | None = None) -> Tensor | None:
    """See token_pass.py; with ``g = dy W0`` it returns dx."""
    step = run.step
    contracts_b = run.contracts_b and run.route != "dense"
    if not (contracts_b or run.sums_bias or run.route in ("projected", "scaled", "solved")):
        return None
    (outputs, inputs), x = step.weight.shape, step.x
    dx = torch.empty_like(g) if g is not None and step.wants_x else None
    a = run.a if run.route in ("projected", "scaled") else Operand(NONE)
    b = run.b if contracts_b or dx is not None else Operand(NONE)
    # A constant scales rows and inputs alike: here it is a value over the inputs, of stride 0.
    over_inputs = a.right if a.kind == COLUMN else a.left
    tile = run.token_tile
    launch(
        token_pass_kernel,
        run.token_blocks,
        tile,
        x_ptr=x,
        dy_ptr=step.dy,
        other_ptr=step.output if run.route == "solved" else g,
        dx_ptr=dx,
        a_ptr=over_inputs if run.route == "scaled" else a.left,
        au_ptr=a.right,
        b_ptr=b.left,
        bu_ptr=b.right,
        bias_ptr=None if step.bias is None else dense(step.bias),
        partials_ptr=run.buffer,
        at_db=run.at("db"),
        at_db_sum=run.at("db_sum"),
        at_db_bias=run.at("db_bias"),
        at_t=run.at("t"),
        at_a=run.at("dv" if run.route == "projected" else "a"),
        at_au=run.at("au"),
        at_b=run.at("b"),
        at_b_sum=run.at("b_sum"),
        at_bu=run.at("bu"),
        M=step.dy.shape[0],
        N=outputs,
        K=inputs,
        stride_xm=stride(x, 0),
        stride_xk=stride(x, 1),
        stride_ym=step.dy.stride(0),
        stride_yn=step.dy.stride(1),
        stride_a=a.right_column if a.kind == COLUMN else a.left_row,
        stride_au=a.right_rank,
        stride_b=b.left_row,
        stride_bu=b.right_rank,
        rank_a=a.rank,
        rank_b=b.rank,
        A=COLUMN if run.route == "scaled" else a.kind,
        B=b.kind,
        GRAD_B=contracts_b,
        SUM_A=run.route == "scaled" and isinstance(step.terms.A, Constant),
        SUM_B=contracts_b and run.has("b_sum"),
        DB=run.has("db"),
        DB_SUM=run.has("db_sum"),
        DB_BIAS=run.has("db_bias"),
        OUTPUT=run.route == "solved",
        WRITE_DX=dx is not None,
        BLOCK_M=tile.tokens,
        BLOCK_N=tile.rows,
        BLOCK_K=tile.columns,
        RANK_A=a.block_rank,
        RANK_B=b.block_rank,
        INDEX=run.shared.index,
        WIDE=run.shared.numerics.wide,
        DOT=run.shared.numerics.stream,
    )
    return dx


def weight_pass(run: Run) -> Tensor | None:
    """See weight_pass.py; returns W_eff if dx is to be formed from it."""
    step, probes = run.step, run.route == "solved"
    outputs, inputs = step.weight.shape
    writes = step.wants_x and step.terms.adapts_weight and run.strategy != "fused" and run.route != "scaled"
    if not (writes or probes or run.has("dc") or run.has("ad")):
        return None
    w_eff = step.weight.new_empty(outputs, inputs) if writes else None
    run.lost = torch.empty(outputs, dtype=torch.int32, device=step.weight.device) if probes else None
    a, b = (run.a, run.b) if writes or probes else (Operand(NONE), Operand(NONE))
    x, dy = (step.x, step.dy) if probes else (None, None)
    tile, numerics = run.weight_tile, run.shared.numerics
    launch(
        weight_pass_kernel,
        cdiv(outputs, tile.rows) * cdiv(inputs, run.weight_share),
        tile,
        w_ptr=step.weight,
        w_eff_ptr=w_eff,
        a_ptr=a.left,
        au_ptr=a.right,
        b_ptr=b.left,
        bu_ptr=b.right,
        c_ptr=run.prompt.c,
        x_ptr=x,
        dy_ptr=dy,
        b_eff_ptr=step.b_eff,
        lost_ptr=run.lost,
        partials_ptr=run.buffer,
        at_db=run.at("db"),
        at_dv=run.at("dv"),
        at_dc=run.at("dc"),
        at_cu=run.at("cu"),
        at_ad=run.at("ad"),
        at_t=run.at("t"),
        slices=run.token_blocks,
        M=step.dy.shape[0],
        N=outputs,
        K=inputs,
        share=run.weight_share,
        stride_wn=step.weight.stride(0),
        stride_wk=step.weight.stride(1),
        stride_xm=stride(x, 0),
        stride_xk=stride(x, 1),
        stride_ym=stride(dy, 0),
        stride_yn=stride(dy, 1),
        stride_a=a.left_row,
        stride_au=a.right_rank,
        stride_auk=a.right_column,
        stride_b=b.left_row,
        stride_bu=b.right_rank,
        stride_c=run.prompt.stride_c,
        rank_a=run.a.rank,
        rank_b=b.rank,
        rank_c=run.prompt.rank,
        loss=ACCEPTED_LOSS[step.weight.dtype],
        A=a.kind,
        B=b.kind,
        WRITE_WEIGHT=writes,
        DC=run.has("dc"),
        DCU=run.has("cu"),
        DV=run.has("ad"),
        PROBE=probes,
        B_EFF=step.b_eff is not None,
        BLOCK_N=tile.rows,
        BLOCK_K=tile.columns,
        RANK_A=run.a.block_rank,
        RANK_B=b.block_rank,
        RANK_C=padded_rank(run.prompt.rank),
        PROBES=PROBED_TOKENS,
        FACTOR_A=a.dtype,
        FACTOR_B=b.dtype,
        INDEX=run.shared.index,
        WIDE=numerics.wide,
        PRECISION=numerics.factors,
        ROUGH=numerics.rough,
    )
    return w_eff


def contraction(run: Run, dw: Tensor | None) -> Tensor | None:
    """See contract.py, from ``dw`` or else from dy and x; returns W_eff if dx is to be formed from it.

    On the route ``solved`` it forms the lost rows of da, and nothing else.
    """
    step, solved = run.step, run.route == "solved"
    outputs, inputs = step.weight.shape
    dy, x = (step.dy, step.x) if dw is None else (None, None)
    writes = dw is not None and step.wants_x
    w_eff = step.weight.new_empty(outputs, inputs) if writes else None
    tile, numerics = run.contract_tile, run.shared.numerics
    launch(
        contract_kernel,
        cdiv(outputs, tile.rows) * cdiv(inputs, tile.columns),
        tile,
        dw_ptr=dw,
        dy_ptr=dy,
        x_ptr=x,
        w_ptr=step.weight,
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
        M=step.dy.shape[0],
        N=outputs,
        K=inputs,
        stride_ym=stride(dy, 0),
        stride_yn=stride(dy, 1),
        stride_xm=stride(x, 0),
        stride_xk=stride(x, 1),
        stride_wn=step.weight.stride(0),
        stride_wk=step.weight.stride(1),
        stride_a=run.a.left_row,
        stride_au=run.a.right_rank,
        stride_b=run.b.left_row,
        stride_bu=run.b.right_rank,
        stride_c=run.prompt.stride_c,
        rank_a=run.a.rank,
        rank_b=run.b.rank,
        rank_c=run.prompt.rank,
        A=run.a.kind,
        B=run.b.kind,
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


def finish(run: Run, jobs: tuple[Job, ...], grads: Tensor) -> None:
    """See finish.py: the jobs' gradients, one after the other in ``grads``."""
    step, solved = run.step, run.route == "solved"
    kinds = {job.kind for job in jobs}
    launch(
        finish_kernel,
        blocks(jobs),
        FINISH_TILE,
        table_ptr=table(jobs, grads.device),
        partials_ptr=run.buffer,
        grads_ptr=grads,
        bias_ptr=None if step.bias is None else dense(step.bias),
        cu_ptr=run.prompt.cu,
        a_ptr=run.a.left if solved else None,
        b_ptr=run.b.left if solved else None,
        b_eff_ptr=step.b_eff if solved else None,
        lost_ptr=run.lost,
        jobs=len(jobs),
        at_t=run.at("t"),
        at_db=run.at("db"),
        at_b=run.at("b"),
        at_exact=run.at("exact"),
        slices=run.token_blocks,
        exact_slices=run.of("exact").number,
        N=step.weight.shape[0],
        stride_a=run.a.left_row,
        stride_b=run.b.left_row,
        rank_b=run.b.rank,
        BIAS=TIMES_BIAS in kinds,
        UP=TIMES_UP in kinds,
        SOLVE=solved,
        B=run.b.kind if solved else NONE,
        B_EFF=solved and step.b_eff is not None,
        BLOCK=FINISH_BLOCK,
        WIDE=run.shared.numerics.wide,
    )


def stride(tensor: Tensor | None, dimension: int) -> int:
    return 0 if tensor is None else tensor.stride(dimension)
