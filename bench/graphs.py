"""Steps as CUDA graphs: the time that is left when launching costs nothing."""

from __future__ import annotations

from collections.abc import Callable

import torch

WARMUP = 3  # runs before a capture: autograd, allocator and Triton's compiler have to have seen everything


def captured(function: Callable[[], object]) -> Callable[[], None]:
    """``function``, captured on the current GPU; the result replays it.

    ``function`` has to launch the same work in every call, on the current stream, and must not synchronise.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARMUP):
            function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay
