"""Launching a compiled kernel with as little Python as possible.

Triton's own launcher examines every argument at every launch. That costs more than the GEMM of a ViT layer. Here one
dictionary look-up finds the compiled kernel, and it is called directly. The key holds the types and alignment of
the tensors, and the other arguments: shapes and strides repeat from step to step. Of the arguments that a kernel lists
as VARYING (tokens, ranks, places in a buffer) it says only whether they need 64 bits.

The direct call uses what Triton does not promise to keep. Where it fails before the launch, because the compiled kernel
has other attributes or takes other arguments, this process uses ``kernel[(grid,)](...)`` from then on, which is slower.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
from triton.runtime.interpreter import InterpretedFunction

from ..planning.settings import Tile

ALIGNMENT = 16  # bytes: Triton loads wide vectors from a pointer that is a multiple of this

_compiled: dict[tuple, Any] = {}
_direct = True  # until the direct call fails


class Launch(NamedTuple):
    """The arguments of one call of :func:`launch`."""

    kernel: Any
    grid: int
    tile: Tile
    arguments: dict[str, Any]


_record: list[Launch] | None = None


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Record launches inside the ``with`` block instead of running them (for the gate and for tests)."""
    global _record
    before, _record = _record, []
    try:
        yield _record
    finally:
        _record = before


def launch(kernel: Any, grid: int, tile: Tile, /, **arguments: Any) -> None:
    """Run ``kernel`` on ``grid`` programs.

    Args:
        kernel: a ``triton.jit`` function whose parameters are pointers, then numbers, then constants.
        grid: the number of programs.
        tile: says how many warps and stages.
        arguments: in the order of the kernel's parameters. An absent tensor is None; the constants must keep the kernel
            from reading it. The kernel runs on the device of the tensors, whichever device is current.
    """
    if _record is not None:
        _record.append(Launch(kernel, grid, tile, arguments))
    elif isinstance(kernel, InterpretedFunction):
        _check_order(kernel, arguments)
        kernel[(grid,)](*arguments.values())
    else:
        _run(kernel, grid, tile, arguments)


def _run(kernel: Any, grid: int, tile: Tile, arguments: dict[str, Any]) -> None:
    global _direct
    device = next(value for value in arguments.values() if value is not None).device.index  # of the first tensor
    if device != torch.cuda.current_device():
        with torch.cuda.device(device):
            return _run(kernel, grid, tile, arguments)
    failed: Exception | None = None
    if _direct:
        try:
            return _run_directly(kernel, grid, tile, arguments, device)
        except (AttributeError, TypeError) as error:  # raised before anything is launched
            failed = error
    _check_order(kernel, arguments)
    kernel[(grid,)](*arguments.values(), **_options(tile))  # raises too, if it is the arguments that are wrong
    if failed is not None:
        _direct = False
        told = f"glora_kernels: kernels of Triton {triton.__version__} cannot be called directly"
        warnings.warn(f"{told} ({failed}); every launch takes longer", RuntimeWarning, stacklevel=2)


def _run_directly(kernel: Any, grid: int, tile: Tile, arguments: dict[str, Any], device: int) -> None:
    values = tuple(arguments.values())
    tensors = values[: _pointer_count(kernel.fn)]
    types = [None if t is None else (t.dtype, t.data_ptr() % ALIGNMENT == 0) for t in tensors]
    fixed, varying = _places(kernel)
    wide = [values[place] >= 2**31 for place in varying]
    key = (kernel.fn, device, tile, *types, *wide, *[values[place] for place in fixed])
    compiled = _compiled.get(key)
    if compiled is None:
        _check_order(kernel, arguments)
        compiled = _compiled[key] = compile_for(kernel, values, tile)
    stream = triton.runtime.driver.active.get_current_stream(device)
    run = compiled.run  # loads the module at its first use, before ``function`` is read
    run(grid, 1, 1, stream, compiled.function, compiled.packed_metadata, None, None, None, *values)


def compile_for(kernel: Any, values: tuple, tile: Tile) -> Any:
    """The kernel compiled for such arguments, or taken from Triton's cache; nothing is launched."""
    return kernel.warmup(*values, grid=(1,), **_options(tile))


def spills(compiled: Any) -> int:
    """How many registers a compiled kernel spills; 0 where this Triton does not say so before a launch."""
    if hasattr(compiled, "_init_handles"):
        compiled._init_handles()  # loads it onto the GPU, which tells
    return getattr(compiled, "n_spills", None) or 0


def _options(tile: Tile) -> dict[str, Any]:
    return {"num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": True}


@cache
def _places(kernel: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The places of the numbers and constants that a build depends on, and of the numbers that it does not."""
    numbers = [parameter for parameter in kernel.params if not parameter.name.endswith("_ptr")]
    varying = tuple(parameter.num for parameter in numbers if parameter.do_not_specialize)
    return tuple(parameter.num for parameter in numbers if parameter.num not in varying), varying


@cache
def _pointer_count(function: Any) -> int:
    names = function.__code__.co_varnames[: function.__code__.co_argcount]
    return sum(name.endswith("_ptr") for name in names)


def _check_order(kernel: Any, arguments: dict[str, Any]) -> None:
    """Arguments are passed by position, which is faster: they must be in the order of the parameters."""
    names = list(kernel.arg_names)
    assert names == list(arguments), f"{kernel.fn.__name__}: expected {names}, got {list(arguments)}"
