"""The state of a training run, and its checkpoint: what it takes to go on with the same bits."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from fractions import Fraction
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from glora_kernels.checks import FLOATING

from ..arguments import differences
from ..config import SearchSpace
from ..distributed import averages_itself, sharded_like, unwrapped, whole
from ..files import checksum, require_file, write_atomically
from ..models.contents import require_fit, slots
from ..models.modules import glora_layers, require_layers
from ..models.wrappers import modules_by_name, name_in, named_buffers, named_parameters, tensors_in
from ..objective import Metrics
from ..processes import from_first
from ..random_numbers import mix
from ..scales import Scales
from .recipe import Recipe

CHECKPOINT_FORMAT, SCALED = 3, 4  # the second has scales of kinds other than 1
READABLE = (2, 3, 4)  # format 2: neither products nor data are compared
# Names of the entries of an identity in messages.
_NAMES = {"samples": "samples in the data set", "frozen": "checksum of the frozen weights", "data": "data set"}
_ENTRIES = (
    *("identity", "step", "records", "seconds", "tensors", "optimizer", "scaler"),
    *("path_generator", "torch_generator", "cuda_generators"),
)


class StepRecord(NamedTuple):
    """The results of a step; ``accuracy`` is NaN if targets are not classes."""

    lr: float
    loss: float
    accuracy: float


class TrainingState:
    """A training run's state: everything a checkpoint holds.

    Args:
        samples: how many the data have; None if they do not say.
        epochs_per_step: the part of a pass over the data that a step is; None if a pass has no length.
        capturable: keep the optimiser's step counts on the device, as a step in one CUDA graph needs.

    Attributes:
        data: what tells the data set from others (:func:`glora.training.batches.fingerprint`), or None.
        validations: the results on validation data, by the step after which they were formed.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: list[nn.Parameter],
        recipe: Recipe,
        space: SearchSpace | None,
        samples: int | None,
        epochs_per_step: Fraction | None,
        capturable: bool = False,
    ):
        from timm.scheduler import CosineLRScheduler  # here: timm takes seconds to import

        self.model, self.inner, self.averages_itself = model, unwrapped(model), averages_itself(model)
        self.data: int | None = None
        self.parameters, self.recipe, self.space = parameters, recipe, space
        self.samples, self.epochs_per_step = samples, epochs_per_step
        self.seen = 0  # samples, in the steps of this call and on this rank
        self.find_layers()
        self.step = 0
        self.records: list[StepRecord] = []
        self.validations: dict[int, Metrics] = {}
        self.optimizer = torch.optim.AdamW(
            parameters, lr=recipe.lr, weight_decay=recipe.weight_decay, capturable=capturable
        )
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

    def find_layers(self) -> None:
        """Find the adapted layers, by name: a walk over the model takes longer than setting the paths of a step.

        Raises:
            ValueError: random paths, and no layer to draw them for.
        """
        self.layers = glora_layers(self.inner) if self.space is None else require_layers(self.inner)

    @property
    def device(self) -> torch.device:
        return self.parameters[0].device

    @property
    def seconds(self) -> float:
        """Seconds since the run began, without the time between a cut and its resume and without lost work."""
        return self._seconds + time.perf_counter() - self._started

    @cached_property
    def _frozen(self) -> int:
        """The checksum of the frozen weights. It is formed on first use: without a checkpoint, none is read."""
        trained = {id(parameter) for parameter in self.parameters}
        return checksum(whole(p) for p in self.inner.parameters() if id(p) not in trained)

    def arguments(self) -> dict[str, Any]:
        """What is trained and how, apart from the tensors."""
        recipe = {name: value for name, value in asdict(self.recipe).items() if name != "checkpoint_every"}
        if self.recipe.balance is None:
            del recipe["balance"]  # as in checkpoints of releases that did not have it
        common: dict[str, Any] = {"recipe": recipe, "samples": self.samples}
        if self.layers:
            common["products"] = {name: layer.product for name, layer in self.layers.items()}
        if self.space is not None:
            return {**common, "space": self.space.to_dict()}
        return {**common, "paths": {name: layer.path.to_dict() for name, layer in self.layers.items()}}

    def _identity(self) -> dict[str, Any]:
        """What must be equal to continue a checkpoint. ``checkpoint_every`` may differ."""
        return {**self.arguments(), "frozen": self._frozen, "data": self.data}

    def _require_same(self, identity: Mapping[str, Any], file: str | os.PathLike) -> None:
        """Raise ValueError, saying what differs, unless a checkpoint is this run's."""
        own, found = self._identity(), dict(identity)
        for key in ("products", "paths"):
            if key in found:
                found[key] = {name_in(self.layers, name): value for name, value in found[key].items()}
        common = own.get("products", {}).keys() & found.get("products", {}).keys()  # other layers have other tensors
        for each in (own, found):
            each["products"] = {name: product for name, product in each.get("products", {}).items() if name in common}
        if found.get("data") is None or own["data"] is None:
            own["data"] = found["data"] = None
        if found != own:
            then, now = ({_NAMES.get(key, key): value for key, value in each.items()} for each in (found, own))
            differing = differences(then, now, ": {} in the checkpoint, {} now")
            raise ValueError(
                f"{file}: checkpoint of another run: {differing}; go on as it was, or give another file to begin anew"
            )

    def scales(self) -> dict[str, dict[str, dict[str, float]]]:
        """The scales of kinds that are not 1, by layer, as plain data."""
        return {name: layer.scales.to_dict() for name, layer in self.layers.items() if layer.scales.factors}

    def _trained(self) -> dict[str, Tensor]:
        trained = {id(parameter) for parameter in self.parameters}
        return {name: p.detach() for name, p in named_parameters(self.inner) if id(p) in trained}

    def _tensors(self) -> dict[str, Tensor]:
        return {**self._trained(), **dict(named_buffers(self.inner))}

    def save(self, file: str | os.PathLike) -> None:
        """Write a checkpoint; raises ValueError, and keeps the previous one, if training has diverged."""
        trained = {name: whole(tensor) for name, tensor in self._trained().items()}
        if not all(bool(torch.isfinite(tensor).all()) for tensor in trained.values()):
            raise ValueError(f"parameters: expected finite values, not so at step {self.step}; try a smaller lr")
        scales = self.scales()
        state = {
            "format": SCALED if scales else CHECKPOINT_FORMAT,
            "scales": scales,
            "identity": self._identity(),
            "step": self.step,
            "records": [tuple(record) for record in self.records],
            "validations": {step: tuple(metrics) for step, metrics in self.validations.items()},
            "seconds": self.seconds,
            "tensors": {**self._tensors(), **trained},
            "optimizer": _as_data(_each_moment(self.optimizer.state_dict(), lambda _, moment: whole(moment))),
            "scaler": self.scaler.state_dict(),
            "path_generator": self.generator.get_state(),
            "torch_generator": torch.get_rng_state(),
            "cuda_generators": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        }
        from_first(lambda: write_atomically(file, lambda stream: torch.save(state, stream), "checkpoint"))

    def load(self, file: str | os.PathLike) -> bool:
        """Continue from what :meth:`save` wrote; False if there is no such file.

        Everything is checked before anything of the model is changed.
        """
        state = from_first(lambda: _read_checkpoint(file))
        if state is None:
            return False
        self._require_same(state["identity"], file)
        own = self._tensors()
        tensors = tensors_in(modules_by_name(self.inner), state["tensors"], file)
        expected = {name: slot for name, slot in slots(self.inner).items() if name in own}
        trained = self._trained()
        require_fit(file, tensors, {n: slot._replace(infinite=n not in trained) for n, slot in expected.items()})
        scales = self._load_own(state, file)
        for name, layer in self.layers.items():
            layer.scales = scales.get(name, Scales())
        with torch.no_grad():
            for name, tensor in tensors.items():
                own[name].copy_(sharded_like(tensor, own[name]))
        torch.set_rng_state(state["torch_generator"])
        if torch.cuda.is_available() and state["cuda_generators"]:
            torch.cuda.set_rng_state_all(state["cuda_generators"][: torch.cuda.device_count()])
        self.step = state["step"]
        self._seconds, self._started = state["seconds"], time.perf_counter()
        return True

    def _load_own(self, state: dict[str, Any], file: str | os.PathLike) -> dict[str, Scales]:
        """Load what belongs to this run and not to the model; return the scales by layer.

        Raises:
            ValueError: it is damaged.
        """
        try:
            self.optimizer.load_state_dict(self._with_own_options(_each_moment(state["optimizer"], self._part)))
            self.scaler.load_state_dict(state["scaler"])
            self.generator.set_state(state["path_generator"])
            torch.Generator().set_state(state["torch_generator"])  # to see whether it can be set
            self.records = [StepRecord(*record) for record in state["records"]]
            found = state.get("validations", {})  # earlier releases had none
            self.validations = {step: Metrics(*metrics) for step, metrics in found.items()}
            scales = state.get("scales", {}).items()
            return {name_in(self.layers, name): Scales.from_dict(factors) for name, factors in scales}
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(f"{file}: expected a training checkpoint, it is damaged ({error!r})") from None

    def _with_own_options(self, optimizer: dict[str, Any]) -> dict[str, Any]:
        """An optimiser's state dict, but how it computes is this run's choice: the device may be another."""
        options = {name: self.optimizer.defaults[name] for name in ("capturable", "foreach", "fused")}
        return {**optimizer, "param_groups": [{**group, **options} for group in optimizer["param_groups"]]}

    def _part(self, index: int, moment: Tensor) -> Tensor:
        parameter = self.parameters[index]
        if moment.dtype not in FLOATING or tuple(moment.shape) not in ((), tuple(parameter.shape)):
            raise ValueError(f"parameter {index}: a moment of {moment.dtype}, {tuple(moment.shape)}")
        return sharded_like(moment, parameter)


