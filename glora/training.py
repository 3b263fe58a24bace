"""Training: of a supernet, with a random path per layer and step, or of a fixed path or plain model.

Everything that a step depends on is a function of the seed and of a state that is checkpointed:
the batch of step t is a pure function of (seed, t), paths are drawn outside forward from one
generator, and dropout uses torch's global one. A run that was cut and resumed therefore has the
same bits as one that was not (on one device type; with data loading that is itself repeatable).

Several processes (see :mod:`glora.distributed`) draw the same paths and the same batches; each takes its share of a
batch, and torch's generator starts anew each step, from the seed, the step and the rank.
"""

from __future__ import annotations

import math
import os
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, Sampler, TensorDataset
from tqdm.auto import tqdm

from .checksum import checksum
from .config import SearchSpace
from .distributed import (
    averages_itself,
    copy_from_first,
    require_trainable,
    sharded_like,
    share,
    sync_gradients,
    unwrapped,
    whole,
)
from .files import require_folder, write_atomically
from .modules import glora_layers
from .parameters import drop_unread_gradients, trainable_parameters
from .paths import get_paths, sampler_for, set_paths
from .ranks import from_first, gather, is_first, rank, require_agreement, require_group, together, world_size
from .sampling import PathSampler

CHECKPOINT_FORMAT = 1
Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Recipe:
    """How to train.

    Args:
        steps: optimiser steps.
        batch_size: samples a step.
        lr: peak learning rate of AdamW; cosine decay to 0 after a linear warm-up.
        weight_decay: AdamW's, on every trained tensor.
        warmup: the share of the steps that warms up.
        clip_norm: scale gradients down to this norm over all trained tensors; None leaves them.
        seed: of batches, paths and dropout.
        checkpoint_every: steps between checkpoints.

    Raises:
        ValueError: a value out of range.
    """

    steps: int = 500
    batch_size: int = 32
    lr: float = 1e-2
    weight_decay: float = 1e-4
    warmup: float = 0.02
    clip_norm: float | None = None
    seed: int = 0
    checkpoint_every: int = 100

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "checkpoint_every"):
            if type(getattr(self, name)) is not int or getattr(self, name) < 1:
                raise ValueError(f"{name}: expected an integer from 1, got {getattr(self, name)!r}")
        if type(self.seed) is not int:
            raise ValueError(f"seed: expected an integer, got {self.seed!r}")
        for name in ("lr", "weight_decay", "warmup", "clip_norm"):
            if not isinstance(getattr(self, name), (int, float)) and not (
                name == "clip_norm" and self.clip_norm is None
            ):
                raise ValueError(f"{name}: expected a number, got {getattr(self, name)!r}")
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise ValueError(f"clip_norm: expected a number above 0 or None, got {self.clip_norm}")
        if not self.lr > 0 or not self.weight_decay >= 0 or not 0 <= self.warmup < 1:
            raise ValueError(
                "recipe: expected lr > 0, weight_decay >= 0 and 0 <= warmup < 1, got "
                f"lr={self.lr}, weight_decay={self.weight_decay}, warmup={self.warmup}"
            )


@dataclass(frozen=True)
class TrainSummary:
    """What a run did; ``losses`` has one entry a step, those before a resume included."""

    steps: int
    losses: tuple[float, ...]
    seconds: float
    images_per_second: float
    resumed_from: int


class StepSampler(Sampler[list[int]]):
    """The indices of each step's batch: consecutive pieces of an endless row of shuffled epochs.

    The batch of step t depends on ``(size, batch_size, seed, t)`` alone, so that a resumed run
    continues without replaying the epochs before. Of each batch only ``part`` is yielded.
    """

    def __init__(self, size: int, batch_size: int, seed: int, start: int, stop: int, part: slice = slice(None)):
        self.size, self.batch_size, self.seed, self.start, self.stop = size, batch_size, seed, start, stop
        self.part = part

    def __len__(self) -> int:
        return self.stop - self.start

    def __iter__(self) -> Iterator[list[int]]:
        epoch, order = -1, []
        for step in range(self.start, self.stop):
            batch = []
            for position in range(step * self.batch_size, (step + 1) * self.batch_size):
                if position // self.size != epoch:
                    epoch = position // self.size
                    generator = torch.Generator().manual_seed(_mix(self.seed, epoch))
                    order = torch.randperm(self.size, generator=generator).tolist()
                batch.append(order[position % self.size])
            yield batch[self.part]


