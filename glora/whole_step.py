"""A training step as one graph for every path."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .capture import Captured, CudaGraphs
from .config import PathConfig
from .hyperparameters import Hyperparameters
from .layer import SUPPORT_NAMES
from .path_data import PathAsData, PathData, computed_by
from .selective_update import SelectiveUpdate, create_state, state_tensors, unchanged

Forward = Callable[[Tensor, Tensor], Tensor]


class WholeStep:
    """Forward, loss, backward, clipping and update, from paths as data: one graph, or the same operations without one.

    Args:
        forward: ``(x, target) -> loss``.
        graphs: None runs the operations one by one.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        forward: Forward,
        data: PathData,
        clip_norm: float | None,
        graphs: CudaGraphs | None,
    ):
        self._model, self._optimizer, self._forward, self._data = model, optimizer, forward, data
        self._clip_norm, self._graphs = clip_norm, graphs
        places = _places(data)
        without = _never_read(data)
        self._parameters = [p for group in optimizer.param_groups for p in group["params"]]
        create_state(optimizer, [p for p in self._parameters if p.requires_grad and p not in without])
        self._update = SelectiveUpdate(optimizer, places)
        rows = data.rows()
        self._computations = {layer: PathAsData(layer, rows[name]) for name, layer in data.layers.items()}
        self._captured: Captured | None = None
        self._hyperparameters: Hyperparameters | None = None

    def __call__(self, x: Tensor, target: Tensor, paths: Mapping[str, PathConfig]) -> Tensor:
        self._data.set(paths)
        if self._graphs is None:
            return self._run(x, target)
        if self._captured is None:
            self._captured = self._capture(x, target, self._graphs)
        assert self._hyperparameters is not None
        self._hyperparameters.update()
        return self._captured(x, target)

    def _run(self, x: Tensor, target: Tensor) -> Tensor:
        self._optimizer.zero_grad(set_to_none=True)
        with computed_by(self._computations):
            loss = self._forward(x, target)
        loss.backward()
        if self._clip_norm is not None:
            nn.utils.clip_grad_norm_(self._parameters, self._clip_norm)
        self._update.step(self._data.read().flatten())
        return loss.detach()

    def _capture(self, x: Tensor, target: Tensor, graphs: CudaGraphs) -> Captured:
        """Leaves values, state, buffers and random numbers as they were: warming up has trained."""
        self._hyperparameters = Hyperparameters(self._optimizer, self._data.config.device)
        states = [tensor for p in self._parameters for tensor in state_tensors(self._optimizer, p)]
        changing = [*(p.detach() for p in self._parameters), *states, *self._model.buffers()]
        devices = [self._data.config.device] if self._data.config.is_cuda else []
        with unchanged(changing), torch.random.fork_rng(devices):
            return Captured(self._run, (x, target), graphs)


def _places(data: PathData) -> dict[nn.Parameter, int]:
    """The flag of every support tensor that is trained, as its place among ``data.read().flatten()``."""
    without, places = _never_read(data), {}
    for index, layer in enumerate(data.layers.values()):
        for column, name in enumerate(SUPPORT_NAMES):
            parameter = getattr(layer, name)
            if parameter.requires_grad and parameter not in without:
                places[parameter] = index * len(SUPPORT_NAMES) + column
    return places


def _never_read(data: PathData) -> set[nn.Parameter]:
    """D of layers without a bias has nothing to scale."""
    return {layer.D for layer in data.layers.values() if layer.bias is None}
