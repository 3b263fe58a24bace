"""Executes launches: compiled kernels, decoded once, on the tensors of the launch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache

import torch

from .instructions import decode
from .machine.faults import Hazards
from .machine.machine import Code, Machine, Watch
from .machine.memory import Memory

LANES = 1 << 12  # that are executed at once, or those of one CTA

decoded: Callable[[str], Code] = lru_cache(maxsize=64)(decode)


def execute(
    code: Code,
    grid: int,
    values: Sequence[int | float],
    shared: int,
    tensors: Mapping[str, torch.Tensor],
    *,
    ctas: Sequence[int] | None = None,
    watch: Watch | None = None,
) -> Hazards:
    """Run the CTAs of a launch, all of them or those that are named; the tensors are written in place.

    Args:
        values: of all parameters of the entry. Numbers of 64 bits that are the address of a tensor are replaced by the
            address that memory gives it.

    Returns:
        What was noted on the way.

    Raises:
        Fault: see there.
    """
    hazards = Hazards()
    memory = Memory(tensors, hazards)
    pointers = {tensor.data_ptr() for tensor in tensors.values() if tensor.numel()}
    wide = [parameter.kind in ("u64", "b64") for parameter in code.program.parameters]
    values = [memory.address(value) if is_wide and value in pointers else value for value, is_wide in zip(values, wide)]
    taken = range(grid) if ctas is None else ctas
    at_once = max(1, LANES // code.program.threads)
    for first in range(0, len(taken), at_once):
        Machine(code, taken[first : first + at_once], values, shared, memory, watch).run()
    return hazards
