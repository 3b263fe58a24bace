"""The schedule of a backward pass: which kernels run, in which order, and which gradients they make.

Five routes, by the kind of A and whether its gradient is wanted. In brackets: launches, dense products included.

    thin       A is none, or no gradient of it is wanted    token pass, weight pass, dx, finish                   [4]
    projected  A is a low rank of the matmul product        token pass, weight pass, dx, finish                   [4]
    scaled     A scales inputs                              g = dy W0, token pass (dx), weight pass, finish       [4]
    solved     A scales rows, and the output is at hand     token pass, weight pass, dx, lost rows, finish        [5]
    dense      A is a hadamard low rank, or scales rows     token pass (db), dW, contraction, dx, finish          [5]
               and the output is not at hand

With the fused strategy dx is formed with W_eff in registers, and dW is contracted as it is formed: no (N, K) buffer.
"""

from __future__ import annotations

import torch

from ..terms import SLOTS
from .forward import multiply
from .operands import ADDED, no_bias
from .passes import BackwardDraft, contraction, finish, token_pass, weight_pass
from .problem import CONSTANT, LOW_RANK, Problem, Stored
from .steps import TOKENS, Gradient, Schedule
from .sums import (
    NO_SLICES,
    PLAIN,
    SOLVED,
    TIMES_BIAS,
    TIMES_UP,
    GradientJob,
    constant_job,
    left_job,
    right_job,
    targets,
)


def backward(
    problem: Problem,
    strategy: str,
    tokens: int,
    index: torch.dtype,
    strides: tuple[tuple[int, ...], tuple[int, ...]],
    output: bool,
) -> Schedule:
    """dx and the gradients of the storages; the result is dx, or None if it is not wanted.

    Args:
        strategy: ``"assemble"`` or ``"fused"``.
        tokens: any number of tokens of the class for which tiles are looked up.
        index: the type of offsets.
        strides: the strides of dy (M, N) and of x (M, K).
        output: whether the output is at hand.
    """
    draft = BackwardDraft(problem, strategy, tokens, index, strides, output)
    if draft.partials is not None:
        draft.allocate(draft.partials, draft.sums.size, dtype=problem.wide)
    dx = {"scaled": _scaled, "dense": _dense}.get(draft.route, _through_tokens)(draft)
    gradients = _gradients(draft)
    return draft.finished(dx, gradients=gradients, token_block=draft.token_tile.tokens, route=draft.route)


def _through_tokens(draft: BackwardDraft) -> str | None:
    """The routes thin, projected and solved."""
    token_pass(draft)
    w_eff = weight_pass(draft)
    dx = _input_gradient(draft, w_eff)
    if draft.route == "solved":
        contraction(draft, None)
    return dx


def _scaled(draft: BackwardDraft) -> str | None:
    p = draft.problem
    dx = token_pass(draft, draft.product("g", "plain", "dy", "weight", (TOKENS, p.inputs, p.outputs)))
    weight_pass(draft)
    return dx


def _dense(draft: BackwardDraft) -> str | None:
    p, dw = draft.problem, None
    token_pass(draft)
    if draft.strategy != "fused":
        dw = draft.product("dw", "weight gradient", "dy", "x", (p.outputs, p.inputs, TOKENS))
    return _input_gradient(draft, contraction(draft, dw))


def _input_gradient(draft: BackwardDraft, w_eff: str | None) -> str | None:
    """``dx = dy W_eff``, (M, K), with the W_eff that a pass has written, or else with W_eff formed in registers."""
    p = draft.problem
    if not p.wants_x:
        return None
    if w_eff is not None or not p.adapts_weight:
        return draft.product("dx", "plain", "dy", w_eff or "weight", (TOKENS, p.inputs, p.outputs))
    dx = draft.allocate("dx", TOKENS, p.inputs)
    strides, terms = (draft.weight_strides[1], draft.weight_strides[0]), (draft.a.transposed, draft.b.transposed)
    multiply(draft, ("dy", draft.dy_strides), (p.inputs, p.outputs), strides, dx, terms, no_bias(p), None)
    return dx


def _gradients(draft: BackwardDraft) -> tuple[Gradient | None, ...]:
    """The gradients of every wanted slot, by one launch into one buffer, in the dtype of the storages if they agree."""
    p = draft.problem
    stored = [(slot, storage) for slot in SLOTS for storage in p.part(slot).storages]
    jobs = tuple(job for slot in SLOTS if draft.wants(slot) for job in _jobs(draft, slot))
    if not jobs:
        return (None,) * len(stored)
    dtypes = {storage.dtype for slot, storage in stored if draft.wants(slot)}
    starts, size = targets(jobs)
    draft.allocate("grads", size, dtype=dtypes.pop() if len(dtypes) == 1 else p.wide)
    finish(draft, jobs)
    at = iter(starts)
    return tuple(
        Gradient(next(at), storage.shape, storage.dtype) if draft.wants(slot) else None for slot, storage in stored
    )


def _jobs(draft: BackwardDraft, slot: str) -> list[GradientJob]:
    """One job per storage of a slot, with the slices that its gradient is the sum of."""
    p, sums = draft.problem, draft.sums
    kind, storages = p.kind(slot), p.part(slot).storages
    first = storages[0].shape
    if slot == "C":
        return _prompt_jobs(draft, storages)
    if slot in ("D", "E"):
        if kind == CONSTANT:
            return [constant_job(first, sums.of("db_bias" if slot == "D" else "db_sum"))]
        return [left_job(first, sums.of("db"), 1, TIMES_BIAS if slot == "D" else PLAIN)]
    name, term = (("a", draft.a), ("b", draft.b))[slot == "B"]
    if kind == LOW_RANK:
        down = "ad" if term.form == ADDED else name
        right = right_job(storages[1].shape, sums.of(name + "u"), term.rank)
        return [left_job(first, sums.of(down), term.rank), right]
    if kind == CONSTANT:
        return [constant_job(first, sums.of("a" if slot == "A" else "b_sum"))]
    if slot == "A" and draft.route == "solved":
        return [left_job(first, NO_SLICES, 1, SOLVED)]
    return [left_job(first, sums.of(name), 1)]


def _prompt_jobs(draft: BackwardDraft, storages: tuple[Stored, ...]) -> list[GradientJob]:
    dc, rank = draft.sums.of("dc"), draft.prompt.rank
    if len(storages) == 1:
        return [left_job(storages[0].shape, dc, 1)]
    up = storages[1].shape[0]
    return [
        left_job(storages[0].shape, dc, rank, TIMES_UP, width=1),
        GradientJob(up, 1, True, draft.sums.of("cu"), rank, rank, 1),
    ]
