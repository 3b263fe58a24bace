"""Short names of builds of kernels: the same for a build that is listed and for what Triton compiles for a launch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from hashlib import sha256
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from glora_kernels._triton.builds import Build


def name_of(build: Build) -> str:
    from glora_kernels._triton.launch import constant

    constants = {name: constant(value) for name, value in build.constexprs.items()}
    return _name(build.kernel, build.signature, build.divisible, constants, build.num_warps, build.num_stages)


def is_ours(source: Any) -> bool:
    """Whether what Triton tells its listener of is one of our kernels; Inductor compiles others."""
    return getattr(getattr(source, "fn", None), "__module__", "").startswith("glora_kernels.")


def name_of_source(source: Any, metadata: Mapping[str, Any]) -> str:
    """The name of one of our kernels, of which Triton tells its listener."""
    names = source.fn.arg_names
    constants = {names[place]: value for (place,), value in source.constants.items()}
    signature = {name: kind for name, kind in source.signature.items() if name not in constants}
    divisible = {names[place] for (place,), found in source.attrs.items() if ["tt.divisibility", 16] in found}
    kernel = source.fn.__name__.removesuffix("_kernel")
    return _name(kernel, signature, divisible, constants, metadata["num_warps"], metadata["num_stages"])


def _name(
    kernel: str,
    signature: Mapping[str, str],
    divisible: Iterable[str],
    constants: Mapping[str, Any],
    warps: int,
    stages: int,
) -> str:
    what = (kernel, sorted(signature.items()), sorted(divisible), sorted(map(str, constants.items())), warps, stages)
    return sha256(repr(what).encode()).hexdigest()[:12]
