"""From one type to another."""

from __future__ import annotations

import re

import numpy as np

from ..machine.machine import Action, Active, Machine
from ..machine.numbers import FROM, TO, TYPES, to_tf32
from ..machine.program import Instruction
from .decoding import Decoder, rule


@rule(r"cvt\.([us](?:16|32|64))\.([us](?:8|16|32|64))")
def _integers(at: Decoder, found: re.Match, instruction: Instruction) -> Action:
    """What does not fit is cut off; a signed source keeps its sign."""
    write, read = at.target(instruction.operands[0]), at.source(instruction.operands[1], found[2])
    dtype = TYPES[found[1]]
    return lambda machine, active: write(machine, read(machine).astype(dtype), active)


@rule(r"cvt\.f32\.(bf16|f16)")
def _widen(at: Decoder, found: re.Match, instruction: Instruction) -> Action:
    write, read, widen = at.target(instruction.operands[0]), at.source(instruction.operands[1], "u16"), FROM[found[1]]
    return lambda machine, active: write(machine, widen(read(machine)), active)


@rule(r"cvt\.rn\.(bf16|f16)\.f32")
def _narrow(at: Decoder, found: re.Match, instruction: Instruction) -> Action:
    write, read, narrow = at.target(instruction.operands[0]), at.source(instruction.operands[1], "f32"), TO[found[1]]
    return lambda machine, active: write(machine, narrow(read(machine)), active)


@rule(r"cvt\.rn\.(bf16|f16)x2\.f32")
def _narrow_two(at: Decoder, found: re.Match, instruction: Instruction) -> Action:
    """``cvt d, a, b``: a becomes the upper half of d, b the lower one."""
    write, narrow = at.target(instruction.operands[0]), TO[found[1]]
    upper, lower = (at.source(one, "f32") for one in instruction.operands[1:])

    def convert(machine: Machine, active: Active) -> None:
        high, low = (narrow(read(machine)).astype(np.uint32) for read in (upper, lower))
        write(machine, (high << np.uint32(16)) | low, active)

    return convert


@rule(r"cvt\.rna\.tf32\.f32")
def _narrow_tf32(at: Decoder, found: re.Match, instruction: Instruction) -> Action:
    write, read = at.target(instruction.operands[0]), at.source(instruction.operands[1], "f32")
    return lambda machine, active: write(machine, to_tf32(read(machine)), active)


@rule(r"cvt\.rn\.f32\.([us]32)")
def _float_of_integer(at: Decoder, found: re.Match, instruction: Instruction) -> Action:
    write, read = at.target(instruction.operands[0]), at.source(instruction.operands[1], found[1])
    return lambda machine, active: write(machine, read(machine).astype(np.float32), active)
