"""Integers, floating point, comparisons and bits."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable

import numpy as np

from ..machine.faults import Fault
from ..machine.machine import Action, Active, Machine
from ..machine.numbers import FROM, TO, TYPES, UNSIGNED, Array, bits_of, fused, loss, to_odd
from ..machine.program import Instruction
from .decoding import Decoder, Read, rule

INT = r"([us](?:16|32|64))"


def _elementwise(at: Decoder, instruction: Instruction, kind: str, function: Callable[..., Array]) -> Action:
    """The first operand becomes a function of the others, which are all of one type."""
    write, reads = at.target(instruction.operands[0]), [at.source(one, kind) for one in instruction.operands[1:]]
    return _applied(write, reads, function)


def _applied(write, reads: list[Read], function: Callable[..., Array]) -> Action:
    if len(reads) == 2:
        first, second = reads

        def apply_two(machine: Machine, active: Active) -> None:
            write(machine, function(first(machine), second(machine)), active)

        return apply_two

    def apply(machine: Machine, active: Active) -> None:
        write(machine, function(*[read(machine) for read in reads]), active)

    return apply


# -- integers ----------------------------------------------------------------------------------------------------------

_INTEGERS: dict[str, Callable[..., Array]] = {
    "add": operator.add,
    "sub": operator.sub,
    "min": np.minimum,
    "max": np.maximum,
    "neg": operator.neg,
    "abs": np.abs,
}
_BITS: dict[str, Callable[..., Array]] = {
    "and": operator.and_,
    "or": operator.or_,
    "xor": operator.xor,
    "not": operator.invert,
}


@rule(rf"(add|sub|min|max|neg|abs)\.{INT}")
def _integer(at: Decoder, found: re.Match, instruction: Instruction) -> Action:
    return _elementwise(at, instruction, found[2], _INTEGERS[found[1]])


@rule(r"(and|or|xor|not)\.(b16|b32|b64|pred)")
def _bitwise(at: Decoder, found: re.Match, instruction: Instruction) -> Action:
    return _elementwise(at, instruction, found[2], _BITS[found[1]])


@rule(r"(mul|mad)\.lo\.([us](?:32|64))")
def _low_product(at: Decoder, found: re.Match, instruction: Instruction) -> Action:
    if found[1] == "mul":
        return _elementwise(at, instruction, found[2], operator.mul)
    return _elementwise(at, instruction, found[2], lambda x, y, z: x * y + z)


@rule(r"(mul|mad)\.wide\.([us])32")
def _wide_product(at: Decoder, found: re.Match, instruction: Instruction) -> Action:
    """Of two numbers of 32 bits; the product and the addend have 64."""
    wide = TYPES[f"{found[2]}64"]
    reads = [at.source(one, f"{found[2]}32") for one in instruction.operands[1:3]]
    reads += [at.source(one, f"{found[2]}64") for one in instruction.operands[3:]]

    def product(x: Array, y: Array, z: Array | None = None) -> Array:
        return x.astype(wide) * y.astype(wide) if z is None else x.astype(wide) * y.astype(wide) + z

    return _applied(at.target(instruction.operands[0]), reads, product)


@rule(rf"(div|rem)\.{INT}")
def _division(at: Decoder, found: re.Match, instruction: Instruction) -> Action:
    """Towards zero. A divisor of 0 is a fault: PTX leaves the result open."""
    write, reads = at.target(instruction.operands[0]), [at.source(one, found[2]) for one in instruction.operands[1:]]

    def divide(machine: Machine, active: Active) -> None:
        x, y = (machine.whole(read(machine)) for read in reads)
        if (y == 0 if active is None else (y == 0) & active).any():
            raise Fault(f"division by zero: {instruction.shown}")
        y = np.where(y == 0, y.dtype.type(1), y)
        quotient = x // y
        quotient += ((quotient * y != x) & ((x < 0) != (y < 0))).astype(x.dtype)
        write(machine, quotient if found[1] == "div" else x - quotient * y, active)

    return divide


@rule(r"(shl|shr)\.([bus])(16|32|64)")
def _shift(at: Decoder, found: re.Match, instruction: Instruction) -> Action:
    """By more than all bits: nothing is left, or the sign."""
    kind, bits = found[2] + found[3], int(found[3])
    write, value = at.target(instruction.operands[0]), at.source(instruction.operands[1], kind)
    amount = at.source(instruction.operands[2], "u32")
    function = np.left_shift if found[1] == "shl" else np.right_shift
    dtype = TYPES[kind]

    def shift(machine: Machine, active: Active) -> None:
        x, by = value(machine), amount(machine)
        moved = function(x, np.minimum(by, bits - 1).astype(dtype))
        beyond = np.right_shift(x, dtype(bits - 1)) if found[2] == "s" else dtype(0)
        write(machine, np.where(by >= bits, beyond, moved).astype(dtype), active)

    return shift


@rule(r"bfe\.u(32|64)")
def _field(at: Decoder, found: re.Match, instruction: Instruction) -> Action:
    """``bfe d, a, position, length``: bits of a, to the right."""
    write, value = at.target(instruction.operands[0]), at.source(instruction.operands[1], f"u{found[1]}")
    place = _place(at, instruction)

    def extract(machine: Machine, active: Active) -> None:
        start, size = (number.astype(np.uint64) for number in place(machine))
        most = np.uint64(63)
        moved = np.where(start > most, np.uint64(0), value(machine).astype(np.uint64) >> np.minimum(start, most))
        kept = (np.uint64(1) << np.minimum(size, most)) - np.uint64(1)
        write(machine, np.where(size > most, moved, moved & kept).astype(UNSIGNED[int(found[1])]), active)

    return extract


@rule(r"bfe\.s32")
def _signed_field(at: Decoder, found: re.Match, instruction: Instruction) -> Action:
    """As ``bfe.u32``, with copies of the field's sign in front."""
    write, value = at.target(instruction.operands[0]), at.source(instruction.operands[1], "s32")
    place = _place(at, instruction)

    def extract(machine: Machine, active: Active) -> None:
        x = value(machine).astype(np.int64)
        start, size = (number.astype(np.int64) for number in place(machine))
        field = (x >> np.minimum(start, 63)) & ((1 << np.minimum(size, 32)) - 1)
        top = np.minimum(start + size - 1, 31)
        negative = ((x >> np.maximum(top, 0)) & 1 == 1) & (size > 0)
        filled = np.where(negative & (size < 32), field | (-1 << np.minimum(size, 32)), field)
        write(machine, filled.astype(np.int64).astype(np.uint32), active)

    return extract


