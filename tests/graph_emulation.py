"""CUDA graphs without a GPU: operations are recorded below autograd, and repeated in the same memory.

The record holds no Python: a step that takes another branch, reads a value on the host or uses a new tensor is
replayed wrongly here too. Reading a value during a capture raises, as on a GPU. Memory pools and streams are not
emulated.
"""

from __future__ import annotations

import importlib

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from glora.graphs.capture import WARM_UP, CudaGraphs

CAPTURABLE = {
    "adamw": "adam",
    **{name: name for name in ("rmsprop", "adamax", "adadelta", "radam")},
}  # optimisers and their modules
_READ_VALUES = {"_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "unique_dim", "_unique2"}


class Recorder(TorchDispatchMode):
    """Runs operations and records them."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = function._schema.name.partition("::")[2]
        if name in _READ_VALUES:
            raise RuntimeError(f"{name}: operation not permitted when stream is capturing")
        outputs = function(*args, **kwargs)
        self.calls.append((function, args, kwargs, outputs))
        return outputs

    @torch.no_grad()
    def replay(self) -> None:
        for function, args, kwargs, outputs in self.calls:
            again = function(*args, **kwargs)
            given = {_memory(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)}
            for old, new in zip(tree_leaves(outputs), tree_leaves(again)):
                if isinstance(old, torch.Tensor) and _memory(old) not in given:
                    old.copy_(new)


def _memory(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class EmulatedGraphs(CudaGraphs):
    """CUDA graphs as :class:`Recorder` emulates them; ``captures`` and ``replays`` count them."""

    def __init__(self):
        self.captures, self.replays = 0, 0

    def warm_up(self, function):
        for _ in range(WARM_UP):
            function()

    def capture(self, function):
        self.captures += 1
        with Recorder() as recorder:
            output = function()

        def replay():
            self.replays += 1
            recorder.replay()

        return replay, output

    def capture_pieces(self, pieces, inputs):
        """As ``torch.cuda.make_graphed_callables``: all forward passes, then all backward passes in reverse."""
        forwards = [(piece, x, *self.capture(lambda: piece.forward(x))) for piece, x in zip(pieces, inputs)]  # noqa: B023
        for piece, x, replay, y in reversed(forwards):
            piece.forward = self._graphed(piece, x, replay, y)

    def _graphed(self, piece, x, replay_forward, y):
        leaves = [leaf for leaf in (x, *piece.parameters()) if leaf.requires_grad]
        dy = torch.zeros_like(y)
        replay_backward, grads = self.capture(lambda: torch.autograd.grad(y, leaves, dy, allow_unused=True))

        class Graphed(torch.autograd.Function):
            @staticmethod
            def forward(ctx, given, *_):
                x.data.copy_(given)
                replay_forward()
                return y.detach()

            @staticmethod
            def backward(ctx, given):
                dy.copy_(given)
                replay_backward()
                found = [None if grad is None else grad.detach() for grad in grads]
                return (*([] if x.requires_grad else [None]), *found)

        return lambda given: Graphed.apply(given, *(p for p in piece.parameters() if p.requires_grad))


def emulate(monkeypatch) -> EmulatedGraphs:
    """Put an emulation in the place of CUDA graphs, and let a CPU have what refuses it: capturable optimisers."""
    found = EmulatedGraphs()
    for module in ("graphs.graphed_step", "training.graphing"):
        monkeypatch.setattr(f"glora.{module}.graphs_for", lambda device: found)
    for module in CAPTURABLE.values():
        defining = importlib.import_module(f"torch.optim.{module}")
        monkeypatch.setattr(defining, "_get_capturable_supported_devices", lambda *_, **__: ["cpu"])
    return found
