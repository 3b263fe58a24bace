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
from ..processes import gather, world_size
from .graphing import StepGraphs
from .results import Results
from .state import StepRecord, TrainingState

Outcome = tuple[Tensor | float, Tensor | float | None]  # loss and accuracy, which is None without classes


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

    def forward() -> Outcome:
        batch = require_batch("dataset", next(batches)).to(state.device)
        paths = None if state.space is None else {name: layer.path for name, layer in state.layers.items()}
        graphed = graphs.take(batch, paths)
        if graphed is not None:  # it also went backward and updated
            return graphed
        state.optimizer.zero_grad(set_to_none=True)
        with _precision(state):
            output = objective.output(state.model, batch)
            own.append(objective.loss(output, batch.target, batch.named))
        return own[0].detach(), objective.accuracy(output, batch.target, batch.named)

    results.add(lr, *_of_whole_batch(forward, state.recipe.batch_size))
    records = results.read()
    if own and own[0].requires_grad:
        _backward(state, own[0])
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


def _backward(state: TrainingState, loss: Tensor) -> None:
    """Gradients of the whole batch's loss: the mean over ranks, each weighted by its share."""
    batch_size = state.recipe.batch_size
    weight = world_size() * share(batch_size)[1] / batch_size
    state.scaler.scale(loss if weight == 1 else loss * weight).backward()
    drop_unread(state.layers)
    if not state.averages_itself:
        sync_gradients(state.model)


def _update(state: TrainingState) -> None:
    state.scaler.unscale_(state.optimizer)
    if state.recipe.clip_norm is not None:
        nn.utils.clip_grad_norm_(state.parameters, state.recipe.clip_norm)
    state.scaler.step(state.optimizer)
    state.scaler.update()


def _of_whole_batch(forward: Callable[[], Outcome], batch_size: int) -> Outcome:
    """Loss and accuracy of all ranks' shares together. Only several processes read them on the host."""
    if world_size() == 1:
        return forward()

    def own() -> tuple[float, float, int]:
        loss, right = forward()
        return float(loss), math.nan if right is None else float(right), share(batch_size)[1]

    shares = gather(own)
    samples = sum(each[2] for each in shares)
    loss, right = (sum(each[i] * each[2] for each in shares) / samples for i in (0, 1))
    return loss, right
