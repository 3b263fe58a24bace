"""The state of a training run, and its checkpoint: what it takes to go on with the same bits."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .batches import mix
from .checksum import checksum
from .config import SearchSpace
from .distributed import averages_itself, sharded_like, unwrapped, whole
from .files import require_folder, write_atomically
from .paths import get_paths
from .ranks import from_first
from .recipe import Recipe

CHECKPOINT_FORMAT = 2


class StepRecord(NamedTuple):
    """What a step was like; ``accuracy`` is NaN where targets are no classes."""

    lr: float
    loss: float
    accuracy: float


class TrainingRun:
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
        self.records: list[StepRecord] = []
        self.optimizer = torch.optim.AdamW(parameters, lr=recipe.lr, weight_decay=recipe.weight_decay)
        warmup = round(recipe.warmup * recipe.steps)
        self.scheduler = CosineLRScheduler(
            self.optimizer,
            recipe.steps,
            lr_min=recipe.min_lr,
            warmup_t=warmup,
            warmup_lr_init=recipe.lr / (warmup + 1) if recipe.warmup_lr is None else recipe.warmup_lr,
            t_in_epochs=False,
        )
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=recipe.amp == "float16")
        self.generator = torch.Generator().manual_seed(mix(recipe.seed, -1))
        self._seconds, self._started = 0.0, time.perf_counter()

    @property
    def device(self) -> torch.device:
        return self.parameters[0].device

    @property
    def seconds(self) -> float:
        """Since the run began, without the time between a cut and its resume, and what was lost by the cut."""
        return self._seconds + time.perf_counter() - self._started

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
            "records": [tuple(record) for record in self.records],
            "seconds": self.seconds,
            "tensors": {**self._tensors(), **trained},
            "optimizer": _each_moment(self.optimizer.state_dict(), lambda _, moment: whole(moment)),
            "scaler": self.scaler.state_dict(),
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
        self.scaler.load_state_dict(state["scaler"])
        self.step, self.records = state["step"], [StepRecord(*record) for record in state["records"]]
        self._seconds, self._started = state["seconds"], time.perf_counter()
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
