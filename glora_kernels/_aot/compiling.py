"""A build through Triton's compiler, for a GPU that need not be there, with the options of a real launch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import triton
from triton.compiler import ASTSource, CompiledKernel

from .targets import Target

if TYPE_CHECKING:
    from .._triton.builds import Build


def compiled(build: Build, target: Target) -> CompiledKernel:
    """The build for the target; what Triton's cache has is not compiled again.

    Raises:
        ValueError: the build does not say what each argument is.
        Exception: whatever the compiler raises.
    """
    names: list[str] = build.kernel.arg_names
    source = ASTSource(build.kernel, _signature(build, names), dict(build.constexprs), _divisible(build, names))
    options: dict[str, Any] = {
        "num_warps": build.num_warps,
        "num_stages": build.num_stages,
        "enable_fp_fusion": True,  # said, since its default differs between releases of Triton
    }
    return triton.compile(source, target=target.gpu, options=options)


def _signature(build: Build, names: list[str]) -> dict[str, str]:
    """The type of every argument, in the kernel's order."""
    types = dict(build.signature) | dict.fromkeys(build.constexprs, "constexpr")
    if set(types) != set(names) or set(build.signature) & set(build.constexprs):
        raise ValueError(
            f"signature and constexprs: expected each of {sorted(names)} once, "
            f"got {sorted(build.signature)} and {sorted(build.constexprs)}"
        )
    return {name: types[name] for name in names}


def _divisible(build: Build, names: list[str]) -> dict[tuple[int], list[list[object]]]:
    """In the kernel's order, which is part of the cache's key; that of a set differs between processes."""
    if unknown := set(build.divisible) - set(build.signature):
        raise ValueError(f"divisible: expected names in signature, got {sorted(unknown)}")
    return {(place,): [["tt.divisibility", 16]] for place, name in enumerate(names) if name in build.divisible}
