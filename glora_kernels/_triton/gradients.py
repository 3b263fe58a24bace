"""The gradients that a backward pass returns, and the slices that each is the sum of."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backend import SlotGradients
from ..terms import Constant, LowRank, Term, Vector
from .jobs import PLAIN, SOLVED, TIMES_BIAS, TIMES_UP, GradientJob, constant_job, left_job, right_job, targets
from .kernels.finish import finish
from .operands import ADDED
from .run import NO_SLICES, BackwardRun


def gradients(run: BackwardRun) -> SlotGradients:
    """The gradients of every wanted slot, by one launch into one buffer, in the dtype of the storages if they agree."""
    jobs = _jobs(run)
    if not jobs:
        return {}
    dtypes = {storage.dtype for _, storage, _ in jobs}
    starts, size = targets(tuple(job for _, _, job in jobs))
    buffer = torch.empty(size, dtype=dtypes.pop() if len(dtypes) == 1 else run.wide, device=run.call.dy.device)
    finish(run, tuple(job for _, _, job in jobs), buffer)
    found: dict[str, tuple[Tensor, ...]] = {}
    for (slot, storage, job), start in zip(jobs, starts):
        grad = buffer[start : start + job.size].view(storage.shape).to(storage.dtype)
        found[slot] = (*found.get(slot, ()), grad)
    return found


def _jobs(run: BackwardRun) -> list[tuple[str, Tensor, GradientJob]]:
    """Slot, storage and job of every gradient to make, in the order of the storages."""
    jobs = []
    for slot, term in run.call.terms.active:
        if run.wants(slot):
            jobs += [(slot, storage, job) for storage, job in zip(term.storages, _slot_jobs(run, slot, term))]
    return jobs


def _slot_jobs(run: BackwardRun, slot: str, term: Term) -> list[GradientJob]:
    if slot == "C":
        return _prompt_jobs(run, term)
    if slot in ("D", "E"):
        assert not isinstance(term, LowRank)
        rule = TIMES_BIAS if slot == "D" else PLAIN
        if isinstance(term, Constant):
            return [constant_job(term.value, run.of("db_bias" if slot == "D" else "db_sum"))]
        return [left_job(term.value, run.of("db"), 1, rule)]
    name, operand = (("a", run.a), ("b", run.b))[slot == "B"]
    if isinstance(term, LowRank):
        down = "ad" if slot == "A" and operand.form == ADDED else name
        return [left_job(term.down, run.of(down), operand.rank), right_job(term.up, run.of(name + "u"), operand.rank)]
    if isinstance(term, Constant):
        return [constant_job(term.value, run.of("a" if slot == "A" else "b_sum"))]
    if slot == "A" and run.route == "solved":
        return [left_job(term.value, NO_SLICES, 1, SOLVED)]
    return [left_job(term.value, run.of(name), 1)]


def _prompt_jobs(run: BackwardRun, term: Term) -> list[GradientJob]:
    dc = run.of("dc")
    assert not isinstance(term, Constant)
    if isinstance(term, Vector):
        return [left_job(term.value, dc, 1)]
    rank = run.prompt.rank
    return [
        left_job(term.down, dc, rank, TIMES_UP, width=1),
        GradientJob(term.up.numel(), 1, True, run.of("cu"), rank, rank, 1),
    ]