def train(
    model: nn.Module,
    dataset: Dataset,
    recipe: Recipe,
    *,
    space: SearchSpace | None = None,
    loss_fn: Loss = F.cross_entropy,
    checkpoint: str | os.PathLike | None = None,
    progress: bool = True,
    on_step: Callable[[int, float], object] | None = None,
) -> TrainSummary:
    """Train every parameter of ``model`` that requires grad.

    With a ``space`` the model is a supernet: each step draws a path for every layer from it, and
    only the tensors read get a gradient. The others keep ``grad`` None and the optimiser does not
    touch them: neither value, nor moments, nor weight decay. Afterwards the paths are as before, and
    the model is in training mode.

    Of several processes (``torchrun`` and ``torch.distributed.init_process_group``) every one calls it with the
    same arguments and gets the same parameters and losses, up to rounding those of one process: each takes its
    share of the batch of ``recipe.batch_size`` samples. All models start as rank 0's. Rank 0 alone reads and
    writes the checkpoint, which any number of processes can resume. The model may be within
    ``DistributedDataParallel`` with ``find_unused_parameters=True``, or within ``fully_shard``.

    Args:
        dataset: a map-style data set of ``(input, target)``.
        recipe: how to train.
        space: draw paths from it; None trains the model as it is.
        loss_fn: ``(output, target) -> scalar``; for several processes, a mean over samples.
        checkpoint: a file to resume from, if it exists, and to save to; written atomically.
        progress: show a bar with loss, accuracy (for class targets) and images per second.
        on_step: called with the step and its loss after each step and its checkpoint, on every rank.

    Raises:
        ValueError: nothing to train, an empty data set, a space that does not fit the model, a
            checkpoint of another run or in no folder, or a loss or parameters that are not finite; processes
            that have no group or differ in their arguments, or a wrapper or batch norm that would train wrongly.
        RuntimeError: another process failed.
    """
    require_group()
    run, sampler = together(lambda: _prepare(model, dataset, recipe, space))
    if world_size() > 1:
        _start_alike(run, checkpoint is not None)
    if checkpoint is None or not run.load(checkpoint):
        torch.manual_seed(recipe.seed)
    paths_before = get_paths(run.inner)
    model.train()
    resumed_from, started = run.step, time.perf_counter()
    bar = tqdm(total=recipe.steps, initial=run.step, desc="train", unit="step", disable=not (progress and is_first()))
    meter = _Meter(recipe.batch_size)
    batches = _batches(dataset, recipe, run.step)
    try:
        while run.step < recipe.steps:
            if sampler is not None:
                set_paths(run.inner, sampler.sample(run.generator))
            with _all_layers_run(run.inner) if run.step == resumed_from else nullcontext():
                loss, accuracy = _step(run, batches, loss_fn)
            meter.update(loss, accuracy)
            bar.update()
            bar.set_postfix_str(meter.text(), refresh=False)
            if checkpoint is not None and (run.step % recipe.checkpoint_every == 0 or run.step == recipe.steps):
                run.save(checkpoint)
            if on_step is not None:
                on_step(run.step, loss)
    finally:
        bar.close()
        if paths_before:
            set_paths(run.inner, paths_before)
    seconds = time.perf_counter() - started
    images = (run.step - resumed_from) * recipe.batch_size
    return TrainSummary(run.step, tuple(run.losses), seconds, images / seconds if seconds else 0.0, resumed_from)


