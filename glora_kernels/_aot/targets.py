"""The architectures that a kernel can be compiled for, and how much shared memory a launch may use on each."""

from __future__ import annotations

import re
from typing import NamedTuple

from triton.backends.compiler import GPUTarget

SHARED_LIMITS = {  # bytes for one program
    "cuda:80": 101_376,  # the limit of sm_86 and sm_89, which use the tiles of sm_80; sm_80 itself has 166,912
    "cuda:86": 101_376,
    "cuda:89": 101_376,
    "cuda:90": 232_448,
    "cuda:100": 232_448,
    "hip:gfx942": 65_536,
}


class Target(NamedTuple):
    name: str  # as on the command line
    gpu: GPUTarget
    shared_limit: int


def target_named(name: str) -> Target:
    """The target of a name like ``cuda:90``.

    Raises:
        ValueError: the limits of this name are not known here.
    """
    if name not in SHARED_LIMITS:
        raise ValueError(f"targets: expected some of {', '.join(SHARED_LIMITS)}, got {name!r}")
    return Target(name, gpu_named(name), SHARED_LIMITS[name])


def gpu_named(name: str) -> GPUTarget:
    """What Triton compiles for, by a name like ``cuda:90`` or ``hip:gfx942``.

    Raises:
        ValueError: a name of another form.
    """
    if found := re.fullmatch(r"cuda:(\d+)", name):
        return GPUTarget("cuda", int(found[1]), 32)
    if found := re.fullmatch(r"hip:(gfx9\w+)", name):
        return GPUTarget("hip", found[1], 64)
    raise ValueError(f"architecture: expected a name like cuda:90 or hip:gfx942, got {name!r}")


def name_of(gpu: GPUTarget) -> str:
    """``cuda:90`` and the like."""
    return f"{gpu.backend}:{gpu.arch}"


def architecture_of(gpu: GPUTarget) -> str:
    """The name that the planner gives it: ``sm_90`` and the like."""
    return f"sm_{gpu.arch}" if gpu.backend == "cuda" else str(gpu.arch)
