"""Compiles a build as the launcher would, for a GPU that need not be there.

The launcher's own call (``_triton/launch.py``) is made with stand-ins for its arguments. So Triton specialises them as
it will at a launch, and keeps the kernel under the same key: a launch does not compile again what the gate compiled.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime import driver

from .._triton.builds import POINTERS, Build
from .._triton.launch import ALIGNMENT, compile_for, constant
from ..planning.settings import Tile
from .targets import name_of

_POINTED = {kind: dtype for dtype, kind in POINTERS.items()}
_PLAIN = {"fp32": 0.5, "u1": True}


@dataclass(frozen=True)
class Pointer:
    """A stand-in for a tensor: what Triton specialises a tensor by."""

    dtype: torch.dtype
    address: int

    def data_ptr(self) -> int:
        return self.address

    def ptr_range(self) -> int:
        """Asked on AMD GPUs only: there Triton reads tensors below 2 GiB, as this one, by shorter instructions."""
        return 0


class AbsentGPU:
    """A driver for Triton that only says what to compile for."""

    def __init__(self, gpu: GPUTarget) -> None:
        self.gpu = gpu

    def get_current_device(self) -> str:
        return name_of(self.gpu)  # Triton keeps kernels by device: each architecture is one device

    def get_current_stream(self, device: str) -> None:
        return None

    def get_current_target(self) -> GPUTarget:
        return self.gpu


def compiled(build: Build, gpu: GPUTarget) -> CompiledKernel:
    """The build compiled for a GPU, or taken from Triton's cache.

    After this call Triton assumes that the process has such a GPU, so the process can launch nothing any more.

    Raises:
        ValueError: the build does not say what each argument is.
        Exception: whatever the compiler raises.
    """
    values = stand_ins(build)
    driver.set_active(AbsentGPU(gpu))  # type: ignore[arg-type]
    return compile_for(build.function, values, Tile(0, 0, 0, build.num_warps, build.num_stages))


def stand_ins(build: Build) -> tuple[Any, ...]:
    """A value for every argument, in the kernel's order, that Triton specialises as the build says."""
    names: list[str] = build.function.arg_names
    if set(build.signature) | set(build.constexprs) != set(names) or set(build.signature) & set(build.constexprs):
        raise ValueError(
            f"signature and constexprs: expected each of {sorted(names)} once, "
            f"got {sorted(build.signature)} and {sorted(build.constexprs)}"
        )
    if unknown := set(build.divisible) - set(build.signature):
        raise ValueError(f"divisible: expected names in signature, got {sorted(unknown)}")
    return tuple(
        constant(build.constexprs[name])
        if name in build.constexprs
        else _stand_in(build.signature[name], name in build.divisible)
        for name in names
    )


def _stand_in(kind: str, divisible: bool) -> Any:
    offset = 0 if divisible else 1
    if kind in _POINTED:
        return Pointer(_POINTED[kind], ALIGNMENT + offset)
    if kind in _PLAIN:
        return _PLAIN[kind]
    return offset + {"i32": ALIGNMENT, "i64": 2**31}[kind]