def _prepare(
    model: nn.Module, dataset: Dataset, recipe: Recipe, space: SearchSpace | None
) -> tuple[_Run, PathSampler | None]:
    """What can be refused by looking at the arguments alone."""
    parameters = trainable_parameters(model)
    if not parameters:
        raise ValueError("model: expected parameters that require grad, found none")
    if not len(dataset):  # type: ignore[arg-type]
        raise ValueError("dataset: expected at least one sample, got none")
    require_trainable(model, space is not None)
    sampler = None if space is None else sampler_for(unwrapped(model), space)
    return _Run(model, parameters, recipe, space, len(dataset)), sampler  # type: ignore[arg-type]


def _start_alike(run: _Run, saves: bool) -> None:
    """Make sure that all ranks train the same, from the same tensors, and save at the same steps."""
    saving = {"checkpoint": saves, "checkpoint_every": run.recipe.checkpoint_every}
    require_agreement("arguments", {**run.task(), **saving})
    if not run.averages_itself:
        copy_from_first(run.inner)


@contextmanager
def _all_layers_run(model: nn.Module) -> Iterator[None]:
    """Warn of adapted layers whose forward is not called in the block: nothing they hold has an effect."""
    idle: dict[nn.Module, str] = {layer: name for name, layer in glora_layers(model).items()}

    def ran(layer: nn.Module, *_: object) -> None:
        idle.pop(layer, None)

    hooks = [layer.register_forward_hook(ran) for layer in idle]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
    if idle:
        warnings.warn(
            f"these layers did not run in the first step: {sorted(idle.values())}; if the model reads their weight "
            "instead of calling them, GLoRA has no effect there: exclude them in glora.inject",
            stacklevel=3,
        )


def _step(run: _Run, batches: Iterator[tuple[Tensor, Tensor]], loss_fn: Loss) -> tuple[float, float]:
    """One optimiser step: loss and accuracy of the whole batch."""
    run.scheduler.step_update(run.step)
    run.optimizer.zero_grad(set_to_none=True)
    own: list[Tensor] = []

    def forward() -> tuple[float, float, int]:
        x, target = next(batches)
        device = run.parameters[0].device
        output, target = run.model(x.to(device)), target.to(device)
        own.append(loss_fn(output, target))
        return float(own[0].detach()), _accuracy(output.detach(), target), share(run.recipe.batch_size)[1]

    value, accuracy = _weighted_means(gather(forward))
    if not math.isfinite(value):
        raise ValueError(f"loss: expected a finite value, got {value} at step {run.step}; try a smaller lr")
    [loss] = own
    if loss.requires_grad or run.space is None:  # a random path may read nothing at all
        _backward(run, loss)
    if run.recipe.clip_norm is not None:
        nn.utils.clip_grad_norm_(run.parameters, run.recipe.clip_norm)
    run.optimizer.step()
    run.losses.append(value)
    run.step += 1
    return value, accuracy


def _backward(run: _Run, loss: Tensor) -> None:
    """Gradients of the whole batch's loss: the mean over ranks, each weighted by its share."""
    batch_size = run.recipe.batch_size
    weight = world_size() * share(batch_size)[1] / batch_size
    (loss if weight == 1 else loss * weight).backward()
    drop_unread_gradients(run.inner)
    if not run.averages_itself:
        sync_gradients(run.model)


def _weighted_means(shares: list[tuple[float, float, int]]) -> tuple[float, float]:
    """Loss and accuracy over all samples from those of each share."""
    if len(shares) == 1:
        return shares[0][:2]
    samples = sum(each[2] for each in shares)
    loss, accuracy = (sum(each[i] * each[2] for each in shares) / samples for i in (0, 1))
    return loss, accuracy


def _accuracy(output: Tensor, target: Tensor) -> float:
    """NaN where targets are no classes."""
    classes = not target.is_floating_point() and output.dim() == 2 and target.dim() == 1
    return float((output.argmax(-1) == target).float().mean()) if classes else math.nan


