"""A GPU that is not there: layers on CPU tensors launch on it, and a Python function is told of every launch.

    def on_launch(launch):
        print(launch.kernel.name, launch.grid, launch.values)

    with absent_gpu("sm_90", on_launch):
        glora.GLoRALinear(64, 64)(torch.zeros(8, 64))

Triton compiles the kernels for that GPU, and its own driver and C launcher start them; only libcuda is a stub. Results
are whatever ``on_launch`` writes into the tensors. A layer keeps to the kernels of its first call: one that is called
inside is of no use elsewhere, and the other way round.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any, NamedTuple
from unittest.mock import patch
from weakref import WeakValueDictionary

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.driver import CudaDriver, CudaLauncher, CudaUtils
from triton.compiler import CompiledKernel

from bench import stubbed
from glora_kernels._triton import launch as launching
from glora_kernels._triton import plan
from glora_kernels.ops import prepared

from ..machine.numbers import bits_of
from ..machine.program import parameters_of
from . import library

STREAM = 0x1000  # of the current device; that of the device with index i is STREAM + i


class Launch(NamedTuple):
    """What reached cuLaunchKernelEx.

    Attributes:
        kernel: Triton's CompiledKernel: ``asm["ptx"]``, ``metadata``, ``src``.
        grid, block: programs, and threads of a program.
        shared: bytes of dynamic shared memory.
        stream: its handle.
        attributes: how many launch attributes there are.
        device: the index of the device that was current; None is the index of the device of CPU tensors.
        values: one per ``.param`` of the PTX entry, read by its type; PTX does not say of integers whether they have a
            sign, and all are read as if they had. None, where the cache holds the kernel without its PTX.
        tensors: those among the arguments, by the names of the kernel's parameters.
    """

    kernel: Any
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared: int
    stream: int
    attributes: int
    device: int | None
    values: tuple[int | float, ...]
    tensors: dict[str, torch.Tensor]

    @property
    def name(self) -> str:
        """Of the kernel, such as ``"fused"``."""
        return self.kernel.src.fn.fn.__name__.removesuffix("_kernel")


@contextmanager
def absent_gpu(architecture: str, on_launch: Callable[[Launch], None], strategy: str | None = None) -> Iterator[None]:
    """Inside, layers on CPU tensors go to the Triton backend as on such a GPU, and every launch is told.

    ``torch.cuda.current_device`` and ``torch.cuda.device`` are those of the absent GPU; CPU tensors are on the device
    with the index None, which is current at first. What ``on_launch`` raises, the caller of the layer sees.

    Args:
        architecture: ``"sm_80"``, ``"sm_90"`` and the like.
        on_launch: called in the place of the kernel, while all arguments are alive.
        strategy: ``"assemble"`` or ``"fused"``; None lets the cost model choose.

    Raises:
        RuntimeError: ``library.fault`` says why.
    """
    with ExitStack() as stack:
        enter = stack.enter_context
        enter(library.found_by_triton())
        driver = _Driver(int(architecture.removeprefix("sm_")), on_launch)
        enter(stubbed.routed(architecture, strategy))
        enter(patch.object(torch.cuda, "current_device", lambda: driver.index))
        enter(patch.object(torch.cuda, "device", driver.made_current))
        enter(patch.object(triton.runtime.driver, "_active", driver))
        enter(patch.object(CompiledKernel, "_init_handles", _init_handles))
        # What holds builds, which may be of another GPU, and what holds plans with such builds.
        enter(patch.object(launching, "_compiled", {}))
        enter(patch.object(launching, "direct", True))
        for name in ("_plan", "_pass_without_tokens"):
            enter(patch.object(plan, name, cache(getattr(plan, name).__wrapped__)))
        enter(patch.object(prepared, "_runs", WeakValueDictionary()))
        yield


class _Driver(CudaDriver):
    """Triton's driver. What it would ask torch about the GPU is answered here."""

    def __init__(self, capability: int, on_launch: Callable[[Launch], None]):
        self.utils, self.launcher_cls = _utilities(), _Launcher
        self.capability, self.on_launch = capability, on_launch
        self.index: int | None = None
        self.refused: BaseException | None = None
        self.arguments: tuple[Any, ...] = ()  # of the launch, those of the kernel at the end

    def get_current_device(self) -> int:
        """The number of the device: see stub.c. Triton keeps builds by it, so each architecture has others."""
        return 10 * self.capability + (self.index or 0)

    def set_current_device(self, device: int) -> None:
        self.index = device % 10

    def get_current_stream(self, device: int | None) -> int:
        """For an index, as this package asks, or for a number, as Triton asks."""
        return STREAM + (device or 0) % 10

    def get_device_capability(self, device: int | None = None) -> tuple[int, int]:
        return divmod(self.capability, 10)

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    @contextmanager
    def made_current(self, index: int | None) -> Iterator[None]:
        """In the place of ``torch.cuda.device``."""
        before, self.index = self.index, index
        try:
            yield
        finally:
            self.index = before


