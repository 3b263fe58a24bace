"""What a compiled kernel must show to be shipped. Each rule is one function: it returns None, or expected and got."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from .reading import Reading
from .targets import Target

if TYPE_CHECKING:
    from .._triton.builds import Build

TENSOR_MEMORY_LIMIT = 512  # columns of a Blackwell multiprocessor


def failures(build: Build, target: Target, reading: Reading) -> list[str]:
    """What is wrong with the build, one line each; empty if it may be shipped."""
    found = (rule(build, target, reading) for rule in RULES)
    return [line for line in found if line is not None]


def _spill(build: Build, target: Target, reading: Reading) -> str | None:
    # Without a stack, an AMD GPU's scalar registers were spilled to lanes of vector registers, not to memory.
    spills = {name: count for name, count in reading.spills.items() if name != "sgpr" or reading.stack}
    if not reading.stack and not any(spills.values()):
        return None
    counts = "".join(f", {count} {name}" for name, count in spills.items())
    return f"spill: expected none, got {reading.stack} bytes of stack{counts}"


def _matrix(build: Build, target: Target, reading: Reading) -> str | None:
    if not build.matrix or any(reading.matrix.values()):
        return None
    return "matrix instructions: expected some, got none"


def _serialised(build: Build, target: Target, reading: Reading) -> str | None:
    if not build.plain_loop or reading.serialised is None:
        return None
    return f"matrix instructions: expected overlap in a plain loop, got serialised due to {reading.serialised}"


def _shared(build: Build, target: Target, reading: Reading) -> str | None:
    if reading.shared <= target.shared_limit:
        return None
    return f"shared memory: expected at most {target.shared_limit} bytes, got {reading.shared}"


def _tensor_memory(build: Build, target: Target, reading: Reading) -> str | None:
    if reading.tensor_memory <= TENSOR_MEMORY_LIMIT:
        return None
    return f"tensor memory: expected at most {TENSOR_MEMORY_LIMIT} columns, got {reading.tensor_memory}"


def _trap(build: Build, target: Target, reading: Reading) -> str | None:
    """A compiler that cannot compile a kernel may write one that only stops the device."""
    return f"trap: expected none, got {reading.traps}" if reading.traps else None


def _chained(build: Build, target: Target, reading: Reading) -> str | None:
    if not reading.chained:
        return None
    return f"chained dots: expected an accumulator for each dot of a loop, got {', '.join(reading.chained)}"


RULES: tuple[Callable[[Build, Target, Reading], str | None], ...] = (
    _spill,
    _matrix,
    _serialised,
    _shared,
    _tensor_memory,
    _trap,
    _chained,
)
