"""What a step costs apart from time: operations, bytes kept for backward, peak memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from .agreement import Workload, run


def flops(function: Callable[[], object]) -> int:
    """Multiplications and additions of matrix products, convolutions and attention, by PyTorch's counter.

    The counter does not see inside Triton kernels.
    """
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: _addmm_flops}) as counter:
        function()
    return counter.get_total_flops()


def _addmm_flops(_target, left, right, **_kwargs) -> int:
    """Operations of an in-place addmm, from shapes: the counter knows addmm only out of place."""
    return 2 * left[0] * left[1] * right[1]


def saved_bytes(forward: Callable[[], Tensor], inputs: tuple[Tensor, ...], device: str) -> int:
    """Bytes that ``forward`` leaves behind for backward, its output not counted.

    This is the rise of memory after forward, by PyTorch's allocators, plus the bytes of those ``inputs`` that autograd
    saves: they were there before, and could be freed otherwise.
    """
    output, risen, _ = _run(forward, device)
    held = _saved_storages(forward) & {_address(tensor) for tensor in inputs}
    return risen - output.untyped_storage().nbytes() + sum(t.nbytes for t in inputs if _address(t) in held)


def _saved_storages(forward: Callable[[], Tensor]) -> set[int]:
    """Addresses of the storages that autograd saves."""
    found: set[int] = set()

    def pack(tensor: Tensor) -> Tensor:
        found.add(_address(tensor))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return found


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def memory(workload: Workload, model: nn.Module, inputs: tuple[Tensor, ...], device: str) -> dict[str, float]:
    """Bytes that one step saves for backward (see :func:`saved_bytes`), and how far memory rises in it."""
    workload.reset(model)
    return {
        "saved_bytes": saved_bytes(lambda: workload.forward(model), inputs, device),
        "peak_bytes": peak_bytes(lambda: run(workload, model), device),
    }


def peak_bytes(function: Callable[[], object], device: str) -> int:
    """How far memory rises above where it was before ``function``, by PyTorch's allocators."""
    return _run(function, device)[2]


def _run(function: Callable[[], Any], device: str) -> tuple[Any, int, int]:
    """What ``function`` returns, the rise of memory in bytes after the call, and the largest rise during it."""
    if device != "cpu":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        made = function()
        torch.cuda.synchronize()
        return made, torch.cuda.memory_allocated() - before, torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        made = function()
    level = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            level += event.nbytes()
            peak = max(peak, level)
    return made, level, peak
