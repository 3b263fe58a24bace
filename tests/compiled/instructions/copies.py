"""``cp.async``: copies to shared memory that go on in the background.

What a copy reads arrives when its thread waits for the group of the copy, and not before. So code that does not wait
computes with NaN, beside the hazard that is noted.
"""

from __future__ import annotations

import re
from typing import NamedTuple

import numpy as np

from ..machine.machine import Action, Active, Machine
from ..machine.numbers import Array
from ..machine.program import Instruction
from .decoding import Decoder, rule, unknown


class Copy(NamedTuple):
    """One instruction's copies."""

    lanes: Array
    group: Array  # of the lane's groups, by lane
    start: Array
    words: list[Array]
    what: str


class Copies:
    """The copies in flight, and by lane the number of groups that it has committed."""

    def __init__(self, machine: Machine):
        self.flying: list[Copy] = []
        self.committed = np.zeros(machine.size, np.int64)

    def begin(self, machine: Machine, lanes: Array, start: Array, words: list[Array], what: str) -> None:
        machine.shared.copy_begins(lanes, start, 4 * len(words), what)
        self.flying.append(Copy(lanes, self.committed[lanes], start, words, what))

    def wait(self, machine: Machine, lanes: Array, allowed: int) -> None:
        """Until at most so many of the lanes' last groups are in flight."""
        complete = np.full(machine.size, -1)
        complete[lanes] = self.committed[lanes] - allowed
        left = []
        for copy in self.flying:
            done = copy.group < complete[copy.lanes]
            if done.any():
                words = [word[done] for word in copy.words]
                machine.shared.copy_lands(copy.lanes[done], copy.start[done], words, copy.what)
            if not done.all():
                words = [word[~done] for word in copy.words]
                left.append(Copy(copy.lanes[~done], copy.group[~done], copy.start[~done], words, copy.what))
        self.flying = left

    def end(self, machine: Machine) -> None:
        if self.flying:
            machine.hazards.note("copies that are never waited for", machine.code.program.name)


@rule(r"cp\.async\.c([ag])\.shared(?:::cta)?\.global")
def _copy(at: Decoder, found: re.Match, instruction: Instruction) -> Action:
    """``cp.async [to], [from], size, there``: ``there`` bytes are read, the others are 0."""
    size = int(instruction.operands[2], 0)
    if size not in ((4, 8, 16) if found[1] == "a" else (16,)) or not 3 <= len(instruction.operands) <= 4:
        raise unknown(instruction)
    to, source = at.address(instruction.operands[0], "u32"), at.address(instruction.operands[1], "u64")
    there = at.source(instruction.operands[3] if len(instruction.operands) == 4 else str(size), "u32")
    at.accesses_shared(size)

    def copy(machine: Machine, active: Active) -> None:
        lanes, shared = machine.lanes(active), machine.shared
        addresses, targets = machine.of(source(machine), active), machine.of(to(machine), active)
        read = machine.of(there(machine), active)
        if ((read != 0) & (read != size)).any():
            raise unknown(instruction)  # a part of the bytes
        machine.shared_access(lanes, targets, size, instruction)
        start = shared.start(lanes, targets, size, instruction.shown)
        words = [np.zeros(lanes.size, np.uint32) for _ in range(size // 4)]
        reading = np.flatnonzero(read)
        if reading.size:
            machine.global_access(lanes[reading], addresses[reading], size, instruction)
            values = machine.memory.load(addresses[reading], 4, size // 4, instruction.shown)
            for word, value in zip(words, values):
                word[reading] = value
        machine.in_flight["copies"].begin(machine, lanes, start, words, instruction.shown)

    return copy


@rule(r"cp\.async\.commit_group")
def _commit(at: Decoder, found: re.Match, instruction: Instruction) -> Action:
    def commit(machine: Machine, active: Active) -> None:
        machine.in_flight["copies"].committed[machine.lanes(active)] += 1

    return commit


@rule(r"cp\.async\.wait_group")
def _wait(at: Decoder, found: re.Match, instruction: Instruction) -> Action:
    allowed = int(instruction.operands[0], 0)
    return lambda machine, active: machine.in_flight["copies"].wait(machine, machine.lanes(active), allowed)
