"""What the kernels are told about a term: how it acts on a tile of the weight, its factors and their strides."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton.language as tl
from torch import Tensor

from ..terms import Constant, LowRank, Term, Terms, Vector, compute_dtype
from . import tile as forms

NONE, ROW, COLUMN, LOW_RANK, ADDED = (
    k.value for k in (forms.NONE, forms.ROW, forms.COLUMN, forms.LOW_RANK, forms.ADDED)
)
TYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32, torch.float64: tl.float64}
SMALLEST_RANK = 16  # matrix units take no smaller inner dimension; the rest is masked


@dataclass(frozen=True, eq=False)
class Operand:
    """A term as a tile sees it, ``left @ right`` or a vector over its rows or columns.

    Attributes:
        form: NONE, ROW, COLUMN, LOW_RANK or ADDED.
        left: (rows, rank), or one value per row.
        right: (rank, columns), or one value per column.
        left_row, left_rank, right_rank, right_column: strides; 0 repeats a constant.
        rank: how many ranks are read.
        dtype: the type in which the factors meet.
    """

    form: int = NONE
    left: Tensor | None = None
    right: Tensor | None = None
    left_row: int = 0
    left_rank: int = 0
    right_rank: int = 0
    right_column: int = 0
    rank: int = 0
    dtype: tl.dtype = tl.float32

    @property
    def block_rank(self) -> int:
        return padded_rank(self.rank)

    @property
    def transposed(self) -> Operand:
        """The same term for the transposed weight."""
        form = {ROW: COLUMN, COLUMN: ROW}.get(self.form, self.form)
        left_strides, right_strides = (self.right_column, self.right_rank), (self.left_rank, self.left_row)
        return Operand(form, self.right, self.left, *left_strides, *right_strides, self.rank, self.dtype)


def cdiv(size: int, block: int) -> int:
    """How many blocks cover ``size``; ``triton.cdiv`` takes two microseconds for it."""
    return -(-size // block)


def padded_rank(rank: int) -> int:
    return max(SMALLEST_RANK, 1 << (rank - 1).bit_length() if rank else 0)


def dense(tensor: Tensor) -> Tensor:
    """The storage itself, or a contiguous copy: the kernels read rows of unit stride."""
    return tensor if tensor.is_contiguous() else tensor.contiguous()


def row_stride(storage: Tensor) -> int:
    """The stride from one row to the next of a contiguous storage of one or two dimensions."""
    return storage.shape[1] if storage.dim() == 2 else 1


def a_operand(terms: Terms, projected: Tensor | None, dtype: torch.dtype) -> Operand:
    """A as it acts on the weight (N, K); ``projected`` is V = W0 Ad where A is a low rank of the matmul product."""
    if terms.A is None:
        return Operand(NONE)
    if isinstance(terms.A, LowRank) and terms.product == "matmul":
        wide = TYPES[compute_dtype(dtype)]
        up, rank = dense(terms.A.up), terms.A.read_rank
        return Operand(ADDED, projected, up, rank, 1, up.shape[1], 1, rank, wide)
    operand = _operand(terms.A, dtype)
    return operand.transposed if terms.product == "matmul" and operand.form == ROW else operand


def b_operand(terms: Terms, dtype: torch.dtype) -> Operand:
    return Operand(NONE) if terms.B is None else _operand(terms.B, dtype)


def _operand(term: Term, dtype: torch.dtype) -> Operand:
    wide = TYPES[compute_dtype(dtype)]
    if isinstance(term, LowRank):
        down, up = dense(term.down), dense(term.up)
        rank = term.read_rank
        return Operand(LOW_RANK, down, up, down.shape[1], 1, up.shape[1], 1, rank, _factor_type(down, up, wide))
    value = dense(term.value)
    return Operand(ROW, value, None, 0 if isinstance(term, Constant) else row_stride(value), dtype=wide)


def _factor_type(down: Tensor, up: Tensor, wide: tl.dtype) -> tl.dtype:
    """The half type of both factors, whose products are exact in fp32; other factors meet in the compute type."""
    half = down.dtype == up.dtype and down.dtype.itemsize == 2
    return TYPES[down.dtype] if half and wide == tl.float32 else wide


@dataclass(frozen=True, eq=False)
class BiasOperands:
    """C, D, E and b0, in the form that the kernels for b_eff take.

    Attributes:
        c: the storage of C; ``c_form`` is NONE, ROW (one value per input) or LOW_RANK.
        cu: the right factor of C, where C is a low rank of ``rank``.
        d, e, bias: None where there is no such term; d also where there is no bias.
        stride_c, stride_d, stride_e: from one row of a storage to the next; 0 repeats a constant.
    """

    c_form: int = NONE
    c: Tensor | None = None
    cu: Tensor | None = None
    d: Tensor | None = None
    e: Tensor | None = None
    bias: Tensor | None = None
    stride_c: int = 0
    stride_d: int = 0
    stride_e: int = 0
    rank: int = 0

    @property
    def exists(self) -> bool:
        """Whether there is a b_eff at all."""
        return self.c is not None or self.e is not None or self.bias is not None

    @property
    def adapts(self) -> bool:
        """Whether b_eff differs from b0."""
        return self.c is not None or self.d is not None or self.e is not None


def bias_operands(terms: Terms, bias: Tensor | None) -> BiasOperands:
    d, stride_d = _values(terms.D if bias is not None else None)
    e, stride_e = _values(terms.E)
    rest = d, e, None if bias is None else dense(bias)
    if isinstance(terms.C, LowRank):
        c, cu, rank = dense(terms.C.down), dense(terms.C.up), terms.C.read_rank
        return BiasOperands(LOW_RANK, c, cu, *rest, row_stride(c), stride_d, stride_e, rank)
    vector, stride_c = _values(terms.C)
    return BiasOperands(NONE if vector is None else ROW, vector, None, *rest, stride_c, stride_d, stride_e)


def _values(term: Vector | Constant | None) -> tuple[Tensor | None, int]:
    if term is None:
        return None, 0
    value = dense(term.value)
    return value, 0 if isinstance(term, Constant) else row_stride(value)
