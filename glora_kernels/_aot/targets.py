"""The architectures that a kernel can be compiled for, and how much shared memory a launch may use on each."""

from __future__ import annotations

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
    backend, arch = name.split(":")
    gpu = GPUTarget(backend, int(arch), 32) if backend == "cuda" else GPUTarget(backend, arch, 64)
    return Target(name, gpu, SHARED_LIMITS[name])
