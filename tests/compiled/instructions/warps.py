"""What the threads of a warp or of a CTA do together."""

from __future__ import annotations

import re

import numpy as np

from ..machine.faults import Fault
from ..machine.machine import Action, Active, Machine
from ..machine.program import Instruction
from .decoding import Decoder, rule, unknown

EVERYONE = ("-1", "0xffffffff", "0xFFFFFFFF")


@rule(r"(bar|barrier)\.sync(?:\.aligned)?")
def _barrier(at: Decoder, found: re.Match, instruction: Instruction) -> Action:
    """All threads of the CTA meet. A thread that is elsewhere would be waited for without end."""
    if instruction.operands != ("0",):
        raise unknown(instruction)

    def meet(machine: Machine, active: Active) -> None:
        if active is None:
            machine.shared.barrier(np.arange(machine.ctas))
            return
        there = active.reshape(machine.ctas, -1)
        if (there.any(1) != there.all(1)).any():
            raise Fault(f"a barrier that some threads do not reach: {instruction.shown}")
        machine.shared.barrier(np.flatnonzero(there[:, 0]))

    return meet


@rule(r"bar\.warp\.sync")
def _warp_barrier(at: Decoder, found: re.Match, instruction: Instruction) -> Action:
    if instruction.operands[0] not in EVERYONE:
        raise unknown(instruction)
    return lambda machine, active: machine.shared.warp_barrier(machine.warps(active, instruction.shown))


@rule(r"shfl\.sync\.(bfly|idx|up|down)\.b32")
def _shuffle(at: Decoder, found: re.Match, instruction: Instruction) -> Action:
    """Each lane takes the value of another lane of its warp; where there is none, its own."""
    target, value, lane, clamp, members = instruction.operands
    if members not in EVERYONE or (clamp, found[1]) not in {("31", "bfly"), ("31", "idx"), ("31", "down"), ("0", "up")}:
        raise unknown(instruction)
    write, read, other = at.target(target), at.source(value, "u32"), at.source(lane, "u32")
    own = np.arange(32)

    def shuffle(machine: Machine, active: Active) -> None:
        machine.warps(active, instruction.shown)
        values = machine.whole(read(machine)).reshape(-1, 32)
        asked = machine.whole(other(machine)).reshape(-1, 32).astype(np.int64) & 31
        taken = {"bfly": own ^ asked, "idx": asked, "up": own - asked, "down": own + asked}[found[1]]
        taken = np.where((taken < 0) | (taken > 31), own, taken)
        write(machine, np.take_along_axis(values, taken, 1).reshape(-1), active)

    return shuffle


@rule(r"redux\.sync\.(add|min|max|and|or|xor)\.([us]32|b32)")
def _reduction(at: Decoder, found: re.Match, instruction: Instruction) -> Action:
    """Over the values of a warp; every lane has the result."""
    target, value, members = instruction.operands
    if members not in EVERYONE:
        raise unknown(instruction)
    write, read = at.target(target), at.source(value, found[2])
    functions = {"min": np.minimum, "max": np.maximum, "add": np.add}
    functions |= {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}
    function = functions[found[1]]

    def reduce(machine: Machine, active: Active) -> None:
        machine.warps(active, instruction.shown)
        values = machine.whole(read(machine)).reshape(-1, 32)
        result = function.reduce(values, axis=1, dtype=values.dtype)
        write(machine, np.repeat(result, 32), active)

    return reduce
