"""A training step made of pieces, two per layer: one for paths of 2 dense products and one for those of 3."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from glora_kernels.torch_private import hooks_on_top

from ..arguments import listed
from ..config import PathConfig
from ..parameters import drop_unread
from .capture import CudaGraphs
from .path_data import PathAsData, PathData, cheapest, computed_by
from .step_body import Outcome, StepBody


class PiecewiseStep:
    """A step in which every layer runs the cheapest of its pieces that serves its path; the rest runs without graphs.

    A piece is a graph of the layer's forward and one of its backward, or the same operations without graphs. The
    optimiser runs without graphs and skips what is not read.

    Args:
        graphs: None runs the operations one by one.
        kinds: the kinds that A may have in each layer. Pieces that other kinds need are not captured.
    """

    def __init__(self, body: StepBody, graphs: CudaGraphs | None, kinds: Mapping[str, Collection[str]]):
        self._body, self._graphs, self._kinds, self._layers = body, graphs, kinds, body.data.layers
        rows = body.data.rows()
        self._general = {name: PathAsData(layer, rows[name]) for name, layer in self._layers.items()}
        cheap = {name: cheapest(layer, rows[name], ("none",)) for name, layer in self._layers.items()}
        self._cheap = {name: piece for name, piece in cheap.items() if type(piece) is not PathAsData}
        self._captured: dict[nn.Module, _Replayed] = {}

    def __call__(self, x: Any, target: Tensor, paths: Mapping[str, PathConfig], replay: bool) -> Outcome:
        self._body.data.set(paths)
        self._body.optimizer.zero_grad(set_to_none=True)
        pieces: dict[str, nn.Module] = {name: self._piece(name, p.choices["A"].kind) for name, p in paths.items()}
        if replay:
            pieces = {name: self._captured.get(piece, piece) for name, piece in pieces.items()}
        with computed_by({layer: pieces[name] for name, layer in self._layers.items()}):
            loss, measured = self._body.forward(x, target)
            loss.backward()  # this runs layers again if activations are checkpointed
        drop_unread(self._layers, paths)
        self._body.clip()
        self._body.optimizer.step()
        return loss.detach(), measured

    def _piece(self, name: str, kind: str) -> PathAsData:
        """What runs the layer under paths with this kind of A."""
        return self._general[name] if kind == "lora" else self._cheap.get(name, self._general[name])

    def capture(self, x: Any, target: Tensor) -> None:
        """Capture the pieces for batches of this form, and try a step with them that changes nothing.

        Raises:
            ValueError: a layer that never runs, or more than once: its graphs would overwrite their own tensors.
                Activation checkpointing: graphs share memory that is free to others before a forward runs again.
            RuntimeError: too little memory, in the capture or in the step.
        """
        if self._graphs is None:
            return
        inputs = self._inputs(x, target)
        needed = {self._piece(name, kind): inputs[name] for name in inputs for kind in sorted(self._kinds[name])}
        graphed = {piece: type(piece)(piece.layer, piece.row) for piece in needed}
        with self._body.autocast():
            self._graphs.capture_pieces(list(graphed.values()), list(needed.values()))
        captured: dict[nn.Module, _Replayed] = {
            piece: _Replayed(piece, graphed[piece], given) for piece, given in needed.items()
        }
        first = {self._layers[name]: captured[self._piece(name, sorted(self._kinds[name])[0])] for name in inputs}
        with self._body.rehearsing(), computed_by(first):
            self._body.forward(x, target)[0].backward()
        self._body.optimizer.zero_grad(set_to_none=True)
        self._captured = captured

    def _inputs(self, x: Any, target: Tensor) -> dict[str, Tensor]:
        """A tensor like the input of each layer, in the order in which they run."""
        found: dict[str, Tensor] = {}
        counts = dict.fromkeys(self._layers, 0)
        hooked: set[str] = set()
        general = {layer: self._general[name] for name, layer in self._layers.items()}
        with self._body.rehearsing(), _noted(self._body.data, found, counts, hooked), computed_by(general):
            self._body.forward(x, target)
        other = {name: count for name, count in counts.items() if count != 1}
        if other:
            raise ValueError(f"model: expected every adapted layer to run once a step, got by name {other}")
        if hooked:
            raise ValueError(
                "model: expected no activation checkpointing around adapted layers and no hooks on tensors saved "
                f"there, got either around {listed(sorted(hooked))}"
            )
        return found


class _Replayed(nn.Module):
    """A piece that is replayed for inputs like the captured one, and runs its operations one by one for others."""

    def __init__(self, piece: nn.Module, graphed: nn.Module, sample: Tensor):
        super().__init__()
        self.piece, self.graphed, self._form = piece, graphed, _form(sample)

    def forward(self, x: Tensor) -> Tensor:
        return (self.graphed if _form(x) == self._form else self.piece).forward(x)


def _form(x: Tensor) -> tuple[torch.Size, torch.dtype, bool]:
    return x.shape, x.dtype, x.requires_grad


@contextmanager
def _noted(data: PathData, found: dict[str, Tensor], counts: dict[str, int], hooked: set[str]) -> Iterator[None]:
    """Record, in a ``with`` block, copies of the inputs of layers, how often they run, and which run in a checkpoint.

    There they have hooks on saved tensors, or no gradients.
    """

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def note(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            counts[name] += 1
            if hooks_on_top() is not None or not torch.is_grad_enabled():
                hooked.add(name)
            found[name] = inputs[0].detach().clone().requires_grad_(inputs[0].requires_grad)

        return note

    handles = [layer.register_forward_pre_hook(hook(name)) for name, layer in data.layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
