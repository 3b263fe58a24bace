"""A training step as one graph for every path."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import Tensor, nn

from ..config import PathConfig
from ..layers.base import SUPPORT_NAMES
from .capture import Captured, CudaGraphs
from .hyperparameters import Hyperparameters
from .path_data import PathData, cheapest, computed_by
from .selective_update import SelectiveUpdate, create_state, state_tensors
from .step_body import Outcome, StepBody


class WholeStep:
    """Forward, loss, backward, clipping and update, from paths as data: one graph, or the same operations without one.

    Args:
        graphs: None runs the operations one by one.
        kinds: the kinds that A may have in each layer.
    """

    def __init__(self, body: StepBody, graphs: CudaGraphs | None, kinds: Mapping[str, Collection[str]]):
        self._body, self._graphs, self._kinds = body, graphs, kinds
        without = _never_read(body.data)
        create_state(body.optimizer, [p for p in body.parameters if p.requires_grad and p not in without])
        self._update = SelectiveUpdate(body.optimizer, _places(body.data))
        layers, rows = body.data.layers, body.data.rows()
        self._computations = {layer: cheapest(layer, rows[name], kinds[name]) for name, layer in layers.items()}
        self._captured: Captured | None = None
        self._hyperparameters: Hyperparameters | None = None
        self._state, self._training = body.optimizer.state, body.model.training  # loading a state puts another there

    def __call__(self, x: Tensor, target: Tensor, paths: Mapping[str, PathConfig], replay: bool) -> Outcome:
        self._check(paths)
        self._body.data.set(paths)
        if self._hyperparameters is not None:
            self._hyperparameters.update()
        if not replay or self._captured is None:
            return self._run(x, target)
        loss, measured = self._captured(x, target)
        assert loss is not None
        return loss, measured

    def _check(self, paths: Mapping[str, PathConfig]) -> None:
        if self._body.optimizer.state is not self._state:
            raise RuntimeError("optimizer: expected the state that was captured, got another loaded; make a new step")
        training = self._body.model.training
        if training != self._training:
            raise RuntimeError(f"model: expected training={self._training} as captured, got {training}")
        other = {
            name: kind for name, path in paths.items() if (kind := path.choices["A"].kind) not in self._kinds[name]
        }
        if other:
            raise ValueError(f"paths: expected an A of a kind that the step was made for, got by name {other}")

    def _run(self, x: Tensor, target: Tensor) -> Outcome:
        # after a capture, gradients stay in the memory that the graph writes them to
        self._body.optimizer.zero_grad(set_to_none=self._captured is None)
        with computed_by(self._computations):
            loss, measured = self._body.forward(x, target)
            loss.backward()  # this runs layers again if activations are checkpointed
        self._body.clip()
        self._update.step(self._body.data.read().flatten())
        return loss.detach(), measured

    def capture(self, x: Tensor, target: Tensor) -> None:
        """Capture the step for batches of this form. Warming up trains, so what it has changed is restored."""
        if self._graphs is None:
            return
        self._hyperparameters = Hyperparameters(self._body.optimizer, self._body.device)
        parameters = self._body.parameters
        states = [tensor for p in parameters for tensor in state_tensors(self._body.optimizer, p)]
        with self._body.rehearsing([*(p.detach() for p in parameters), *states]):
            self._captured = Captured(self._run, (x, target), self._graphs)


def _places(data: PathData) -> dict[nn.Parameter, int]:
    """The index in ``data.read().flatten()`` of the flag of every support tensor that is trained."""
    without, places = _never_read(data), {}
    for index, layer in enumerate(data.layers.values()):
        for column, name in enumerate(SUPPORT_NAMES):
            parameter = getattr(layer, name)
            if parameter.requires_grad and parameter not in without:
                places[parameter] = index * len(SUPPORT_NAMES) + column
    return places


def _never_read(data: PathData) -> set[nn.Parameter]:
    """D of layers without a bias: it has nothing to scale."""
    return {layer.D for layer in data.layers.values() if layer.bias is None}