def _place(at: Decoder, instruction: Instruction) -> Callable[[Machine], list[Array]]:
    """Reads the position and the length of a field, of which 8 bits count."""
    reads = [at.source(operand, "u32") for operand in instruction.operands[2:]]
    return lambda machine: [read(machine) & np.uint32(0xFF) for read in reads]


@rule(r"prmt\.b32")
def _permute(at: Decoder, found: re.Match, instruction: Instruction) -> Action:
    """Each nibble of the selector picks one of the eight bytes of b and a, or copies of its sign."""

    def permute(a: Array, b: Array, selector: Array) -> Array:
        both = a.astype(np.uint64) | (b.astype(np.uint64) << np.uint64(32))
        result = np.uint32(0)
        for place in range(4):
            nibble = (selector >> np.uint32(4 * place)) & np.uint32(15)
            byte = (both >> (np.uint64(8) * (nibble & np.uint32(7)).astype(np.uint64))) & np.uint64(0xFF)
            signs = np.where(byte >= 0x80, np.uint64(0xFF), np.uint64(0))
            picked = np.where(nibble >= 8, signs, byte).astype(np.uint32)
            result = result | (picked << np.uint32(8 * place))
        return result

    return _elementwise(at, instruction, "u32", permute)


# -- floating point ----------------------------------------------------------------------------------------------------


_NAN = np.uint32(0x7FFFFFFF).view(np.float32)


def _extreme(pick: Callable[..., Array], zeros: Callable[..., Array]) -> Callable[..., Array]:
    """Of two numbers; where one is NaN, the other; where both are, 0x7FFFFFFF. -0 is less than +0."""

    def extreme(x: Array, y: Array) -> Array:
        both = (x == 0) & (y == 0)
        found = np.where(both, zeros(x.view(np.uint32), y.view(np.uint32)).view(np.float32), pick(x, y))
        return np.where(np.isnan(found), _NAN, found)

    return extreme


