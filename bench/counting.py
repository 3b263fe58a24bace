"""What a step costs beside time: operations, bytes kept for backward, peak memory."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode


def flops(function: Callable[[], object]) -> int:
    """Multiplications and additions of matrix products, convolutions and attention, as PyTorch's counter has them.

    It does not see into kernels of Triton's.
    """
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def saved_bytes(forward: Callable[[], object], models: tuple[nn.Module, ...] = ()) -> int:
    """Bytes that autograd keeps from ``forward`` for backward, each storage once.

    Args:
        models: whose parameters and buffers do not count: they are there anyway.
    """
    own = {_address(tensor) for model in models for tensor in (*model.parameters(), *model.buffers())}
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if _address(tensor) not in own:
            found[_address(tensor)] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept = forward()  # as long as it lives no address is given out again
    del kept
    return sum(found.values())


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def peak_bytes(function: Callable[[], object], device: str) -> int:
    """How far memory rises above where it was before ``function``, by PyTorch's allocators."""
    if device != "cpu":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    level = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            level += event.nbytes()
            peak = max(peak, level)
    return peak
