"""From the text of an instruction to what it does: rules by the form of the opcode, and readers of operands."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable

import numpy as np

from ..machine.faults import UnknownInstructionError
from ..machine.machine import Action, Active, Machine
from ..machine.numbers import TYPES, UNSIGNED, Array, bits_of
from ..machine.program import Instruction, Program, operands_of
from ..machine.shared import BASE

Read = Callable[[Machine], Array]
Write = Callable[[Machine, Array, Active], None]
Rule = Callable[["Decoder", re.Match, Instruction], Action]

RULES: dict[str, list[tuple[re.Pattern, Rule]]] = defaultdict(list)
_ADDRESS = re.compile(r"\[\s*(%?[\w.]+)\s*(?:\+\s*(-?\w+))?\s*\]")
_SPECIAL = ("%tid.x", "%ctaid.x")
SHARED_SYMBOL = "global_smem"  # where Triton's dynamic shared memory begins


def rule(form: str) -> Callable[[Rule], Rule]:
    """The decorated function decodes instructions whose whole opcode has this form, a regular expression."""

    def add(function: Rule) -> Rule:
        for first in re.match(r"\(?([\w|]+)", form)[1].split("|"):
            RULES[first].append((re.compile(form), function))
        return function

    return add


class Decoder:
    """Reads the operands of one program's instructions.

    Attributes:
        granule: bytes of the smallest access to shared memory so far, at most 4.
        fragments: registers of products of warpgroups.
    """

    def __init__(self, program: Program):
        self.program, self.granule = program, 4
        self.fragments = _fragments(program)

    def source(self, operand: str, kind: str, product: bool = False) -> Read:
        """A register or a number, as the type; ``product``: read by the product that the register may belong to."""
        dtype = TYPES[kind]
        if not operand.startswith("%"):
            value = self._constant(operand, kind)
            return lambda machine: value
        bits = self._bits(operand)
        if operand in self.fragments and not product:
            return self._guarded(operand, dtype)
        if bits == bits_of(kind):
            return lambda machine: machine.register(operand).view(dtype)
        unsigned = UNSIGNED[bits_of(kind)]
        return lambda machine: machine.register(operand).astype(unsigned).view(dtype)

    def _guarded(self, operand: str, dtype: type) -> Read:
        def read(machine: Machine) -> Array:
            machine.in_flight["products"].accessed(machine, operand, "read")
            return machine.register(operand).view(dtype)

        return read

    def target(self, operand: str) -> Write:
        """A register. Integers of another width are extended as their type says, or cut off."""
        bits = self._bits(operand)
        stored = np.bool_ if bits == 1 else UNSIGNED[bits]
        guarded = operand in self.fragments

        def write(machine: Machine, value: Array, active: Active) -> None:
            if guarded:
                machine.in_flight["products"].accessed(machine, operand, "write")
            if value.dtype != stored:
                same = value.dtype.itemsize * 8 == bits
                value = value.view(stored) if same else value.astype(stored)
            machine.write(operand, value, active)

        return write

    def address(self, operand: str, kind: str) -> Read:
        """Of ``[register + number]``."""
        found = _ADDRESS.fullmatch(operand)
        if found is None:
            raise UnknownInstructionError(f"expected an address, got {operand!r}")
        base = self.source(found[1], kind)
        offset = int(found[2] or "0", 0)
        if not offset:
            return base
        step = TYPES[kind](offset & ((1 << bits_of(kind)) - 1))
        return lambda machine: base(machine) + step

    def parameter(self, operand: str, kind: str) -> Read:
        found = _ADDRESS.fullmatch(operand)
        if found is None or found[2] or found[1] not in {parameter.name for parameter in self.program.parameters}:
            raise UnknownInstructionError(f"expected a parameter, got {operand!r}")
        name = found[1]

        def read(machine: Machine) -> Array:
            value = machine.parameters[name]
            if isinstance(value, float):
                return np.array([value], np.float32).view(UNSIGNED[bits_of(kind)])
            return np.array([value & ((1 << bits_of(kind)) - 1)], UNSIGNED[bits_of(kind)])

        return read

    def sources(self, operand: str, kind: str, product: bool = False) -> list[Read]:
        """Of a list in braces, or of one operand."""
        return [self.source(one, kind, product) for one in listed(operand)]

    def accesses_shared(self, width: int) -> None:
        self.granule = min(self.granule, width)

    def _bits(self, register: str) -> int:
        return 32 if register in _SPECIAL else self.program.bits(register)

    def _constant(self, operand: str, kind: str) -> Array:
        dtype, bits = TYPES[kind], max(8, bits_of(kind))
        if operand == SHARED_SYMBOL:
            return np.array([BASE], dtype)
        if operand.startswith("0f"):
            return np.array([int(operand[2:], 16)], np.uint32).view(dtype)
        value = int(operand, 0)
        if kind == "pred":
            return np.array([value != 0])
        return np.array([value & ((1 << bits) - 1)], UNSIGNED[bits]).view(dtype)


def listed(operand: str) -> list[str]:
    return operands_of(operand.strip()[1:-1]) if operand.startswith("{") else [operand]


def _fragments(program: Program) -> set[str]:
    """The registers of products, and those that are moved to one of them."""
    found: set[str] = set()
    moves: list[tuple[str, str]] = []
    for instruction in program.instructions:
        if instruction.opcode[:2] == ("wgmma", "mma_async"):
            for operand in instruction.operands[:2]:
                if operand.startswith("{"):
                    found.update(listed(operand))
        elif instruction.opcode[0] == "mov":
            moves.append(instruction.operands[:2])
    before = 0
    while found and len(found) > before:
        before = len(found)
        found |= {source for target, source in moves if target in found and source.startswith("%")}
    return found


def unknown(instruction: Instruction, why: object = None) -> UnknownInstructionError:
    reason = f": {why}" if why else ""
    return UnknownInstructionError(f"expected a form that there is a rule for, got {instruction.shown}{reason}")
