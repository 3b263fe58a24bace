"""PTX's types as NumPy's, and the formats that NumPy does not have.

Registers hold bits: unsigned integers, and bools in predicates. An instruction reads them as the type that it names.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray  # of one element for all lanes, or of one per lane

UNSIGNED = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
TYPES = {
    **{f"{sign}{bits}": kind for bits, kind in UNSIGNED.items() for sign in "bu"},
    "s8": np.int8,
    "s16": np.int16,
    "s32": np.int32,
    "s64": np.int64,
    "f32": np.float32,
    "pred": np.bool_,
}
TF32 = np.uint32(0xFFFFE000)  # the bits that matrix units read
_HALF = np.uint64(0x10000000)  # of the last place of fp32, in the bits of a double
_BELOW = np.uint64(0x1FFFFFFF)  # the bits of a double that fp32 has not
_SMALLEST = float(np.finfo(np.float32).tiny)


def bits_of(kind: str) -> int:
    """How many bits a type has."""
    return 1 if kind == "pred" else int(kind.lstrip("bfsu"))


def from_bf16(bits: Array) -> Array:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def from_f16(bits: Array) -> Array:
    return bits.view(np.float16).astype(np.float32)


def to_bf16(values: Array) -> Array:
    """Of fp32, rounded to nearest, ties to even; NaN becomes 0x7FFF."""
    bits = values.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(values), np.uint32(0x7FFF), rounded).astype(np.uint16)


def to_f16(values: Array) -> Array:
    """Of fp32, rounded to nearest, ties to even; NaN becomes 0x7FFF."""
    return np.where(np.isnan(values), np.uint16(0x7FFF), values.astype(np.float16).view(np.uint16))


def to_tf32(values: Array) -> Array:
    """Of fp32, rounded to nearest, ties away from zero; NaN becomes 0x7FFFFFFF."""
    rounded = (values.view(np.uint32) + np.uint32(0x1000)) & TF32
    return np.where(np.isnan(values), np.uint32(0x7FFFFFFF), rounded)


def fused(x: Array, y: Array, z: Array) -> Array:
    """``x y + z`` of fp32, rounded once.

    The product is exact in a double. The sum is rounded there first. That matters only where it lies half-way between
    two numbers of fp32 then; there, what was lost decides.
    """
    product, addend = x.astype(np.float64) * y, z.astype(np.float64)
    total = product + addend
    tie = (total.view(np.uint64) & _BELOW) == _HALF
    tie |= (np.abs(total) < _SMALLEST) & (total != 0)
    return (to_odd(total, loss(total, product, addend)) if tie.any() else total).astype(np.float32)


def loss(total: Array, x: Array, y: Array) -> Array:
    """What the rounding took off ``total = x + y``, all of them doubles."""
    part = total - x
    return (x - (total - part)) + (y - part)


def to_odd(total: Array, lost: Array) -> Array:
    """The number with an odd last bit next to ``total + lost``, if that is no number of the type of ``total``.

    A second rounding, to a type with fewer bits, is then as if the first was none.
    """
    bits, one = total.view(UNSIGNED[8 * total.itemsize]), UNSIGNED[8 * total.itemsize](1)
    away = (lost < 0) == np.signbit(total)
    moved = np.where(away, bits + one, bits - one).view(total.dtype)
    return np.where((lost != 0) & np.isfinite(total) & (bits & one == 0), moved, total)


FROM = {"bf16": from_bf16, "f16": from_f16, "tf32": lambda bits: (bits & TF32).view(np.float32)}
TO = {"bf16": to_bf16, "f16": to_f16}
