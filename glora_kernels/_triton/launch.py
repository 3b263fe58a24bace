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
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction

from ..planning.settings import Tile
from ..planning.steps import Amount
from ..planning.steps import Launch as Step
from .kernels import KERNELS
from .tile import span

ALIGNMENT = 16  # bytes: Triton loads wide vectors from a pointer that is a multiple of this

_compiled: dict[tuple, Any] = {}
# Whether compiled kernels are called directly: not while launches are recorded, and not after a direct call has failed.
direct = not isinstance(span, InterpretedFunction)

if direct:
    # Triton's keys for the kernels, always in the same order. Before 3.8 the key of a kernel depends on which of those
    # that share a function with it had theirs before: what one process has compiled, another would not find.
    for _kernel in KERNELS.values():
        _kernel.cache_key  # noqa: B018


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
    global _record, direct
    before = _record, direct
    _record, direct = [], False
    try:
        yield _record
    finally:
        _record, direct = before


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
    device = next(value for value in arguments.values() if value is not None).device.index  # of the first tensor
    if device != torch.cuda.current_device():
        with torch.cuda.device(device):
            return _run(kernel, grid, tile, arguments)
    failed: Exception | None = None
    if direct:
        try:
            compiled, values = _build_of(kernel, tile, arguments, device), arguments.values()
            stream = triton.runtime.driver.active.get_current_stream(device)
            run = compiled.run  # loads the module at its first use, before ``function`` is read
            return run(grid, 1, 1, stream, compiled.function, compiled.packed_metadata, None, None, None, *values)
        except (AttributeError, TypeError) as error:  # raised before anything is launched
            failed = error
    _run_publicly(kernel, grid, tile, arguments, failed)


def _run_publicly(kernel: Any, grid: int, tile: Tile, arguments: dict[str, Any], failed: Exception | None) -> None:
    global direct
    _check_order(kernel, arguments)
    kernel[(grid,)](*arguments.values(), **_options(tile))  # raises too, if it is the arguments that are wrong
    if failed is not None:
        direct = False
        told = f"glora_kernels: kernels of Triton {triton.__version__} cannot be called directly"
        warnings.warn(f"{told} ({failed}); every launch takes longer", RuntimeWarning, stacklevel=2)


def _build_of(kernel: Any, tile: Tile, arguments: dict[str, Any], device: int) -> Any:
    """The build for such arguments: found by what it depends on, or compiled."""
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
    return compiled


# -- launches of a schedule --------------------------------------------------------------------------------------------

_HEAD = 9  # how many values a direct call takes before the kernel's own
STREAM, _FUNCTION, _METADATA = 3, 4, 5  # places of these values
_TYPES = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.int32: tl.int32,
    torch.int64: tl.int64,
}


class BoundLaunch:
    """A launch of a schedule with its kernel, on one device.

    Attributes:
        kernel, tile: the kernel, and how it cuts its work.
        grid: the number of programs, and the tokens per block for which there are so many (0: for all together).
        values: the arguments in order, None for pointers and for numbers that depend on the number of tokens.
        pointers: places among the values of a direct call, each with the number of its slot.
        amounts: places, there too, of numbers that depend on the number of tokens, with their parts.
        build: what a direct call takes of the compiled kernel, once it is known; for numbers of 32 bits.
    """

    __slots__ = ("amounts", "build", "grid", "kernel", "pointers", "tile", "values")

    def __init__(self, kernel: Any, step: Step, numbers: dict[str, int]):
        _check_order(kernel, step.arguments)
        self.kernel, self.tile, self.grid = kernel, step.tile, (step.programs, step.token_block)
        self.build: tuple[Any, Any, Any] | None = None
        self.values, pointers, amounts = [], [], []
        for place, (name, value) in enumerate(step.arguments.items()):
            if name.endswith("_ptr") and isinstance(value, str):
                pointers.append(_shared((_HEAD + place, numbers[value])))
                value = None
            elif isinstance(value, Amount):
                amounts.append(_shared((_HEAD + place, *value)))
            self.values.append(constant(value))
        self.pointers, self.amounts = tuple(pointers), tuple(amounts)


def constant(value: Any) -> Any:
    """The value that a kernel is given for that of a schedule: Triton has types of its own."""
    return _TYPES.get(value, value) if isinstance(value, torch.dtype) else value


@lru_cache(maxsize=1 << 14)
def _shared(numbers: tuple[int, ...]) -> tuple[int, ...]:
    """One tuple for all that are equal, since plans hold many."""
    return numbers


class SizedLaunch:
    """A launch for one number of tokens.

    Attributes:
        arguments: the values of a direct call: the grid, three for the stream and the build, three hooks, the kernel's
            own. Pointers are None, and so are the stream and, at first, the build.
        start: the function of the direct call, once it is known.
    """

    __slots__ = ("arguments", "bound", "pointers", "start", "wide")

    def __init__(self, bound: BoundLaunch, tokens: int, blocks: int):
        self.bound, self.pointers, self.start = bound, bound.pointers, None
        programs, token_block = bound.grid
        grid = programs * -(-tokens // token_block) if token_block else programs
        build = bound.build
        if build is None:
            arguments = [grid, 1, 1, None, None, None, None, None, None, *bound.values]
        else:
            self.start, function, metadata = build
            arguments = [grid, 1, 1, None, function, metadata, None, None, None, *bound.values]
        largest = 0
        for place, fixed, per_block, per_token in bound.amounts:
            arguments[place] = value = fixed + per_block * blocks + per_token * tokens
            if value > largest:
                largest = value
        self.arguments: list[Any] = arguments
        self.wide = largest >= 2**31
        if self.wide:
            self.start = None  # another build

    def compile(self, arguments: list[Any], device: int) -> Any:
        """The function that starts the build for ``arguments``, whose pointers are aligned; the build is put there."""
        compiled = _build_of(self.bound.kernel, self.bound.tile, self._named(arguments), device)
        start = compiled.run  # loads the module at its first use, before ``function`` is read
        build = start, compiled.function, compiled.packed_metadata
        if not self.wide:
            self.bound.build = build
        self._take(build)
        arguments[_FUNCTION : _METADATA + 1] = build[1:]
        return start

    def _take(self, build: tuple[Any, Any, Any]) -> None:
        self.arguments[_FUNCTION : _METADATA + 1] = build[1:]
        self.start = build[0]

    def _named(self, arguments: list[Any]) -> dict[str, Any]:
        return dict(zip(self.bound.kernel.arg_names, arguments[_HEAD:]))

    def as_named(self, slots: list[Any]) -> tuple[Any, int, Tile, dict[str, Any]]:
        """Kernel, grid, tile and named arguments, as :func:`launch` takes them."""
        arguments = self.arguments.copy()
        for place, number in self.pointers:
            arguments[place] = slots[number]
        return self.bound.kernel, arguments[0], self.bound.tile, self._named(arguments)

    def run_publicly(self, slots: list[Any], failed: Exception) -> None:
        """Launch the public way, since a direct call has failed."""
        _run_publicly(*self.as_named(slots), failed)


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
