"""A build through Triton's compiler, for a GPU that need not be there, as the launcher would ask for it.

The launcher's own call (``_triton/launch.py``) is made with stand-ins for its arguments. So Triton specialises them as
it will at a launch, and keeps the kernel under the same key: what the gate has compiled, no launch compiles again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from triton.compiler import CompiledKernel
from triton.runtime import driver

from .._triton.builds import POINTERS, Build
from .._triton.launch import ALIGNMENT, compile_for
from ..planning.settings import Tile
from .targets import Target

_POINTED = {kind: dtype for dtype, kind in POINTERS.items()}


@dataclass(frozen=True)
class Pointer:
    """A tensor as far as Triton specialises one."""

    dtype: torch.dtype
    address: int

    def data_ptr(self) -> int:
        return self.address

    def ptr_range(self) -> int:
        """Asked on AMD GPUs alone, where tensors below 2 GiB are read by shorter instructions: it is one of those."""
        return 0


class AbsentGPU:
    """A driver for Triton that only says what to compile for."""

    def __init__(self, target: Target) -> None:
        self.target = target

    def get_current_device(self) -> str:
        return self.target.name  # Triton keeps kernels by device: each target has one of its own

    def get_current_stream(self, device: str) -> None:
        return None

    def get_current_target(self) -> Any:
        return self.target.gpu


def compiled(build: Build, target: Target) -> CompiledKernel:
    """The build for the target; what Triton's cache has is not compiled again.

    From then on Triton takes this process for one with such a GPU: nothing can be launched in it any more.

    Raises:
        ValueError: the build does not say what each argument is.
        Exception: whatever the compiler raises.
    """
    values = stand_ins(build)
    driver.set_active(AbsentGPU(target))  # type: ignore[arg-type]
    return compile_for(build.kernel, values, Tile(0, 0, 0, build.num_warps, build.num_stages))


def stand_ins(build: Build) -> tuple[Any, ...]:
    """A value for every argument, in the kernel's order, that Triton specialises as the build says."""
    names: list[str] = build.kernel.arg_names
    if set(build.signature) | set(build.constexprs) != set(names) or set(build.signature) & set(build.constexprs):
        raise ValueError(
            f"signature and constexprs: expected each of {sorted(names)} once, "
            f"got {sorted(build.signature)} and {sorted(build.constexprs)}"
        )
    if unknown := set(build.divisible) - set(build.signature):
        raise ValueError(f"divisible: expected names in signature, got {sorted(unknown)}")
    return tuple(
        build.constexprs[name]
        if name in build.constexprs
        else _stand_in(build.signature[name], name in build.divisible)
        for name in names
    )


def _stand_in(kind: str, divisible: bool) -> Any:
    offset = 0 if divisible else 1
    if kind in _POINTED:
        return Pointer(_POINTED[kind], ALIGNMENT + offset)
    return 0.5 if kind == "fp32" else offset + {"i32": ALIGNMENT, "i64": 2**31}[kind]
