"""A training step strung together of pieces, two a layer: one for paths of 2 dense products and one for those of 3."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .capture import CudaGraphs
from .config import PathConfig
from .conv import GLoRAConv2d
from .layer import GLoRALayer
from .parameters import drop_unread_gradients
from .path_data import PathAsData, PathData, RowScaledPathAsData, computed_by
from .selective_update import unchanged
from .whole_step import Forward


class PiecewiseStep:
    """A step in which every layer runs the cheaper of its pieces that serves its path; the rest runs as ever.

    A piece is a graph of the layer's forward and one of its backward, or the same operations without graphs. The
    optimiser, outside of graphs, skips what is not read.

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
        self._parameters = [p for group in optimizer.param_groups for p in group["params"]]
        rows = data.rows()
        self._general = {name: PathAsData(layer, rows[name]) for name, layer in data.layers.items()}
        self._row_scaled = {
            name: RowScaledPathAsData(layer, rows[name]) for name, layer in data.layers.items() if _has_both(layer)
        }
        self._captured = False

    def __call__(self, x: Tensor, target: Tensor, paths: Mapping[str, PathConfig]) -> Tensor:
        self._data.set(paths)
        if self._graphs is not None and not self._captured:
            self._capture(x, target, self._graphs)
            self._captured = True
        self._optimizer.zero_grad(set_to_none=True)
        with computed_by({layer: self._piece(name, paths[name]) for name, layer in self._data.layers.items()}):
            loss = self._forward(x, target)
        loss.backward()
        drop_unread_gradients(self._model, paths)
        if self._clip_norm is not None:
            nn.utils.clip_grad_norm_(self._parameters, self._clip_norm)
        self._optimizer.step()
        return loss.detach()

    def _piece(self, name: str, path: PathConfig) -> nn.Module:
        if name in self._row_scaled and path.choices["A"].kind != "lora":
            return self._row_scaled[name]
        return self._general[name]

    def _capture(self, x: Tensor, target: Tensor, graphs: CudaGraphs) -> None:
        inputs = self._inputs(x, target)
        names = [name for name in inputs for group in (self._general, self._row_scaled) if name in group]
        pieces = [group[name] for name in inputs for group in (self._general, self._row_scaled) if name in group]
        graphs.capture_pieces(tuple(pieces), tuple((inputs[name],) for name in names))

    def _inputs(self, x: Tensor, target: Tensor) -> dict[str, Tensor]:
        """A tensor like the input of each layer, in the order in which they run.

        Raises:
            ValueError: a layer that runs more than once, whose graphs would overwrite their own tensors, or never.
        """
        found: dict[str, Tensor] = {}
        counts = dict.fromkeys(self._data.layers, 0)
        devices = [self._data.config.device] if self._data.config.is_cuda else []
        general = {layer: self._general[name] for name, layer in self._data.layers.items()}
        noted = _noted(self._data, found, counts)
        with unchanged(self._model.buffers()), torch.random.fork_rng(devices), computed_by(general), noted:
            self._forward(x, target)
        other = {name: count for name, count in counts.items() if count != 1}
        if other:
            raise ValueError(f"model: expected every adapted layer to run once a step, got by name {other}")
        return found


def _has_both(layer: GLoRALayer) -> bool:
    """Whether a low-rank A costs this layer a product more than others."""
    return layer.product == "hadamard" and not isinstance(layer, GLoRAConv2d)


@contextmanager
def _noted(data: PathData, found: dict[str, Tensor], counts: dict[str, int]) -> Iterator[None]:
    """Write down copies of what layers are given, and how often they run, for a ``with`` block."""

    def hook(name: str):
        def note(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            counts[name] += 1
            found[name] = inputs[0].detach().clone().requires_grad_(inputs[0].requires_grad)

        return note

    handles = [layer.register_forward_pre_hook(hook(name)) for name, layer in data.layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