def checkpoint_steps(file: str | os.PathLike) -> tuple[int, int] | None:
    """How many steps a checkpoint has behind it, and of how many; None if there is no such file.

    Raises:
        ValueError: no training checkpoint.
    """
    # where there is not even a folder, _read_checkpoint would refuse it
    state = _read_checkpoint(file, mmap=True) if os.path.exists(file) else None
    return None if state is None else (state["step"], state["identity"]["recipe"]["steps"])


def _each_moment(optimizer: dict[str, Any], change: Callable[[int, Tensor], Tensor]) -> dict[str, Any]:
    """An optimiser's state dict with ``change(index of the parameter, tensor)`` for each tensor of its state."""
    state = {
        index: {key: change(index, value) if isinstance(value, Tensor) else value for key, value in entries.items()}
        for index, entries in optimizer["state"].items()
    }
    return {**optimizer, "state": state}


def _as_data(optimizer: dict[str, Any]) -> dict[str, Any]:
    """An optimiser's state dict whose learning rates are numbers, also where a graph reads them from tensors."""
    groups = [{**group, "lr": float(group["lr"])} for group in optimizer["param_groups"]]
    return {**optimizer, "param_groups": groups}


def _read_checkpoint(file: str | os.PathLike, mmap: bool = False) -> dict[str, Any] | None:
    """None if there is no such file; ``mmap`` leaves the tensors on disk."""
    if not require_file("checkpoint", file).exists():
        return None
    try:
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=mmap)
        version = state["format"]
    except Exception as error:
        raise ValueError(f"{file}: expected a training checkpoint, it is damaged or something else ({error})") from None
    if version not in READABLE:
        raise ValueError(f"{file}: expected checkpoint format {READABLE[0]} to {READABLE[-1]}, got {version!r}")
    absent = [entry for entry in _ENTRIES if entry not in state]
    if absent:
        raise ValueError(f"{file}: expected a training checkpoint, it is damaged: it has no {absent}")
    return state
