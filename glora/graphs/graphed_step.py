"""Supernet training in CUDA graphs: captured once, replayed with another path at every step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..config import PathConfig, SearchSpace
from ..models.modules import require_layers
from ..paths import Paths, sampler_for
from ..training.step import Loss
from .capture import graphs_for
from .checks import check_amp, check_model, check_optimizer
from .path_data import PathData
from .piecewise import PiecewiseStep
from .step_body import StepBody
from .whole import WholeStep

_MODES: dict[str, type[WholeStep] | type[PiecewiseStep]] = {"whole": WholeStep, "piecewise": PiecewiseStep}
_Form = tuple[torch.Size, torch.dtype]


class GraphedStep:
    """A training step of a supernet that is captured once and replayed with a new path every time.

    >>> step = glora.GraphedStep(model, optimizer, F.cross_entropy, glora.SearchSpace(), generator=generator)
    >>> for x, target in batches:
    ...     loss = step(x, target)

    Kinds and ranks of all layers are one small tensor on the device. The mode ``"whole"`` puts forward, loss, backward,
    clipping and the optimiser into one CUDA graph, in which every hadamard layer takes 3 dense products, since the
    graph computes a low-rank A for every path. ``"piecewise"`` captures two pieces for each such layer, of 2 and of 3
    products, and runs the one that the path needs; operations between the layers run without graphs.

    A step does what the ordinary loop does: the gradients are those of the ordinary layer, and a support tensor that
    the paths do not read keeps its value, moments and step count and gets no weight decay. The layers' own paths are
    neither read nor changed. Without CUDA graphs (on a CPU) the same operations run one by one.

    Args:
        model: in the mode (training or not) that it is to be captured in, on one device, in one process.
        optimizer: over every parameter that requires grad. On a GPU in the mode ``"whole"`` with ``capturable=True``,
            if it has the option. A learning rate may change between steps (:mod:`glora.graphs.hyperparameters`).
        loss_fn: ``(output, target) -> scalar``, without synchronisation.
        space: what paths are drawn from, uniformly.
        mode: ``"whole"`` or ``"piecewise"``.
        clip_norm: scale gradients down to this norm over all parameters; None leaves them.
        amp: ``"bfloat16"``: autocast of forward and loss; None computes in the parameters' own types.
        generator: what paths are drawn with; None makes one of seed 0.
        compiler: applied to the function ``(x, target) -> loss``, as ``torch.compile`` is; one compiled graph serves
            every path. Only in the mode ``"whole"``.

    Attributes:
        paths: those of the last step.

    Raises:
        ValueError: an argument that does not fit, by name, before anything is run.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        loss_fn: Loss,
        space: SearchSpace,
        *,
        mode: str = "whole",
        clip_norm: float | None = None,
        amp: str | None = None,
        generator: torch.Generator | None = None,
        compiler: Callable[[Callable], Callable] | None = None,
    ):
        if mode not in _MODES:
            raise ValueError(f"mode: expected one of {tuple(_MODES)}, got {mode!r}")
        if clip_norm is not None and not clip_norm > 0:
            raise ValueError(f"clip_norm: expected a number above 0 or None, got {clip_norm}")
        if compiler is not None and mode != "whole":
            raise ValueError(f"compiler: expected None in the mode {mode!r}, whose pieces are chosen by the host")
        layers = require_layers(model)
        check_model(model, layers)
        check_optimizer(model, optimizer, mode == "whole")
        self._sampler = sampler_for(model, space)
        self._generator = torch.Generator().manual_seed(0) if generator is None else generator
        self._training = model.training
        forward = partial(_forward, model, loss_fn)
        self._body = StepBody(
            model,
            optimizer,
            forward if compiler is None else compiler(forward),
            check_amp(amp),
            PathData(layers),
            clip_norm,
        )
        self._step = _MODES[mode](self._body, graphs_for(self._body.device))
        self._batch: tuple[_Form, _Form] | None = None
        self._state = optimizer.state  # loading a state dict replaces this object
        self.paths: Paths | None = None

    def __call__(self, x: Tensor, target: Tensor, paths: Mapping[str, PathConfig] | PathConfig | None = None) -> Tensor:
        """Take a step and return the loss, detached, ``()``. The first call captures.

        Args:
            x, target: on the model's device, of the shapes and dtypes of the first call.
            paths: of every adapted layer by name, or one for all of them; None draws them.

        Raises:
            TypeError, ValueError: another batch shape or dtype, paths of another model, or a changed hyperparameter.
            RuntimeError: the model's mode has changed, or the optimiser's state was loaded, since this was made.
        """
        self._check_batch(x, target)
        self._check_current()
        given = None if paths is None else self._body.data.checked(paths)
        self.paths = self._sampler.sample(self._generator) if given is None else given
        loss = self._step(x, target, self.paths)
        self._batch = _form(x), _form(target)
        return loss

    def _check_batch(self, x: Tensor, target: Tensor) -> None:
        for name, value in (("x", x), ("target", target)):
            if not isinstance(value, Tensor):
                raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")
            if value.device != self._body.device:
                raise ValueError(f"{name}: expected device {self._body.device} (that of the model), got {value.device}")
        for name, expected, value in zip(("x", "target"), self._batch or (), (x, target)):
            got = _form(value)
            if got != expected:
                raise ValueError(
                    f"{name}: expected {expected[1]} {tuple(expected[0])} as at the first step, which was captured, "
                    f"got {got[1]} {tuple(got[0])}; make a GraphedStep for each shape, or drop the last, smaller batch"
                )

    def _check_current(self) -> None:
        if self._body.optimizer.state is not self._state:
            raise RuntimeError("optimizer: expected the state that was captured, got another loaded; make a new step")
        training = self._body.model.training
        if training != self._training:
            raise RuntimeError(f"model: expected training={self._training} as captured, got {training}")


def _forward(model: nn.Module, loss_fn: Loss, x: Tensor, target: Tensor) -> Tensor:
    return loss_fn(model(x), target)


def _form(tensor: Tensor) -> _Form:
    return tensor.shape, tensor.dtype
