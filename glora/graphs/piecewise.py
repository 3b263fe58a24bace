"""A training step made of pieces, two per layer: one for paths of 2 dense products and one for those of 3."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn

from ..config import PathConfig
from ..layers.base import GLoRALayer
from ..layers.conv2d import GLoRAConv2d
from ..parameters import drop_unread_gradients
from .capture import CudaGraphs
from .path_data import PathAsData, PathData, RowScaledPathAsData, computed_by
from .step_body import StepBody


class PiecewiseStep:
    """A step in which every layer runs the cheapest of its pieces that serves its path; the rest runs without graphs.

    A piece is a graph of the layer's forward and one of its backward, or the same operations without graphs. The
    optimiser runs without graphs and skips what is not read.

    Args:
        graphs: None runs the operations one by one.
    """

    def __init__(self, body: StepBody, graphs: CudaGraphs | None):
        self._body, self._graphs, self._captured = body, graphs, False
        self._layers, rows = body.data.layers, body.data.rows()
        self._general = {name: PathAsData(layer, rows[name]) for name, layer in self._layers.items()}
        self._row_scaled = {
            name: RowScaledPathAsData(layer, rows[name]) for name, layer in self._layers.items() if _has_both(layer)
        }

    def __call__(self, x: Tensor, target: Tensor, paths: Mapping[str, PathConfig]) -> Tensor:
        self._body.data.set(paths)
        if self._graphs is not None and not self._captured:
            self._capture(x, target, self._graphs)
            self._captured = True
        self._body.optimizer.zero_grad(set_to_none=True)
        with computed_by({layer: self._piece(name, paths[name]) for name, layer in self._layers.items()}):
            loss = self._body.forward(x, target)
            loss.backward()  # this runs layers again if activations are checkpointed
        drop_unread_gradients(self._body.model, paths)
        self._body.clip()
        self._body.optimizer.step()
        return loss.detach()

    @property
    def _variants(self) -> tuple[Mapping[str, nn.Module], ...]:
        return self._general, self._row_scaled

    def _piece(self, name: str, path: PathConfig) -> nn.Module:
        if name in self._row_scaled and path.choices["A"].kind != "lora":
            return self._row_scaled[name]
        return self._general[name]

    def _capture(self, x: Tensor, target: Tensor, graphs: CudaGraphs) -> None:
        inputs = self._inputs(x, target)
        pieces = [(kind[name], inputs[name]) for name in inputs for kind in self._variants if name in kind]
        with self._body.autocast():
            graphs.capture_pieces([piece for piece, _ in pieces], [given for _, given in pieces])

    def _inputs(self, x: Tensor, target: Tensor) -> dict[str, Tensor]:
        """A tensor like the input of each layer, in the order in which they run.

        Raises:
            ValueError: a layer that never runs, or more than once: its graphs would overwrite their own tensors.
        """
        found: dict[str, Tensor] = {}
        counts = dict.fromkeys(self._layers, 0)
        general = {layer: self._general[name] for name, layer in self._layers.items()}
        with self._body.rehearsing(), _noted(self._body.data, found, counts), computed_by(general):
            self._body.forward(x, target)
        other = {name: count for name, count in counts.items() if count != 1}
        if other:
            raise ValueError(f"model: expected every adapted layer to run once a step, got by name {other}")
        return found


def _has_both(layer: GLoRALayer) -> bool:
    """Whether a low-rank A costs this layer one product more than other kinds."""
    return layer.product == "hadamard" and not isinstance(layer, GLoRAConv2d)


@contextmanager
def _noted(data: PathData, found: dict[str, Tensor], counts: dict[str, int]) -> Iterator[None]:
    """Record copies of the inputs of layers, and how often they run, in a ``with`` block."""

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
