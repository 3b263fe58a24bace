"""One optimiser step of a training run, on one rank of any number."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..arguments import type_of
from ..dataset import require_output, require_pair
from ..distributed import share, sync_gradients
from ..parameters import drop_unread
from ..processes import gather, world_size
from .state import StepRecord, TrainingState

Loss = Callable[[Tensor, Tensor], Tensor]


def take_step(state: TrainingState, batches: Iterator[tuple[Tensor, Tensor]], loss_fn: Loss) -> StepRecord:
    """Forward, backward and update; loss and accuracy are those of the whole batch.

    Raises:
        ValueError: a loss that is not finite, or that depends on nothing that is trained.
        TypeError: a loss that is not a scalar tensor; with the default loss, an output that is not a tensor.
    """
    state.scheduler.step_update(state.step)
    state.optimizer.zero_grad(set_to_none=True)
    own: list[Tensor] = []

    def forward() -> tuple[float, float, int]:
        batch = next(batches)
        require_pair("dataset", batch)
        x, target = batch
        x, target = x.to(state.device, non_blocking=True), target.to(state.device, non_blocking=True)
        with _precision(state):
            output = state.model(x)
            if getattr(loss_fn, "func", loss_fn) is F.cross_entropy:
                require_output(output, ", or pass a loss_fn that takes what it returns")
            own.append(_scalar(loss_fn(output, target)))
        return float(own[0].detach()), _accuracy(output, target), share(state.recipe.batch_size)[1]

    loss, accuracy = _weighted_means(gather(forward))
    if not math.isfinite(loss):
        raise ValueError(f"loss: expected a finite value, got {loss} at step {state.step}; try a smaller lr")
    if own[0].requires_grad:
        _backward(state, own[0])
        _update(state)
    elif state.space is None:  # a random path may read nothing at all
        raise ValueError(
            "loss: expected one that depends on what is trained, got one without a gradient; is the forward pass "
            "detached or under no_grad?"
        )
    record = StepRecord(state.optimizer.param_groups[0]["lr"], loss, accuracy)
    state.records.append(record)
    state.step += 1
    return record


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


def _weighted_means(shares: list[tuple[float, float, int]]) -> tuple[float, float]:
    """Loss and accuracy over all samples from those of each share."""
    if len(shares) == 1:
        return shares[0][:2]
    samples = sum(each[2] for each in shares)
    loss, accuracy = (sum(each[i] * each[2] for each in shares) / samples for i in (0, 1))
    return loss, accuracy


def _scalar(loss: object) -> Tensor:
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        got = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type_of(loss)
        raise TypeError(f"loss_fn: expected it to return a scalar tensor, got {got}")
    return loss


def _accuracy(output: object, target: Tensor) -> float:
    """The accuracy of a batch; NaN if outputs are not logits or targets are not classes."""
    if not isinstance(output, Tensor):
        return math.nan
    classes = not target.is_floating_point() and output.dim() == 2 and target.dim() == 1
    return float((output.argmax(-1) == target).float().mean()) if classes else math.nan
