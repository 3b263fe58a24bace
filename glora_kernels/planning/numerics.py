"""Types and precisions of a call, and the type of its offsets."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..terms import compute_dtype

LARGEST_BLOCK = 512  # offsets are formed for whole blocks, also beyond the edge of a matrix


class Numerics(NamedTuple):
    """Types and precisions of one call; the numerical contract (docs/numerics.md) decides them.

    Attributes:
        wide: the type of sums and effective weights.
        factors: the precision at which fp32 factors meet: close to fp32; in half layers at the speed of matrix units.
        stream: the precision of products with x and dy; it matters in fp32 only.
        rough: the precision of numbers that are only compared in size.
        contract, contract_precision: type and precision in which dW meets the factors. bf16 layers use bf16, which has
            the range of fp32. fp16 layers use fp32 at ``rough``: dW * W0 in fp16 could overflow, TF32 rounds alike.
    """

    wide: torch.dtype
    factors: str
    rough: str
    stream: str
    contract: torch.dtype
    contract_precision: str


def numerics(dtype: torch.dtype, architecture: str, tf32: bool) -> Numerics:
    """The numerics of a layer of ``dtype``; ``tf32`` says whether fp32 products use TF32."""
    wide, hip = compute_dtype(dtype), architecture.startswith("gfx")
    rough = "ieee" if hip else "tf32"
    if dtype.itemsize > 2:
        stream = "tf32" if tf32 else "ieee"
        return Numerics(wide, "ieee", rough, stream, wide, stream)
    factors = "ieee" if hip else "tf32x3"
    if dtype == torch.bfloat16:
        return Numerics(wide, factors, rough, "ieee", torch.bfloat16, "ieee")
    return Numerics(wide, factors, rough, "ieee", wide, rough)


def index_type(tokens: int, *matrices: tuple[tuple[int, ...], tuple[int, ...]]) -> torch.dtype:
    """int64 if an offset into a matrix or into a (tokens, N or K) result could pass 2^31, else int32.

    Args:
        matrices: shape and strides of each matrix; the first is that of the weight, (N, K).
    """
    largest = (tokens + LARGEST_BLOCK) * max(matrices[0][0])
    for (rows, columns), (row, column) in matrices:
        largest = max(largest, (rows + LARGEST_BLOCK) * row + (columns + LARGEST_BLOCK) * column)
    return torch.int64 if largest >= 2**31 else torch.int32
