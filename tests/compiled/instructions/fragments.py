"""Matrix instructions of one warp: ``ldmatrix``, ``stmatrix`` and ``mma``.

In a fragment, lane ``4 g + q`` holds what belongs to row ``g`` and to the columns from ``2 q`` on.
"""

from __future__ import annotations

import re

import numpy as np

from ..machine.machine import Action, Active, Machine
from ..machine.numbers import FROM, Array
from ..machine.program import Instruction
from .decoding import Decoder, listed, rule, unknown

G, Q = np.arange(32) // 4, np.arange(32) % 4
_ROW = 16  # bytes of a row of an 8 x 8 matrix
_MATRICES = r"\.sync\.aligned\.m8n8\.x(1|2|4)(\.trans)?\.shared(?:::cta)?\.b16"


@rule(rf"ldmatrix{_MATRICES}")
def _load_matrices(at: Decoder, found: re.Match, instruction: Instruction) -> Action:
    """Lanes 8 i to 8 i + 7 have the addresses of the rows of matrix i; every lane gets two numbers of each matrix."""
    writes = [at.target(name) for name in listed(instruction.operands[0])]
    address = at.address(instruction.operands[1], "u32")
    if len(writes) != int(found[1]):
        raise unknown(instruction)

    def load(machine: Machine, active: Active) -> None:
        values = []
        for number in range(len(writes)):
            start, warps = _rows(machine, address, number, active, instruction)
            machine.shared.note_read(_lanes(warps, number), start.reshape(-1), _ROW, instruction.shown, together=True)
            words = machine.shared.bytes.view(np.uint16)[(start // 2)[:, :, None] + np.arange(8)]  # warp, row, column
            low, high = (words[:, 2 * Q + i, G] if found[2] else words[:, G, 2 * Q + i] for i in (0, 1))
            value = np.zeros((machine.size // 32, 32), np.uint32)
            value[warps] = low.astype(np.uint32) | (high.astype(np.uint32) << np.uint32(16))
            values.append(value.reshape(-1))
        for write, value in zip(writes, values):
            write(machine, value, active)

    return load


@rule(rf"stmatrix{_MATRICES}")
def _store_matrices(at: Decoder, found: re.Match, instruction: Instruction) -> Action:
    """The reverse of ``ldmatrix``."""
    address, reads = at.address(instruction.operands[0], "u32"), at.sources(instruction.operands[1], "u32")
    if len(reads) != int(found[1]):
        raise unknown(instruction)

    def store(machine: Machine, active: Active) -> None:
        for number, read in enumerate(reads):
            start, warps = _rows(machine, address, number, active, instruction)
            value = machine.whole(read(machine)).reshape(-1, 32)[warps]
            matrix = np.zeros((len(warps), 8, 8), np.uint16)
            for i in (0, 1):
                where = (2 * Q + i, G) if found[2] else (G, 2 * Q + i)
                matrix[:, where[0], where[1]] = (value >> np.uint32(16 * i)).astype(np.uint16)
            machine.shared.note_write(_lanes(warps, number), start.reshape(-1), _ROW, instruction.shown, together=True)
            columns = [matrix[:, :, column].reshape(-1) for column in range(8)]
            machine.shared.put(start.reshape(-1), columns, 2, instruction.shown)

    return store


def _rows(machine: Machine, address, number: int, active: Active, instruction: Instruction) -> tuple[Array, Array]:
    """Where the rows of a matrix begin, by warp and row; and the warps."""
    warps = machine.warps(active, instruction.shown)
    lanes = _lanes(warps, number)
    addresses = machine.whole(address(machine))[lanes]
    machine.shared_access(lanes, addresses, _ROW, instruction)
    return machine.shared.start(lanes, addresses, _ROW, instruction.shown).reshape(-1, 8), warps


def _lanes(warps: Array, number: int) -> Array:
    """Those with the addresses of a matrix."""
    return (32 * warps[:, None] + 8 * number + np.arange(8)).reshape(-1)


_SHAPES = {"bf16": 16, "f16": 16, "tf32": 8}


@rule(r"mma\.sync\.aligned\.m16n8k(8|16)\.row\.col\.f32\.(bf16|f16|tf32)\.(bf16|f16|tf32)\.f32")
def _product(at: Decoder, found: re.Match, instruction: Instruction) -> Action:
    """``d = a b + c``, 16 x 8. The sum is exact here up to one rounding to fp32."""
    kind, depth = found[2], int(found[1])
    if found[3] != kind or _SHAPES[kind] != depth:
        raise unknown(instruction)
    writes = [at.target(name) for name in listed(instruction.operands[0])]
    first, second = (at.sources(operand, "u32") for operand in instruction.operands[1:3])
    addend = at.sources(instruction.operands[3], "f32")
    if (len(writes), len(first), len(second), len(addend)) != (4, 4, 2, 4):
        raise unknown(instruction)

    def multiply(machine: Machine, active: Active) -> None:
        machine.warps(active, instruction.shown)
        words = [machine.whole(read(machine)).reshape(-1, 32) for read in (*first, *second)]
        a = np.zeros((machine.size // 32, 16, depth))
        b = np.zeros((machine.size // 32, depth, 8))
        for word, (row, column) in zip(words, ((0, 0), (8, 0), (0, depth // 2), (8, depth // 2))):
            for place, part in elements(word, kind):
                a[:, G + row, column + place] = part
        for word, row in zip(words[4:], (0, depth // 2)):
            for place, part in elements(word, kind):
                b[:, row + place, G] = part
        product = a @ b
        for write, read, (row, column) in zip(writes, addend, ((0, 0), (0, 1), (8, 0), (8, 1))):
            c = machine.whole(read(machine)).reshape(-1, 32)
            write(machine, (product[:, G + row, 2 * Q + column] + c).astype(np.float32).reshape(-1), active)

    return multiply


def elements(words: Array, kind: str) -> list[tuple[Array, Array]]:
    """What a register of 32 bits holds of a fragment, for each lane: columns (or rows), and values."""
    if kind == "tf32":
        return [(Q, FROM[kind](words))]
    return [(2 * Q + i, FROM[kind]((words >> np.uint32(16 * i)).astype(np.uint16))) for i in (0, 1)]


def bytes_of(kind: str) -> int:
    """Of an element in memory."""
    return 4 if kind == "tf32" else 2