_FLOATS: dict[str, Callable[..., Array]] = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "max": _extreme(np.fmax, operator.and_),
    "min": _extreme(np.fmin, operator.or_),
    "neg": operator.neg,
    "abs": np.abs,
}


@rule(r"(add|sub|mul|max|min|neg|abs)(?:\.rn)?\.f32")
def _float(at: Decoder, found: re.Match, instruction: Instruction) -> Action:
    return _elementwise(at, instruction, "f32", _FLOATS[found[1]])


@rule(r"fma\.rn\.f32")
def _fused(at: Decoder, found: re.Match, instruction: Instruction) -> Action:
    return _elementwise(at, instruction, "f32", fused)


@rule(r"div\.(?:full|rn)\.f32")
def _quotient(at: Decoder, found: re.Match, instruction: Instruction) -> Action:
    """``div.full`` may be wrong by two units in the last place on a GPU; here it is rounded to nearest."""
    return _elementwise(at, instruction, "f32", operator.truediv)


@rule(r"(add|sub|mul|neg|abs|fma)(?:\.rn)?\.(bf16|f16)(x2)?")
def _half(at: Decoder, found: re.Match, instruction: Instruction) -> Action:
    """One number of 16 bits, or two of them in a register of 32: rounded once."""
    widen, narrow = FROM[found[2]], TO[found[2]]
    sign = np.uint16(0x8000)

    def compute(*halves: Array) -> Array:
        if found[1] in ("neg", "abs"):
            return halves[0] ^ sign if found[1] == "neg" else halves[0] & ~sign
        x, y, *addend = (widen(half) for half in halves)
        if found[1] == "mul":
            return narrow(x * y)  # exact in fp32, as is its rounding
        if addend:  # as a double: fp32 has not its range
            return narrow(_sum_to_odd(x.astype(np.float64) * y, addend[0]))
        return narrow(_sum_to_odd(x, y if found[1] == "add" else -y))

    def both(*pairs: Array) -> Array:
        low = compute(*[(pair & np.uint32(0xFFFF)).astype(np.uint16) for pair in pairs])
        high = compute(*[(pair >> np.uint32(16)).astype(np.uint16) for pair in pairs])
        return low.astype(np.uint32) | (high.astype(np.uint32) << np.uint32(16))

    return _elementwise(at, instruction, "u32" if found[3] else "u16", both if found[3] else compute)


def _sum_to_odd(x: Array, y: Array) -> Array:
    """``x + y`` in fp32, odd in its last bit where it is not exact."""
    x, y = x.astype(np.float64), y.astype(np.float64)
    wide = x + y
    total = wide.astype(np.float32)
    return to_odd(total, (wide - total) + loss(wide, x, y))


# -- comparisons -------------------------------------------------------------------------------------------------------

_ORDERS = {
    "eq": operator.eq,
    "ne": operator.ne,
    "lt": operator.lt,
    "le": operator.le,
    "gt": operator.gt,
    "ge": operator.ge,
}


@rule(r"setp\.(eq|ne|lt|le|gt|ge)\.([bus](?:16|32|64))")
def _compare_integers(at: Decoder, found: re.Match, instruction: Instruction) -> Action:
    return _elementwise(at, instruction, found[2], _ORDERS[found[1]])


@rule(r"setp\.(eq|ne|lt|le|gt|ge|num|nan)(u?)\.f32")
def _compare_floats(at: Decoder, found: re.Match, instruction: Instruction) -> Action:
    """With NaN a comparison is false; with a trailing u it is true."""

    def compare(x: Array, y: Array) -> Array:
        unordered = np.isnan(x) | np.isnan(y)
        if found[1] in ("num", "nan"):
            return ~unordered if found[1] == "num" else unordered
        holds = _ORDERS[found[1]](x, y)
        return holds | unordered if found[2] else holds & ~unordered

    return _elementwise(at, instruction, "f32", compare)


@rule(r"selp\.([bus](?:16|32|64)|f32)")
def _select(at: Decoder, found: re.Match, instruction: Instruction) -> Action:
    """``selp d, a, b, p``: a where p holds."""
    bits = f"u{bits_of(found[1])}"
    target, a, b, p = instruction.operands
    reads = [at.source(p, "pred"), at.source(a, bits), at.source(b, bits)]
    return _applied(at.target(target), reads, np.where)