def _batches(dataset: Dataset, recipe: Recipe, start: int) -> Iterator[tuple[Tensor, Tensor]]:
    part = share(recipe.batch_size)[0]
    size: int = len(dataset)  # type: ignore[arg-type]
    sampler = StepSampler(size, recipe.batch_size, recipe.seed, start, recipe.steps, part)
    # A generator of its own: without it the loader draws from torch's, which dropout uses.
    generator = torch.Generator().manual_seed(_mix(recipe.seed, start))
    if isinstance(dataset, TensorDataset):  # indexes a whole batch at once
        loader = DataLoader(dataset, batch_size=None, sampler=sampler, generator=generator)
    else:
        loader = DataLoader(dataset, batch_sampler=sampler, generator=generator)
    return iter(loader) if world_size() == 1 else _reseeded(iter(loader), recipe.seed, start)


def _reseeded(batches: Iterator[tuple[Tensor, Tensor]], seed: int, start: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Draws of ranks differ, and a resumed run needs no state of theirs."""
    for step in count(start):
        torch.manual_seed(_mix(_mix(seed, step), rank()))
        yield next(batches)


def _mix(seed: int, index: int) -> int:
    """A seed for the ``index``-th use of ``seed``."""
    return (seed * 1_000_003 + index * 7_919 + 12_345) % 2**63


class _Run:
    """A training run's state: everything a checkpoint holds."""

    def __init__(
        self,
        model: nn.Module,
        parameters: list[nn.Parameter],
        recipe: Recipe,
        space: SearchSpace | None,
        samples: int,
    ):
        from timm.scheduler import CosineLRScheduler  # here: timm takes seconds to import

        self.model, self.inner, self.averages_itself = model, unwrapped(model), averages_itself(model)
        self.parameters, self.recipe, self.space = parameters, recipe, space
        self.samples = samples
        self.step = 0
        self.losses: list[float] = []
        self.optimizer = torch.optim.AdamW(parameters, lr=recipe.lr, weight_decay=recipe.weight_decay)
        warmup = round(recipe.warmup * recipe.steps)
        self.scheduler = CosineLRScheduler(
            self.optimizer, recipe.steps, warmup_t=warmup, warmup_lr_init=recipe.lr / (warmup + 1), t_in_epochs=False
        )
        self.generator = torch.Generator().manual_seed(_mix(recipe.seed, -1))

    @cached_property
    def _frozen(self) -> int:
        """Formed on the first use: a run without a checkpoint reads no frozen weight for it."""
        trained = {id(parameter) for parameter in self.parameters}
        return checksum(whole(p) for p in self.inner.parameters() if id(p) not in trained)

    def task(self) -> dict[str, Any]:
        """What is to be trained and how, beside the tensors."""
        recipe = {name: value for name, value in asdict(self.recipe).items() if name != "checkpoint_every"}
        common = {"recipe": recipe, "samples": self.samples}
        if self.space is not None:
            return {**common, "space": self.space.to_dict()}
        return {**common, "paths": {name: path.to_dict() for name, path in get_paths(self.inner).items()}}

    def _identity(self) -> dict[str, Any]:
        """What a checkpoint must agree on to be continued; steps between checkpoints may differ."""
        return {**self.task(), "frozen": self._frozen}

    def _trained(self) -> dict[str, Tensor]:
        trained = {id(parameter) for parameter in self.parameters}
        return {name: p.detach() for name, p in self.inner.named_parameters() if id(p) in trained}

    def _tensors(self) -> dict[str, Tensor]:
        return {**self._trained(), **dict(self.inner.named_buffers())}

    def save(self, file: str | os.PathLike) -> None:
        """Write a checkpoint; raises ValueError, and keeps the previous one, if training has diverged."""
        trained = {name: whole(tensor) for name, tensor in self._trained().items()}
        if not all(bool(torch.isfinite(tensor).all()) for tensor in trained.values()):
            raise ValueError(f"parameters: expected finite values, not so at step {self.step}; try a smaller lr")
        state = {
            "format": CHECKPOINT_FORMAT,
            "identity": self._identity(),
            "step": self.step,
            "losses": self.losses,
            "tensors": {**self._tensors(), **trained},
            "optimizer": _each_moment(self.optimizer.state_dict(), lambda _, moment: whole(moment)),
            "path_generator": self.generator.get_state(),
            "torch_generator": torch.get_rng_state(),
            "cuda_generators": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        }
        from_first(lambda: write_atomically(file, lambda stream: torch.save(state, stream)))

    def load(self, file: str | os.PathLike) -> bool:
        """Continue from what :meth:`save` wrote; False if there is no such file."""
        state = from_first(lambda: _read_checkpoint(file))
        if state is None:
            return False
        if state["identity"] != self._identity():
            raise ValueError(f"{file}: checkpoint of another run: {state['identity']}, expected {self._identity()}")
        own = self._tensors()
        shapes = {name: tuple(tensor.shape) for name, tensor in own.items()}
        saved = {name: tuple(tensor.shape) for name, tensor in state["tensors"].items()}
        if saved != shapes:
            differing = sorted(name for name in {*shapes, *saved} if shapes.get(name) != saved.get(name))
            raise ValueError(f"{file}: checkpoint of another model: missing, unknown or differing tensors {differing}")
        with torch.no_grad():
            for name, tensor in state["tensors"].items():
                own[name].copy_(sharded_like(tensor, own[name]))
        self.optimizer.load_state_dict(_each_moment(state["optimizer"], self._part))
        self.generator.set_state(state["path_generator"])
        torch.set_rng_state(state["torch_generator"])
        if torch.cuda.is_available() and state["cuda_generators"]:
            torch.cuda.set_rng_state_all(state["cuda_generators"][: torch.cuda.device_count()])
        self.step, self.losses = state["step"], list(state["losses"])
        return True

    def _part(self, index: int, moment: Tensor) -> Tensor:
        return sharded_like(moment, self.parameters[index])


def _each_moment(optimizer: dict[str, Any], change: Callable[[int, Tensor], Tensor]) -> dict[str, Any]:
    """An optimiser's state dict with ``change(index of the parameter, tensor)`` for each tensor of its state."""
    state = {
        index: {key: change(index, value) if isinstance(value, Tensor) else value for key, value in entries.items()}
        for index, entries in optimizer["state"].items()
    }
    return {**optimizer, "state": state}


def _read_checkpoint(file: str | os.PathLike) -> dict[str, Any] | None:
    """None if there is no such file."""
    require_folder("checkpoint", file)
    if not Path(file).exists():
        return None
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
        version = state["format"]
    except Exception as error:
        raise ValueError(f"{file}: expected a training checkpoint, it is damaged or something else ({error})") from None
    if version != CHECKPOINT_FORMAT:
        raise ValueError(f"{file}: expected checkpoint format {CHECKPOINT_FORMAT}, got {version!r}")
    return state


class _Meter:
    """Running loss, accuracy and speed for the progress bar, over the last 50 steps."""

    def __init__(self, batch_size: int):
        self.batch_size = batch_size
        self.recent: deque[tuple[float, float, float]] = deque(maxlen=50)

    def update(self, loss: float, accuracy: float) -> None:
        self.recent.append((time.perf_counter(), loss, accuracy))

    def text(self) -> str:
        times, losses, accuracies = zip(*self.recent)
        steps, elapsed = len(times) - 1, times[-1] - times[0]
        speed = f", {steps * self.batch_size / elapsed:.0f} images/s" if elapsed else ""
        accuracy = sum(accuracies) / len(accuracies)
        right = "" if math.isnan(accuracy) else f", accuracy {accuracy:.1%}"
        return f"loss {sum(losses) / len(losses):.3f}{right}{speed}"
