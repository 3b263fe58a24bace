"""One optimiser step of a training run, on one rank of any number."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ..dataset import require_batch
from ..distributed import share, sync_gradients
from ..objective import Objective
from ..parameters import drop_unread
from ..processes import gather, process_rank, world_size
from .graphing import StepGraphs
from .results import Results
from .state import StepRecord, TrainingState

Value = Tensor | float
Counted = tuple[Value, Value | None, Value]  # loss, accuracy (None without classes), and of how many targets


def take_step(
    state: TrainingState, batches: Iterator[Any], objective: Objective, graphs: StepGraphs, results: Results
) -> list[StepRecord]:
    """Forward, backward and update. Returns the records that have become known, of this step or of the one before.

    Args:
        results: gets loss and accuracy of the whole batch.

    Raises:
        ValueError: a loss that is not finite, or that depends on nothing that is trained.
        TypeError: as :class:`glora.objective.Objective` says.
    """
    state.scheduler.step_update(state.step)
    lr = state.optimizer.param_groups[0]["lr"]
    own: list[Tensor] = []

    def forward() -> Counted:
        batch = require_batch("dataset", next(batches)).to(state.device)
        state.seen += batch.size
        graphed = graphs.take(batch)
        if graphed is not None:  # it also went backward and updated
            return *graphed, batch.size
        state.optimizer.zero_grad(set_to_none=True)
        with _precision(state):
            output = objective.output(state.model, batch)
            own.append(objective.loss(output, batch.target, batch.named))
        found = objective.answers(output, batch.target, batch.named)
        if found is None:
            return own[0].detach(), None, batch.size
        right, targets = found
        return own[0].detach(), right / targets, targets

    loss, right, weight = _of_whole_batch(forward, state.recipe.batch_size)
    results.add(lr, loss, right)
    records = results.read()
    if own and own[0].requires_grad:
        _backward(state, own[0], weight)
        _update(state)
    elif own and state.space is None:  # a random path may read nothing at all
        raise ValueError(
            "loss: expected one that depends on what is trained, got one without a gradient; is the forward pass "
            "detached or under no_grad?"
        )
    state.step += 1
    return records


def _precision(state: TrainingState) -> AbstractContextManager:
    if state.recipe.amp is None:
        return nullcontext()
    return torch.autocast(state.device.type, getattr(torch, state.recipe.amp))


def _backward(state: TrainingState, loss: Tensor, weight: float) -> None:
    """Gradients of the whole batch's loss: the mean over ranks of the losses, each times its ``weight``."""
    state.scaler.scale(loss if weight == 1 else loss * weight).backward()
    drop_unread(state.layers)
    if state.averages_itself:
        return
    if weight == 0:  # the mean over no targets has no gradient
        for parameter in state.parameters:
            if parameter.grad is not None:
                parameter.grad.zero_()
    sync_gradients(state.model)


def _update(state: TrainingState) -> None:
    state.scaler.unscale_(state.optimizer)
    if state.recipe.clip_norm is not None:
        nn.utils.clip_grad_norm_(state.parameters, state.recipe.clip_norm)
    state.scaler.step(state.optimizer)
    state.scaler.update()


def _of_whole_batch(forward: Callable[[], Counted], batch_size: int) -> tuple[Value, Value | None, float]:
    """Loss and accuracy of all ranks' shares together, and the weight of this rank's loss in the mean over ranks.

    A share counts by its targets. Only several processes read them on the host.
    """
    if world_size() == 1:
        return *forward()[:2], 1.0

    def own() -> tuple[float, float, int]:
        loss, right, targets = forward()
        counted = int(targets) if share(batch_size)[1] else 0
        return float(loss) if counted else 0.0, math.nan if right is None else float(right) if counted else 0.0, counted

    shares = gather(own)
    targets = max(sum(each[2] for each in shares), 1)
    loss, right = (sum(each[i] * each[2] for each in shares) / targets for i in (0, 1))
    return loss, right, world_size() * shares[process_rank()][2] / targets