class _Launcher(CudaLauncher):
    """Triton's launcher. What ``on_launch`` raised, below C code that lets no exception through, is raised here.

    After some errors of a direct call the package launches again, in the public way: that fails likewise.
    """

    def __call__(self, *arguments: Any) -> None:
        driver = triton.runtime.driver.active
        again = driver.refused is not None
        if not again:
            driver.arguments = arguments
            super().__call__(*arguments)
        error = driver.refused
        if error is not None:
            if again or not launching.direct or not isinstance(error, (AttributeError, TypeError)):
                driver.refused = None
            raise error


# -- between C and Python ----------------------------------------------------------------------------------------------


class _Config(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.c_void_p),
        ("attribute_count", ctypes.c_uint),
    )


_INTEGERS = {8: ctypes.c_int8, 16: ctypes.c_int16, 32: ctypes.c_int32, 64: ctypes.c_int64}
_FLOATS = {32: ctypes.c_float, 64: ctypes.c_double}
_loads = CompiledKernel._init_handles
_kernels: WeakValueDictionary[int, CompiledKernel] = WeakValueDictionary()  # by the handles of their functions


@cache
def _utilities() -> CudaUtils:
    """Triton's driver module, once the library is loaded that it is linked to."""
    library.load().stub_on_launch(_listener)
    return CudaUtils()


def _init_handles(kernel: CompiledKernel) -> None:
    _loads(kernel)
    _kernels[kernel.function] = kernel


@ctypes.CFUNCTYPE(None, ctypes.POINTER(_Config), ctypes.c_size_t, ctypes.POINTER(ctypes.c_void_p))
def _listener(config: Any, function: int, arguments: Any) -> None:
    driver = triton.runtime.driver.active
    try:
        driver.on_launch(_told(config.contents, _kernels[function], driver, arguments))
    except BaseException as error:
        driver.refused = error


def _told(config: _Config, kernel: CompiledKernel, driver: _Driver, arguments: Any) -> Launch:
    types = parameters(kernel.asm["ptx"]) if "ptx" in kernel.asm else ()
    values = tuple([ctypes.cast(arguments[place], pointer).contents.value for place, pointer in enumerate(types)])
    grid, block, stream = tuple(config.grid), tuple(config.block), config.stream or 0
    names = kernel.src.fn.arg_names
    given = zip(names, driver.arguments[-len(names) :])
    tensors = {name: value for name, value in given if isinstance(value, torch.Tensor)}
    return Launch(kernel, grid, block, config.shared, stream, config.attribute_count, driver.index, values, tensors)


@cache
def parameters(ptx: str) -> tuple[Any, ...]:
    """The types of the parameters of the PTX entry, as pointers of ctypes."""
    kinds = [parameter.kind for parameter in parameters_of(ptx)]
    return tuple([ctypes.POINTER((_FLOATS if kind[0] == "f" else _INTEGERS)[bits_of(kind)]) for kind in kinds])
