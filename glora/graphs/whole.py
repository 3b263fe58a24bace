"""A training step as one graph for every path."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from ..config import PathConfig
from ..layers.base import SUPPORT_NAMES
from .capture import Captured, CudaGraphs
from .hyperparameters import Hyperparameters
from .path_data import PathAsData, PathData, computed_by
from .selective_update import SelectiveUpdate, create_state, state_tensors
from .step_body import StepBody


class WholeStep:
    """Forward, loss, backward, clipping and update, from paths as data: one graph, or the same operations without one.

    Args:
        graphs: None runs the operations one by one.
    """

    def __init__(self, body: StepBody, graphs: CudaGraphs | None):
        self._body, self._graphs = body, graphs
        without = _never_read(body.data)
        create_state(body.optimizer, [p for p in body.parameters if p.requires_grad and p not in without])
        self._update = SelectiveUpdate(body.optimizer, _places(body.data))
        rows = body.data.rows()
        self._computations = {layer: PathAsData(layer, rows[name]) for name, layer in body.data.layers.items()}
        self._captured: Captured | None = None
        self._hyperparameters: Hyperparameters | None = None

    def __call__(self, x: Tensor, target: Tensor, paths: Mapping[str, PathConfig]) -> Tensor:
        self._body.data.set(paths)
        if self._graphs is None:
            return self._run(x, target)
        if self._hyperparameters is None:
            self._hyperparameters = Hyperparameters(self._body.optimizer, self._body.device)
        self._hyperparameters.update()
        if self._captured is None:
            self._captured = self._capture(x, target, self._graphs)
        return self._captured(x, target)

    def _run(self, x: Tensor, target: Tensor) -> Tensor:
        self._body.optimizer.zero_grad(set_to_none=True)
        with computed_by(self._computations):
            loss = self._body.forward(x, target)
            loss.backward()  # this runs layers again if activations are checkpointed
        self._body.clip()
        self._update.step(self._body.data.read().flatten())
        return loss.detach()

    def _capture(self, x: Tensor, target: Tensor, graphs: CudaGraphs) -> Captured:
        """Capture the step. Warming up trains, so what it has changed is restored."""
        parameters = self._body.parameters
        states = [tensor for p in parameters for tensor in state_tensors(self._body.optimizer, p)]
        with self._body.rehearsing([*(p.detach() for p in parameters), *states]):
            return Captured(self._run, (x, target), graphs)


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
