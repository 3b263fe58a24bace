"""Executes a program: all threads of several CTAs at once, one block of instructions after the other.

Every register is one array, with one element per lane (thread of some CTA), or one for all. Lanes that are at the same
block go together; of several blocks the first in the text is executed first. So lanes that have parted meet again as
soon as they can.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from .faults import Fault, Hazards
from .memory import Memory
from .numbers import UNSIGNED, Array
from .program import Instruction, Program
from .shared import Shared

Active = Array | None  # bools by lane; None for all lanes
Action = Callable[["Machine", Active], None]
LIMIT = 2_000_000  # blocks that one execution may take


class Step(NamedTuple):
    """A decoded instruction; a jump has no action."""

    instruction: Instruction
    action: Action | None


class Code(NamedTuple):
    """A decoded program.

    Attributes:
        granule: bytes of its smallest access to shared memory.
        fragments: registers that products of warpgroups read and write while they are in flight.
        in_flight: makes what a machine keeps of operations in flight, by name.
    """

    program: Program
    blocks: list[list[Step]]
    granule: int
    fragments: frozenset[str]
    in_flight: dict[str, Callable[[Machine], InFlight]]


class InFlight(Protocol):
    """Operations that go on in the background."""

    def end(self, machine: Machine) -> None:
        """The program has ended: note what was not waited for."""


class Watch(Protocol):
    """Who counts accesses; the lanes are those that take part."""

    def visited(self, block: int, warps: int) -> None: ...
    def global_access(self, lanes: Array, addresses: Array, width: int, instruction: Instruction) -> None: ...
    def shared_access(self, lanes: Array, addresses: Array, width: int, instruction: Instruction) -> None: ...


class Machine:
    """Some CTAs of a launch.

    Attributes:
        registers: by name, as unsigned integers, or bools for predicates.
        parameters: values of the kernel's parameters, by name.
        in_flight: operations that go on in the background, by name.
        everyone: the numbers of all lanes.
    """

    def __init__(
        self,
        code: Code,
        ctas: Sequence[int],
        values: Sequence[int | float],
        shared: int,
        memory: Memory,
        watch: Watch | None = None,
    ):
        program, self.code, self.memory, self.watch = code.program, code, memory, watch
        self.hazards: Hazards = memory.hazards
        if len(values) != len(program.parameters):
            raise Fault(f"{program.name}: expected {len(program.parameters)} values, got {len(values)}")
        self.parameters = {parameter.name: value for parameter, value in zip(program.parameters, values)}
        self.ctas, self.threads, self.size = len(ctas), program.threads, len(ctas) * program.threads
        self.everyone = np.arange(self.size)
        self.program_of = np.repeat(np.array(ctas, np.int32) + 1, program.threads)  # counted from 1
        proxies = bool(code.fragments)
        self.shared = Shared(self.ctas, self.threads, shared, code.granule, proxies, self.hazards)
        self.active: Active = None  # of the instruction that is executed
        self.registers: dict[str, Array] = {
            "%tid.x": np.tile(np.arange(self.threads, dtype=np.uint32), self.ctas),
            "%ctaid.x": np.repeat(np.array(ctas, np.uint32), self.threads),
        }
        self.in_flight: dict[str, Any] = {name: made(self) for name, made in code.in_flight.items()}

    def register(self, name: str) -> Array:
        """Its bits; all ones, which is NaN as a number, where nothing was written."""
        found = self.registers.get(name)
        if found is None:
            bits = self.code.program.bits(name)
            found = np.ones(1, np.bool_) if bits == 1 else np.full(1, (1 << bits) - 1, UNSIGNED[bits])
            self.registers[name] = found
        return found

    def write(self, name: str, value: Array, active: Active) -> None:
        """Bits of the register's width, in the lanes that are active."""
        self.registers[name] = value if active is None else np.where(active, value, self.register(name))

    def lanes(self, active: Active) -> Array:
        return self.everyone if active is None else np.flatnonzero(active)

    def whole(self, value: Array) -> Array:
        """With one element per lane."""
        return value if value.size == self.size else np.repeat(value, self.size)

    def of(self, value: Array, active: Active) -> Array:
        """The elements of the lanes that are active."""
        return self.whole(value) if active is None else self.whole(value)[active]

    def warps(self, active: Active, what: str) -> Array:
        """The numbers of the active warps; a part of a warp is a fault."""
        if active is None:
            return np.arange(self.size // 32)
        lanes = active.reshape(-1, 32)
        if (lanes.any(1) != lanes.all(1)).any():
            raise Fault(f"not all threads of a warp take part: {what}")
        return np.flatnonzero(lanes[:, 0])

    def global_access(self, lanes: Array, addresses: Array, width: int, instruction: Instruction) -> None:
        """Tell whoever watches."""
        if self.watch is not None:
            self.watch.global_access(lanes, addresses, width, instruction)

    def shared_access(self, lanes: Array, addresses: Array, width: int, instruction: Instruction) -> None:
        """Tell whoever watches."""
        if self.watch is not None:
            self.watch.shared_access(lanes, addresses, width, instruction)

    # -- control flow --------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Execute to the end of every lane.

        Raises:
            Fault: see there.
        """
        with np.errstate(all="ignore"):
            self._run()
        for operations in self.in_flight.values():
            operations.end(self)

    def _run(self) -> None:
        blocks, end = self.code.blocks, len(self.code.blocks)
        where = np.zeros(self.size, np.int32)
        for _ in range(LIMIT):
            block = int(where.min())
            if block == end:
                return
            here = where == block
            mask = None if here.all() else here
            if self.watch is not None:
                warps = self.size // 32 if mask is None else int(mask.reshape(-1, 32).any(1).sum())
                self.watch.visited(block, warps)
            where[here] = block + 1
            for step in blocks[block]:
                active = mask if step.instruction.predicate is None else self._predicated(step.instruction, mask)
                if active is not None and not active.any():
                    continue
                if step.action is not None:
                    self.active = active
                    step.action(self, active)
                else:
                    jumps = step.instruction.opcode[0] == "bra"
                    to = self.code.program.labels[step.instruction.operands[0]] if jumps else end
                    where[slice(None) if active is None else active] = to
        raise Fault(f"{self.code.program.name}: expected an end, got none after {LIMIT} blocks")

    def _predicated(self, instruction: Instruction, mask: Active) -> Active:
        holds = self.whole(self.register(instruction.predicate))
        if instruction.negated:
            holds = ~holds
        if mask is not None:
            return holds & mask
        return None if holds.all() else holds
