"""How each term acts on a tile of the weight, its factors and their strides: what the kernels are told about it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from .problem import CONSTANT, Problem
from .problem import LOW_RANK as A_LOW_RANK
from .problem import NONE as ABSENT

# The form of a term on a tile of the weight; see _triton/tile.py. EITHER is ROW or LOW_RANK, as the rank says.
NONE, ROW, COLUMN, LOW_RANK, ADDED, EITHER = range(6)
SMALLEST_RANK = 16  # matrix units take no smaller inner dimension; the rest is masked


@dataclass(frozen=True)
class Operand:
    """A term as a tile sees it, ``left @ right`` or a vector over its rows or columns.

    Attributes:
        form: ROW, COLUMN, LOW_RANK or ADDED.
        left: the slot of the left factor (rows, rank), or of one value per row.
        right: the slot of the right factor (rank, columns), or of one value per column.
        left_row, left_rank, right_rank, right_column: strides; 0 repeats a constant.
        rank: how many ranks are read: 1 of a vector or constant, 0 of an absent term.
        dtype: the type in which the factors meet.
    """

    form: int
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
    def absent(self) -> bool:
        return not self.rank

    @property
    def low(self) -> bool:
        """Whether there are factors."""
        return self.form in (LOW_RANK, ADDED)

    @property
    def transposed(self) -> Operand:
        """The same term for the transposed weight."""
        if self.absent:
            return self
        form = {ROW: COLUMN, COLUMN: ROW}.get(self.form, self.form)
        left_strides, right_strides = (self.right_column, self.right_rank), (self.left_rank, self.left_row)
        return Operand(form, self.right, self.left, *left_strides, *right_strides, self.rank, self.dtype)


def padded_rank(rank: int) -> int:
    return max(SMALLEST_RANK, 1 << (rank - 1).bit_length() if rank else 0)


def absent(problem: Problem) -> Operand:
    """A term that is not there or not needed: one value per row, of which none is read, by the build of a vector."""
    return Operand(ROW, stand_in(problem), dtype=problem.wide)


def stand_in(problem: Problem) -> str | None:
    """The slot that is passed in place of an absent storage: not read, but of the type that the builds are made for."""
    return next(iter(problem.storages), None)


def operand(problem: Problem, slot: str) -> Operand:
    """A or B as it acts on the weight (N, K); V = W0 Ad is in the slot ``projected``."""
    part, wide, names = problem.part(slot), problem.wide, problem.names(slot)
    if part.kind == ABSENT:
        return absent(problem)
    first = part.storages[0]
    if part.kind != A_LOW_RANK:
        rows = Operand(ROW, names[0], left_row=_stride(problem, slot), rank=1, dtype=wide)
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
        cu: the slot of Cu, or a stand-in where C is a vector.
        rank: how many ranks of C are read: 0 of a vector.
        bias: the slot of b0, or None.
        d, e: the slots of D and E, or stand-ins: ``has_d`` and ``has_e`` tell. D needs a bias to scale.
        stride_c, stride_d, stride_e: from one row of a storage to the next; 0 repeats a constant.
    """

    c_form: int = NONE
    c: str | None = None
    cu: str | None = None
    stride_c: int = 0
    rank: int = 0
    bias: str | None = None
    d: str | None = None
    has_d: bool = False
    stride_d: int = 0
    e: str | None = None
    has_e: bool = False
    stride_e: int = 0


def no_bias(problem: Problem) -> BiasOperands:
    """Where no b_eff is formed."""
    other = stand_in(problem)
    return BiasOperands(d=other, e=other)


def prompt_operands(problem: Problem) -> BiasOperands:
    """The operands of C alone."""
    part, names, found = problem.part("C"), problem.names("C"), no_bias(problem)
    if part.kind == ABSENT:
        return found
    form, cu = (LOW_RANK, names[1]) if part.kind == A_LOW_RANK else (ROW, stand_in(problem))
    return replace(found, c_form=form, c=names[0], cu=cu, stride_c=part.storages[0].row, rank=part.rank)


def bias_operands(problem: Problem) -> BiasOperands:
    """The operands of b_eff."""
    found = prompt_operands(problem)
    if problem.bias is not None:
        found = replace(found, bias="bias")
        if problem.has("D"):
            found = replace(found, d=problem.names("D")[0], has_d=True, stride_d=_stride(problem, "D"))
    if problem.has("E"):
        found = replace(found, e=problem.names("E")[0], has_e=True, stride_e=_stride(problem, "E"))
    return found


def _stride(problem: Problem, slot: str) -> int:
    """From one value of a vector to the next; 0 repeats a constant."""
    return 0 if problem.kind(slot) == CONSTANT else problem.part(slot).storages[0].row
