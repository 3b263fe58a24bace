"""Launching a compiled kernel with as little Python as possible.

Triton's own launcher examines every argument at every launch, which costs more than the GEMM of a ViT layer. Here a
compiled kernel is found by one dictionary look-up over the numbers, types and alignment of its arguments and called
directly. Numbers are small integers that repeat from step to step (shapes, strides, ranks), so the look-up hits.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction

from .settings import Tile

ALIGNMENT = 16  # bytes; what Triton assumes of a pointer that it may load wide vectors from

_compiled: dict[tuple, Any] = {}


class Launch(NamedTuple):
    """One launch, as :func:`launch` is asked for it."""

    kernel: Any
    grid: int
    tensors: tuple[Tensor | None, ...]
    numbers: tuple[int | float, ...]
    constants: tuple[Any, ...]
    tile: Tile


_record: list[Launch] | None = None


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Write down launches inside the ``with`` block instead of running them (for the gate and for tests)."""
    global _record
    before, _record = _record, []
    try:
        yield _record
    finally:
        _record = before


def launch(
    kernel: Any,
    grid: int,
    tensors: tuple[Tensor | None, ...],
    numbers: tuple[int | float, ...],
    constants: tuple[Any, ...],
    tile: Tile,
) -> None:
    """Run ``kernel`` on ``grid`` programs; its parameters are tensors, then numbers, then constants, in this order.

    An absent tensor is None: the constants must see to it that it is not read.
    The device is that of the first tensor, whichever is current.
    """
    if _record is not None:
        _record.append(Launch(kernel, grid, tensors, numbers, constants, tile))
        return
    if isinstance(kernel, InterpretedFunction):
        kernel[(grid,)](*tensors, *numbers, *constants)
        return
    device = tensors[0].device.index  # type: ignore[union-attr]
    if device != torch.cuda.current_device():
        with torch.cuda.device(device):
            _run(kernel, device, grid, tensors, numbers, constants, tile)
    else:
        _run(kernel, device, grid, tensors, numbers, constants, tile)


def _run(kernel, device: int, grid: int, tensors: tuple, numbers: tuple, constants: tuple, tile: Tile) -> None:
    types = tuple([None if t is None else (t.dtype, t.data_ptr() % ALIGNMENT == 0) for t in tensors])
    key = (kernel.fn, device, types, numbers, constants, tile)
    compiled = _compiled.get(key)
    arguments = (*tensors, *numbers, *constants)
    if compiled is None:
        compiled = _compiled[key] = compile_for(kernel, arguments, tile)
    stream = triton.runtime.driver.active.get_current_stream(device)
    run = compiled.run  # loads the module at its first use, before ``function`` is read
    run(grid, 1, 1, stream, compiled.function, compiled.packed_metadata, None, None, None, *arguments)


def compile_for(kernel, arguments: tuple, tile: Tile):
    """The kernel compiled for such arguments, from Triton's cache where it is there; nothing is launched."""
    options = {"num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": True}
    return kernel.warmup(*arguments, grid=(1,), **options)
