"""The launches of a backward pass."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch
import triton
from torch import Tensor

from ..reuse import ACCEPTED_LOSS, PROBED_TOKENS
from ..step import SlotGradients, Step
from ..terms import Constant, LowRank, Vector, compute_dtype
from .contract import contract_kernel
from .finish import finish_kernel
from .forward import Context, share_of
from .launch import launch
from .operands import ADDED, COLUMN, NONE, Operand, dense, padded_rank, row_stride
from .partials import (
    FINISH_BLOCK,
    NO_SLICES,
    SOLVED,
    TIMES_BIAS,
    TIMES_UP,
    Job,
    Partials,
    Slices,
    blocks,
    constant_job,
    left_job,
    right_job,
    table,
    targets,
)
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
    def prompt(self) -> tuple[Tensor | None, Tensor | None, int, int]:
        """Of C: its storage, its right factor, the stride of a row, and its rank (0 where it is no low rank)."""
        term = self.step.terms.C
        if term is None:
            return None, None, 0, 0
        if isinstance(term, Vector):
            return dense(term.value), None, row_stride(term.value), 0
        return dense(term.down), dense(term.up), term.down.shape[1], term.factors[1].shape[0]

    @cached_property
    def token_tile(self) -> Tile:
        return self.shared.tile("token_pass", self.a.rank, self.b.rank)

    @cached_property
    def weight_tile(self) -> Tile:
        return self.shared.tile("weight_pass", self.a.rank, self.b.rank, self.prompt[3])

    @cached_property
    def contract_tile(self) -> Tile:
        kernel = "gemm_contract" if self.strategy == "fused" or self.route == "solved" else "contract"
        return self.shared.tile(kernel, self.a.rank, self.b.rank, self.prompt[3])

    @property
    def token_blocks(self) -> int:
        return triton.cdiv(self.step.dy.shape[0], self.token_tile.tokens)

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

    def wants(self, slot: str) -> bool:
        return slot in self.step.wanted

    def has(self, name: str) -> bool:
        return name in self.slices

    def reserve(self, name: str, count: int, size: int) -> None:
        self.slices[name] = self.partials.reserve(count, size)

    def of(self, name: str) -> Slices:
        return self.slices.get(name, NO_SLICES)

    def at(self, *names: str) -> tuple[int, ...]:
        return tuple(self.of(name).at for name in names)


def token_pass(run: Run, g: Tensor | None = None) -> Tensor | None:
    """See token_pass.py; with ``g = dy W0`` it returns dx."""
    step, dense_route = run.step, run.route == "dense"
    if not any(map(run.has, ("db", "db_sum", "db_bias"))) and (
        dense_route or not (run.contracts_b or "A" in step.wanted)
    ):
        return None
    a = run.a if run.route in ("projected", "scaled") else Operand(NONE)
    b = Operand(NONE) if dense_route or not (run.contracts_b or g is not None) else run.b
    tokens, (outputs, inputs) = step.dy.shape[0], step.weight.shape
    x = step.dy.new_empty(0, inputs) if step.x is None else step.x
    dx = torch.empty_like(g) if g is not None and step.wants_x else None
    # A constant scales rows and inputs alike: it is read as a value over the inputs, of stride 0.
    kind, left = (COLUMN if g is not None else a.kind), (a.right if a.kind == COLUMN else a.left)
    stride_a = a.right_column if a.kind == COLUMN else a.left_row
    tile = run.token_tile
    tensors = (x, step.dy, step.output if run.route == "solved" else g, dx, left, a.right, b.left, b.right)
    tensors += (step.bias, run.buffer)
    numbers = run.at(
        "db", "db_sum", "db_bias", "t", "dv" if run.route == "projected" else "a", "au", "b", "b_sum", "bu"
    )
    numbers += (tokens, outputs, inputs, *x.stride(), *step.dy.stride(), stride_a, a.right_rank)
    numbers += (b.left_row, b.right_rank, a.rank, b.rank)
    constant_a = g is not None and isinstance(step.terms.A, Constant)
    contracts_b = run.contracts_b and not dense_route
    constants = (kind, b.kind, contracts_b, constant_a, run.has("b_sum") and contracts_b)
    constants += (run.has("db"), run.has("db_sum"), run.has("db_bias"), run.route == "solved", dx is not None)
    constants += (tile.tokens, tile.rows, tile.columns, a.block_rank, b.block_rank)
    constants += (run.shared.index, run.shared.numerics.wide, run.shared.numerics.stream)
    launch(token_pass_kernel, run.token_blocks, tensors, numbers, constants, tile)
    return dx


def weight_pass(run: Run) -> Tensor | None:
    """See weight_pass.py; returns W_eff if dx is to be formed from it."""
    step = run.step
    outputs, inputs = step.weight.shape
    writes = step.wants_x and step.terms.adapts_weight and run.strategy != "fused" and run.route != "scaled"
    probes = run.route == "solved"
    if not (writes or probes or run.has("dc") or run.has("ad")):
        return None
    w_eff = step.weight.new_empty(outputs, inputs) if writes else None
    run.lost = torch.empty(outputs, dtype=torch.int32, device=step.weight.device) if probes else None
    c, _, stride_c, rank_c = run.prompt
    tile, numerics = run.weight_tile, run.shared.numerics
    reads_terms = writes or probes
    a, b = (run.a, run.b) if reads_terms else (Operand(NONE), Operand(NONE))
    tensors = (step.weight, w_eff, a.left, a.right, b.left, b.right, c, step.x if probes else None)
    tensors += (step.dy if probes else None, step.b_eff, run.lost, run.buffer)
    slices = run.of("db").count or run.of("dv").count
    numbers = (*run.at("db", "dv", "dc", "cu", "ad"), slices, step.dy.shape[0], outputs, inputs, run.weight_share)
    numbers += (
        *step.weight.stride(),
        *(step.x.stride() if probes else (0, 0)),
        *(step.dy.stride() if probes else (0, 0)),
    )
    numbers += (
        a.left_row,
        a.right_rank,
        a.right_column,
        b.left_row,
        b.right_rank,
        stride_c,
        run.a.rank,
        b.rank,
        rank_c,
    )
    numbers += (ACCEPTED_LOSS[step.weight.dtype],)
    constants = (a.kind, b.kind, writes, run.has("dc"), run.has("cu"), run.has("ad"), probes, step.b_eff is not None)
    constants += (tile.rows, tile.columns, run.a.block_rank, b.block_rank, padded_rank(rank_c), PROBED_TOKENS)
    constants += (a.dtype, b.dtype, run.shared.index, numerics.wide, numerics.factors, numerics.rough)
    grid = triton.cdiv(outputs, tile.rows) * triton.cdiv(inputs, run.weight_share)
    launch(weight_pass_kernel, grid, tensors, numbers, constants, tile)
    return w_eff


def contraction(run: Run, dw: Tensor | None) -> Tensor | None:
    """See contract.py, from ``dw`` or else from dy and x; returns W_eff if dx is to be formed from it."""
    step, solved = run.step, run.route == "solved"
    outputs, inputs = step.weight.shape
    writes = dw is not None and step.wants_x
    w_eff = step.weight.new_empty(outputs, inputs) if writes else None
    c, _, stride_c, rank_c = run.prompt
    tile, numerics = run.contract_tile, run.shared.numerics
    a, b = run.a, run.b
    tensors = (dw, *((step.dy, step.x) if dw is None else (None, None)), step.weight, w_eff)
    tensors += (a.left, a.right, b.left, b.right, c, run.lost, run.buffer)
    names = ("exact", "au", "b", "bu") if solved else ("a", "au", "b" if run.has("b") else "b_sum", "bu")
    strides = (0, 0, 0, 0) if dw is not None or step.x is None else (*step.dy.stride(), *step.x.stride())
    numbers = (*run.at(*names, "db", "dc", "cu"), run.of("db").count, step.dy.shape[0], outputs, inputs)
    numbers += (*strides, *step.weight.stride(), a.left_row, a.right_rank, b.left_row, b.right_rank, stride_c)
    numbers += (a.rank, b.rank, rank_c)
    grad_b = run.wants("B") and not solved
    prompt = run.has("dc") and not solved
    constants = (a.kind, b.kind, run.wants("A"), grad_b, run.has("b_sum") and grad_b, prompt, run.has("cu") and prompt)
    constants += (writes, dw is None, solved, tile.tokens, tile.rows, tile.columns)
    constants += (a.block_rank, b.block_rank, padded_rank(rank_c), a.dtype, b.dtype)
    constants += (
        numerics.contract,
        numerics.contract_precision,
        run.shared.index,
        numerics.wide,
        numerics.factors,
        numerics.stream,
    )
    grid = triton.cdiv(outputs, tile.rows) * triton.cdiv(inputs, tile.columns)
    launch(contract_kernel, grid, tensors, numbers, constants, tile)
    return w_eff


def finish(run: Run) -> SlotGradients:
    """See finish.py: the gradients of every wanted slot."""
    jobs = _jobs(run)
    if not jobs:
        return {}
    storages = [storage for _, storage, _ in jobs]
    rows = tuple(job for _, _, job in jobs)
    dtypes = {storage.dtype for storage in storages}
    common = dtypes.pop() if len(dtypes) == 1 else run.wide
    starts, size = targets(rows)
    grads = torch.empty(size, dtype=common, device=run.step.dy.device)
    _launch_finish(run, rows, grads)
    found: dict[str, tuple[Tensor, ...]] = {}
    for (slot, storage, job), start in zip(jobs, starts):
        grad = grads[start : start + job.size].view(storage.shape).to(storage.dtype)
        found[slot] = (*found.get(slot, ()), grad)
    return found


def _launch_finish(run: Run, jobs: tuple[Job, ...], grads: Tensor) -> None:
    step, solved, b = run.step, run.route == "solved", run.b
    tensors = (table(jobs, grads.device), run.buffer, grads, step.bias, run.prompt[1])
    tensors += (run.a.left, b.left, step.b_eff, run.lost) if solved else (None,) * 4
    numbers = (len(jobs), *run.at("t", "db", "b", "exact"), run.of("t").count, run.of("exact").count)
    numbers += (step.weight.shape[0], run.a.left_row, b.left_row, b.rank)
    kinds = {job.kind for job in jobs}
    constants = (TIMES_BIAS in kinds, TIMES_UP in kinds, solved, b.kind, step.b_eff is not None)
    constants += (FINISH_BLOCK, run.shared.numerics.wide)
    launch(finish_kernel, blocks(jobs), tensors, numbers, constants, FINISH_TILE)


def _jobs(run: Run) -> list[tuple[str, Tensor, Job]]:
    """What there is to finish: slot, storage and job, in the order of the storages."""
    jobs = []
    for slot, term in run.step.terms.active:
        if run.wants(slot):
            jobs += [(slot, storage, job) for storage, job in zip(term.storages, _slot_jobs(run, slot, term))]
    return jobs


def _slot_jobs(run: Run, slot: str, term) -> list[Job]:
    if slot == "C":
        return _prompt_jobs(run, term)
    if slot in "DE":
        kind = TIMES_BIAS if slot == "D" else 0
        if isinstance(term, Constant):
            return [constant_job(term.value, run.of("db_bias" if slot == "D" else "db_sum"))]
        return [left_job(term.value, run.of("db"), 1, kind)]
    name, operand = (("a", run.a), ("b", run.b))[slot == "B"]
    if isinstance(term, LowRank):
        down = "ad" if slot == "A" and operand.kind == ADDED else name
        return [
            left_job(term.down, run.of(down), operand.rank),
            right_job(term.up, run.of(name + "u"), operand.rank),
        ]
    if isinstance(term, Constant):
        return [constant_job(term.value, run.of("a" if slot == "A" else "b_sum"))]
    if slot == "A" and run.route == "solved":
        return [left_job(term.value, NO_SLICES, 1, SOLVED)]
    return [left_job(term.value, run.of(name), 1)]


def _prompt_jobs(run: Run, term: LowRank | Vector) -> list[Job]:
    dc = run.of("dc")
    if isinstance(term, Vector):
        return [left_job(term.value, dc, 1)]
    rank = run.prompt[3]
    return [
        left_job(term.down, dc, rank, TIMES_UP, width=1),
        Job(term.up.numel(), 1, True, run.of("cu"), rank, rank, 1),
    ]
