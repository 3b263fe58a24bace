"""A function of fixed tensors as a CUDA graph: captured once, replayed with other values in the same memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from inspect import signature
from typing import TypeVar

import torch
from torch import Tensor, nn

T = TypeVar("T")
_ERRORS = "thread_local"  # other threads may do what a capture forbids, as one does that pins a data loader's memory
WARM_UP = 3  # runs before a capture, in which libraries allocate what they keep


class CudaGraphs:
    """All calls of ``torch.cuda`` in one place, so that tests can put an emulation there."""

    def __init__(self, device: torch.device):
        self._device = device

    def warm_up(self, function: Callable[[], object]) -> None:
        """Run ``function`` a few times on a stream of its own."""
        with torch.cuda.device(self._device):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(WARM_UP):
                    function()
            torch.cuda.current_stream().wait_stream(stream)

    def capture(self, function: Callable[[], T]) -> tuple[Callable[[], None], T]:
        """A function that replays ``function``, and its output, which each replay overwrites. Computes nothing yet."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self._device), torch.cuda.graph(graph, capture_error_mode=_ERRORS):
            output = function()
        return graph.replay, output

    def capture_pieces(self, pieces: Sequence[nn.Module], inputs: Sequence[Tensor]) -> None:
        """Make each piece replay graphs of its forward and its backward; they have to run in this order."""
        with torch.cuda.device(self._device):
            samples = tuple((given,) for given in inputs)
            make: Callable[..., object] = torch.cuda.make_graphed_callables
            if "capture_error_mode" in signature(make).parameters:
                make(tuple(pieces), samples, allow_unused_input=True, capture_error_mode=_ERRORS)
                return
            graph = torch.cuda.graph  # before PyTorch 2.12 or so: what is captured with
            torch.cuda.graph = partial(graph, capture_error_mode=_ERRORS)  # type: ignore[assignment,misc]
            try:
                make(tuple(pieces), samples, allow_unused_input=True)
            finally:
                torch.cuda.graph = graph  # type: ignore[misc]


def graphs_for(device: torch.device) -> CudaGraphs | None:
    """The graphs of ``device``; None if it has no CUDA graphs."""
    return CudaGraphs(device) if device.type == "cuda" else None


class Captured:
    """``function`` of as many tensors as ``inputs``, as a graph.

    Args:
        function: runs on the device alone, with the same operations at every call; returns tensors or None.
        inputs: examples: every call has tensors of their shapes and dtypes.
    """

    def __init__(
        self, function: Callable[..., tuple[Tensor | None, ...]], inputs: tuple[Tensor, ...], graphs: CudaGraphs
    ):
        self._inputs = [value.detach().clone() for value in inputs]
        graphs.warm_up(lambda: function(*self._inputs))
        self._replay, self._outputs = graphs.capture(lambda: function(*self._inputs))

    def __call__(self, *inputs: Tensor) -> tuple[Tensor | None, ...]:
        """The outputs for these inputs, in memory of their own."""
        for own, value in zip(self._inputs, inputs):
            own.copy_(value, non_blocking=True)
        self._replay()
        return tuple(None if output is None else output.clone() for output in self._outputs)
