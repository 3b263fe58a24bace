"""Moves between registers, and loads and stores."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np

from ..machine.machine import Action, Active, Machine
from ..machine.numbers import TYPES, UNSIGNED, Array, bits_of
from ..machine.program import Instruction
from .decoding import Decoder, Read, listed, rule, unknown

ELEMENT = r"[bus](8|16|32|64)|f32"
_VECTOR = r"(?:\.v(2|4))?"
_SHARED = r"shared(?:::cta)?"


@rule(r"mov\.([bus](?:16|32|64)|f32|pred)")
def _move(at: Decoder, found: re.Match, instruction: Instruction) -> Action:
    """One register, or the parts of one in braces, the lowest first."""
    target, source = instruction.operands
    kind = found[1] if found[1] == "pred" else f"u{bits_of(found[1])}"
    if target.startswith("{"):
        return _split(at, listed(target), source, kind)
    if source.startswith("{"):
        return _joined(at, target, listed(source), kind)
    if target in at.fragments:
        return _renamed(at, target, source, kind)
    write, read = at.target(target), at.source(source, kind)
    return lambda machine, active: write(machine, read(machine), active)


def _renamed(at: Decoder, target: str, source: str, kind: str) -> Action:
    """A move to a register that products use: PTX's registers are virtual, so this only gives a value another name."""
    read = at.source(source, kind, product=True)

    def rename(machine: Machine, active: Active) -> None:
        machine.in_flight["products"].renamed(machine, target, source)
        machine.write(target, read(machine), active)

    return rename


def _split(at: Decoder, targets: list[str], source: str, kind: str) -> Action:
    bits = bits_of(kind) // len(targets)
    read = at.source(source, kind)
    parts = [(number * bits, at.target(name)) for number, name in enumerate(targets) if name != "_"]

    def split(machine: Machine, active: Active) -> None:
        value = read(machine)
        for shift, write in parts:
            write(machine, (value >> value.dtype.type(shift)).astype(UNSIGNED[bits]), active)

    return split


def _joined(at: Decoder, target: str, sources: list[str], kind: str) -> Action:
    bits, dtype = bits_of(kind) // len(sources), UNSIGNED[bits_of(kind)]
    write, reads = at.target(target), [at.source(name, f"u{bits}") for name in sources]

    def join(machine: Machine, active: Active) -> None:
        value = dtype(0)
        for number, read in enumerate(reads):
            value = value | (read(machine).astype(dtype) << dtype(number * bits))
        write(machine, value, active)

    return join


@rule(r"ld\.param\.([bus](?:8|16|32|64)|f32)")
def _load_parameter(at: Decoder, found: re.Match, instruction: Instruction) -> Action:
    write, read = at.target(instruction.operands[0]), at.parameter(instruction.operands[1], f"u{bits_of(found[1])}")
    return lambda machine, active: write(machine, read(machine), active)


@rule(rf"ld\.global{_VECTOR}\.(?:{ELEMENT})")
def _load_global(at: Decoder, found: re.Match, instruction: Instruction) -> Action:
    width, count, names = _shape(found, instruction, instruction.operands[0])
    writes, dtype = [at.target(name) for name in names], TYPES[instruction.opcode[-1]]
    where = _where(at.address(instruction.operands[1], "u64"), Machine.global_access, width * count, instruction)

    def load(machine: Machine, active: Active) -> None:
        _, addresses = where(machine, active)
        values = machine.memory.load(addresses, width, count, instruction.shown)
        _into(machine, writes, [value.view(dtype) for value in values], active)

    return load


@rule(rf"st\.global{_VECTOR}\.(?:{ELEMENT})")
def _store_global(at: Decoder, found: re.Match, instruction: Instruction) -> Action:
    width, count, names = _shape(found, instruction, instruction.operands[1])
    reads = [at.source(name, f"u{8 * width}") for name in names]
    where = _where(at.address(instruction.operands[0], "u64"), Machine.global_access, width * count, instruction)

    def store(machine: Machine, active: Active) -> None:
        lanes, addresses = where(machine, active)
        values = [machine.of(read(machine), active) for read in reads]
        machine.memory.store(addresses, values, width, machine.program_of[lanes], instruction.shown)

    return store


@rule(rf"ld\.{_SHARED}{_VECTOR}\.(?:{ELEMENT})")
def _load_shared(at: Decoder, found: re.Match, instruction: Instruction) -> Action:
    width, count, names = _shape(found, instruction, instruction.operands[0])
    writes, dtype = [at.target(name) for name in names], TYPES[instruction.opcode[-1]]
    where = _where(at.address(instruction.operands[1], "u32"), Machine.shared_access, width * count, instruction)
    at.accesses_shared(width * count)

    def load(machine: Machine, active: Active) -> None:
        lanes, addresses = where(machine, active)
        values = machine.shared.load(lanes, addresses, width, count, instruction.shown)
        _into(machine, writes, [value.view(dtype) for value in values], active)

    return load


@rule(rf"st\.{_SHARED}{_VECTOR}\.(?:{ELEMENT})")
def _store_shared(at: Decoder, found: re.Match, instruction: Instruction) -> Action:
    width, count, names = _shape(found, instruction, instruction.operands[1])
    reads = [at.source(name, f"u{8 * width}") for name in names]
    where = _where(at.address(instruction.operands[0], "u32"), Machine.shared_access, width * count, instruction)
    at.accesses_shared(width * count)

    def store(machine: Machine, active: Active) -> None:
        lanes, addresses = where(machine, active)
        values = [machine.of(read(machine), active) for read in reads]
        machine.shared.store(lanes, addresses, values, width, instruction.shown)

    return store


def _shape(found: re.Match, instruction: Instruction, operand: str) -> tuple[int, int, list[str]]:
    """Bytes of an element, how many there are, and their registers."""
    count, names = int(found[1] or 1), listed(operand)
    if len(names) != count:
        raise unknown(instruction)
    return int(found[2] or 32) // 8, count, names


def _where(
    address: Read, tell: Callable[..., None], width: int, instruction: Instruction
) -> Callable[[Machine, Active], tuple[Array, Array]]:
    """The lanes that take part and their addresses, of which whoever watches is told."""

    def where(machine: Machine, active: Active) -> tuple[Array, Array]:
        lanes, addresses = machine.lanes(active), machine.of(address(machine), active)
        tell(machine, lanes, addresses, width, instruction)
        return lanes, addresses

    return where


def _into(machine: Machine, writes: list, values: list[Array], active: Active) -> None:
    for write, value in zip(writes, values):
        if active is not None:
            whole = np.zeros(machine.size, value.dtype)
            whole[active] = value
            value = whole
        write(machine, value, active)
