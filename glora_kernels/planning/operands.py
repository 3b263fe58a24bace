"""How each term acts on a tile of the weight, its factors and their strides: what the kernels are told about it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .problem import CONSTANT, Problem
from .problem import LOW_RANK as A_LOW_RANK
from .problem import NONE as ABSENT

# The form of a term on a tile of the weight; see _triton/tile.py.
NONE, ROW, COLUMN, LOW_RANK, ADDED = range(5)
SMALLEST_RANK = 16  # matrix units take no smaller inner dimension; the rest is masked


@dataclass(frozen=True)
class Operand:
    """A term as a tile sees it, ``left @ right`` or a vector over its rows or columns.

    Attributes:
        form: NONE, ROW, COLUMN, LOW_RANK or ADDED.
        left: the slot of the left factor (rows, rank), or of one value per row.
        right: the slot of the right factor (rank, columns), or of one value per column.
        left_row, left_rank, right_rank, right_column: strides; 0 repeats a constant.
        rank: how many ranks are read.
        dtype: the type in which the factors meet.
    """

    form: int = NONE
    left: str | None = None
    right: str | None = None
    left_row: int = 0
    left_rank: int = 0
    right_rank: int = 0
    right_column: int = 0
    rank: int = 0
    dtype: torch.dtype = torch.float32

    @property
    def block_rank(self) -> int:
        return padded_rank(self.rank)

    @property
    def transposed(self) -> Operand:
        """The same term for the transposed weight."""
        form = {ROW: COLUMN, COLUMN: ROW}.get(self.form, self.form)
        left_strides, right_strides = (self.right_column, self.right_rank), (self.left_rank, self.left_row)
        return Operand(form, self.right, self.left, *left_strides, *right_strides, self.rank, self.dtype)


def padded_rank(rank: int) -> int:
    return max(SMALLEST_RANK, 1 << (rank - 1).bit_length() if rank else 0)


def operand(problem: Problem, slot: str) -> Operand:
    """A or B as it acts on the weight (N, K); V = W0 Ad is in the slot ``projected``."""
    part, wide, names = problem.part(slot), problem.wide, problem.names(slot)
    if part.kind == ABSENT:
        return Operand()
    first = part.storages[0]
    if part.kind != A_LOW_RANK:
        rows = Operand(ROW, names[0], None, 0 if part.kind == CONSTANT else first.row, dtype=wide)
        return rows.transposed if slot == "A" and problem.product == "matmul" else rows
    up = part.storages[1]
    if slot == "A" and problem.projects:
        return Operand(ADDED, "projected", names[1], part.rank, 1, up.row, 1, part.rank, wide)
    # Products of factors of one half type are exact in fp32; other factors meet in the type of sums.
    half = first.dtype == up.dtype and first.dtype.itemsize == 2 and wide == torch.float32
    return Operand(LOW_RANK, names[0], names[1], first.row, 1, up.row, 1, part.rank, first.dtype if half else wide)


@dataclass(frozen=True)
class BiasOperands:
    """C, D, E and b0, in the form that the kernels for b_eff take.

    Attributes:
        c: the slot of c or Cd; ``c_form`` is NONE, ROW (one value per input) or LOW_RANK.
        cu: the slot of Cu, where C is a low rank of ``rank``.
        d, e, bias: slots; None where there is no such term. D has none without a bias.
        stride_c, stride_d, stride_e: from one row of a storage to the next; 0 repeats a constant.
    """

    c_form: int = NONE
    c: str | None = None
    cu: str | None = None
    d: str | None = None
    e: str | None = None
    bias: str | None = None
    stride_c: int = 0
    stride_d: int = 0
    stride_e: int = 0
    rank: int = 0


def prompt_operands(problem: Problem) -> BiasOperands:
    """The operands of C alone."""
    part, names = problem.part("C"), problem.names("C")
    if part.kind == ABSENT:
        return BiasOperands()
    stride = part.storages[0].row
    if part.kind == A_LOW_RANK:
        return BiasOperands(LOW_RANK, names[0], names[1], stride_c=stride, rank=part.rank)
    return BiasOperands(ROW, names[0], stride_c=stride)


def bias_operands(problem: Problem) -> BiasOperands:
    c, bias = prompt_operands(problem), None if problem.bias is None else "bias"
    d, stride_d = _values(problem, "D") if bias is not None else (None, 0)
    e, stride_e = _values(problem, "E")
    return BiasOperands(c.c_form, c.c, c.cu, d, e, bias, c.stride_c, stride_d, stride_e, c.rank)


def _values(problem: Problem, slot: str) -> tuple[str | None, int]:
    part = problem.part(slot)
    if part.kind == ABSENT:
        return None, 0
    return problem.names(slot)[0], 0 if part.kind == CONSTANT else part.storages[0].row
