"""Training steps in CUDA graphs: captured once, replayed with another path at every step."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import partial

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..config import PathConfig, SearchSpace
from ..models.modules import called, require_layers
from ..paths import Paths, sampler_for
from .capture import graphs_for
from .checks import check_amp, check_model, check_optimizer
from .path_data import PathData
from .piecewise import PiecewiseStep
from .step_body import Loss, Measure, Outcome, StepBody
from .whole import WholeStep

_MODES: dict[str, type[WholeStep] | type[PiecewiseStep]] = {"whole": WholeStep, "piecewise": PiecewiseStep}
_Inputs = Tensor | Mapping[str, Tensor]
_Form = tuple[tuple[str, torch.Size, torch.dtype], ...]


class GraphedStep:
    """A training step of adapted layers that is captured once and replayed with a new path every time.

    >>> step = glora.GraphedStep(model, optimizer, F.cross_entropy, glora.SearchSpace(), generator=generator)
    >>> for x, target in batches:
    ...     loss = step(x, target)

    Kinds and ranks of all layers are one small tensor on the device. The mode ``"whole"`` puts forward, loss, backward,
    clipping and the optimiser into one CUDA graph. There every hadamard layer whose A may be a low rank takes 3 dense
    products, since the graph computes that for every path. ``"piecewise"`` captures two pieces for such a layer, of 2
    and of 3 products, and runs the one that the path needs; operations between the layers run without graphs.

    A step does what the ordinary loop does: the gradients are those of the ordinary layer, and a support tensor that
    the paths do not read keeps its value, moments and step count and gets no weight decay. The layers' own paths are
    not changed. Without CUDA graphs (on a CPU) the same operations run one by one; so do those of a batch that has
    another shape or dtype than the captured one, such as a smaller last one.

    Args:
        model: in the mode (training or not) that it is to be captured in, on one device, in one process.
        optimizer: over every parameter that requires grad. On a GPU in the mode ``"whole"`` with ``capturable=True``,
            if it has the option. A learning rate may change between steps (:mod:`glora.graphs.hyperparameters`).
        loss_fn: ``(output, target) -> scalar``, without synchronisation.
        space: what paths are drawn from, evenly or by its shares; None takes those that the layers have at each step.
        mode: ``"whole"`` or ``"piecewise"``.
        clip_norm: scale gradients down to this norm over all parameters; None leaves them.
        amp: ``"bfloat16"``: autocast of forward and loss; None computes in the parameters' own types.
        generator: what paths are drawn with; None makes one of seed 0.
        compiler: applied to the function ``(x, target) -> (loss, measured)``, as ``torch.compile`` is; one compiled
            graph serves every path. Only in the mode ``"whole"``.
        measure: ``(output, target) -> tensor or None``, such as an accuracy; without synchronisation.

    Attributes:
        paths: those of the last step.
        measured: what ``measure`` returned in the last step, detached, on the device.

    Raises:
        ValueError: an argument that does not fit, by name, before anything is run.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        loss_fn: Loss,
        space: SearchSpace | None,
        *,
        mode: str = "whole",
        clip_norm: float | None = None,
        amp: str | None = None,
        generator: torch.Generator | None = None,
        compiler: Callable[[Callable], Callable] | None = None,
        measure: Measure | None = None,
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
        self._sampler = None if space is None else sampler_for(model, space, training=True)
        self._generator = torch.Generator().manual_seed(0) if generator is None else generator
        forward = partial(_forward, model, loss_fn, measure)
        self._body = StepBody(
            model,
            optimizer,
            forward if compiler is None else compiler(forward),
            check_amp(amp),
            PathData(layers),
            clip_norm,
        )
        kinds: dict[str, Collection[str]] = {
            name: (layer.path.choices["A"].kind,) if space is None else space.A for name, layer in layers.items()
        }
        self._step = _MODES[mode](self._body, graphs_for(self._body.device), kinds)
        self._captured: _Form | None = None
        self.paths: Paths | None = None
        self.measured: Tensor | None = None

    def __call__(
        self, x: _Inputs, target: Tensor, paths: Mapping[str, PathConfig] | PathConfig | None = None
    ) -> Tensor:
        """Take a step and return the loss, detached, ``()``. The first call captures.

        Args:
            x: a tensor, or in the mode ``"piecewise"`` the arguments of the model by name; on the model's device.
            target: a tensor, on that device.
            paths: of every adapted layer by name, or one for all of them; None draws them, or takes the layers' own.

        Raises:
            TypeError, ValueError: paths of another model, or a changed hyperparameter. In the mode ``"whole"`` also a
                kind of A that neither the space has nor, without one, the layer had when this was made.
            RuntimeError: in the mode ``"whole"``, the model's mode has changed, or the optimiser's state was loaded,
                since this was made.
        """
        self._check_batch(x, target)
        self.paths = self._paths(paths)
        if self._captured is None:
            self.capture(x, target)
        replay = self.replays(x, target)
        loss, measured = self._step(x, target, self.paths, replay)  # type: ignore[arg-type]  # _check_batch
        self.measured = None if measured is None else measured.detach()
        return loss

    def capture(self, x: _Inputs, target: Tensor) -> None:
        """Capture for batches like this one. It changes nothing: no parameter, buffer, or state of a generator.

        Raises:
            ValueError: in the mode ``"piecewise"``, a layer that does not run exactly once a step.
            RuntimeError: an operation that cannot be captured, or too little memory.
        """
        self._check_batch(x, target)
        self._step.capture(x, target)  # type: ignore[arg-type]  # _check_batch
        self._captured = _form(x, target)

    def replays(self, x: _Inputs, target: Tensor) -> bool:
        """Whether a step has been captured for batches of these shapes and dtypes."""
        return self._captured == _form(x, target)

    def _paths(self, given: Mapping[str, PathConfig] | PathConfig | None) -> Paths:
        if given is not None:
            return self._body.data.checked(given)
        if self._sampler is not None:
            return self._sampler.sample(self._generator)
        return {name: layer.path for name, layer in self._body.data.layers.items()}

    def _check_batch(self, x: _Inputs, target: Tensor) -> None:
        if isinstance(x, Mapping) and isinstance(self._step, WholeStep):
            raise ValueError("x: expected a tensor in the mode 'whole', got a mapping, which 'piecewise' takes")
        for name, value in _named(x, target).items():
            if not isinstance(value, Tensor):
                raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")
            if value.device != self._body.device:
                raise ValueError(f"{name}: expected device {self._body.device} (that of the model), got {value.device}")


def _forward(model: nn.Module, loss_fn: Loss, measure: Measure | None, x: _Inputs, target: Tensor) -> Outcome:
    output = called(model, x)
    return loss_fn(output, target), None if measure is None else measure(output, target)


def _named(x: _Inputs, target: Tensor) -> dict[str, Tensor]:
    inputs = {f"x[{name!r}]": value for name, value in x.items()} if isinstance(x, Mapping) else {"x": x}
    return {**inputs, "target": target}


def _form(x: _Inputs, target: Tensor) -> _Form:
    return tuple((name, value.shape, value.dtype) for name, value in _named(x, target).items())
