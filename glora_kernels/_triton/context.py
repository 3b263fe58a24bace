"""What all launches of a call share: the tiles of the machine, types and precisions, the type of an index."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from ..planning.settings import Tile, tile_for
from ..precision import tf32_allowed
from ..terms import compute_dtype
from .device import architecture, is_hip
from .operands import TYPES, padded_rank

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

    wide: tl.dtype
    factors: str
    rough: str
    stream: str
    contract: tl.dtype
    contract_precision: str


def numerics(dtype: torch.dtype, hip: bool, tf32: bool) -> Numerics:
    """The numerics of a layer of ``dtype``; ``tf32`` is torch's setting for fp32 products."""
    wide = TYPES[compute_dtype(dtype)]
    rough = "ieee" if hip else "tf32"
    if dtype.itemsize > 2:
        stream = "tf32" if tf32 and dtype == torch.float32 and not hip else "ieee"
        return Numerics(wide, "ieee", rough, stream, wide, stream)
    factors = "ieee" if hip else "tf32x3"
    if dtype == torch.bfloat16:
        return Numerics(wide, factors, rough, "ieee", tl.bfloat16, "ieee")
    return Numerics(wide, factors, rough, "ieee", wide, rough)


def index_type(tokens: int, weight: Tensor, *matrices: Tensor) -> tl.dtype:
    """int64 if an offset into the weight, the matrices or a (tokens, N or K) result could pass 2^31, else int32."""
    largest = (tokens + LARGEST_BLOCK) * max(weight.shape)
    for matrix in (weight, *matrices):
        (rows, columns), (row, column) = matrix.shape, matrix.stride()
        largest = max(largest, (rows + LARGEST_BLOCK) * row + (columns + LARGEST_BLOCK) * column)
    return tl.int64 if largest >= 2**31 else tl.int32


SHARE_BLOCKS = 4  # blocks of columns that a program walks where it need not walk all


class Context(NamedTuple):
    """What all launches of a call share."""

    architecture: str
    numerics: Numerics
    index: tl.dtype
    element: int
    tokens: int

    def tile(self, kernel: str, *ranks: int) -> Tile:
        return tile_for(kernel, self.architecture, self.element, self.tokens, max(padded_rank(r) for r in ranks))


def context(tokens: int, weight: Tensor, *matrices: Tensor) -> Context:
    """``matrices``: the other matrices that the call reads, each with two dimensions."""
    name = architecture(weight.device)
    found = numerics(weight.dtype, is_hip(name), tf32_allowed())
    return Context(name, found, index_type(tokens, weight, *matrices), weight.element_size(), tokens)


def share_of(inputs: int, tile: Tile, whole_rows: bool) -> int:
    """Columns that one program walks: all where rows are summed up, else a few blocks, so as to fill the machine."""
    return inputs if whole_rows else tile.columns * SHARE_BLOCKS
