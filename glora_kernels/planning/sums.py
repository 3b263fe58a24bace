"""Partial sums: where the kernels of a backward pass leave them in one buffer, and which gradients they add up to."""

from __future__ import annotations

import math
from typing import NamedTuple

from .steps import BLOCKS, NOTHING, Amount, Size

ALIGN = 16  # elements: every part of a buffer begins at a multiple of 64 bytes
FINISH_BLOCK = 256
PLAIN, TIMES_BIAS, TIMES_UP, SOLVED = range(4)  # what happens to a sum: see _triton/kernels/finish.py


class Slices(NamedTuple):
    """``number`` slices of ``size`` elements each; the first begins at element ``at`` of the buffer."""

    at: Amount
    number: Size
    size: int


NO_SLICES = Slices(NOTHING, 0, 0)
UNWANTED = -1  # the place of a sum that nobody reads: kernels do not form it


class Partials:
    """The layout of one buffer for all partial sums. Sums over blocks of tokens are reserved first."""

    def __init__(self) -> None:
        self.size = NOTHING
        self.parts: dict[str, Slices] = {}

    def reserve(self, name: str, number: Size, size: int) -> None:
        at = self.size
        if number == BLOCKS:
            assert not at.fixed, "sums over tokens are reserved first: then the others begin at one place after them"
            self.size = Amount(0, at.per_block + aligned(size))
        else:
            assert isinstance(number, int)
            self.size = at._replace(fixed=at.fixed + aligned(number * size))
        self.parts[name] = Slices(at, number, size)

    def __contains__(self, name: str) -> bool:
        return name in self.parts

    def of(self, name: str) -> Slices:
        return self.parts.get(name, NO_SLICES)

    def at(self, name: str) -> Size:
        return self.parts[name].at if name in self.parts else UNWANTED


def aligned(size: int) -> int:
    return -(-size // ALIGN) * ALIGN


class GradientJob(NamedTuple):
    """One gradient: the size of its storage, and how its elements are found in the slices (see kernels/finish.py)."""

    size: int  # elements of the storage
    inner: int  # columns of the storage
    up: bool  # whether it is a right factor (R, columns): c is then the column, j the rank
    slices: Slices  # the partial sums that are added up
    width: int  # elements of a slice from c to c + 1
    rank: int  # how many j are read; the rest of the gradient is zero
    rows: int  # how many c are read: ``count`` in _triton/kernels/finish.py
    rule: int = PLAIN  # what happens to a sum


def left_job(
    shape: tuple[int, ...], slices: Slices, rank: int, rule: int = PLAIN, width: int | None = None
) -> GradientJob:
    """A left factor or a vector: each row of the storage reads one row of the slices."""
    rows, inner = shape[0], shape[1] if len(shape) == 2 else 1
    return GradientJob(rows * inner, inner, False, slices, rank if width is None else width, rank, rows, rule)


def right_job(shape: tuple[int, ...], slices: Slices, rank: int) -> GradientJob:
    """A right factor, (R, columns), from slices of (columns, rank)."""
    return GradientJob(shape[0] * shape[1], shape[1], True, slices, rank, rank, shape[1])


def constant_job(shape: tuple[int, ...], slices: Slices) -> GradientJob:
    """A constant: slices of one number, for its first element."""
    elements = math.prod(shape)
    return GradientJob(elements, elements, False, slices, 1, 1, 1)


def targets(jobs: tuple[GradientJob, ...]) -> tuple[list[int], int]:
    """Where each gradient begins in the common buffer, and the size of that buffer."""
    starts, size = [], 0
    for job in jobs:
        starts.append(size)
        size += aligned(job.size)
    return starts, size


def rows_of(jobs: tuple[GradientJob, ...]) -> tuple[tuple[int, ...], ...]:
    """The table of ``finish``, one row per gradient: plain numbers, the same for every number of tokens.

    The number of slices is -1 where there is one per block of tokens; the last column says how far each block of tokens
    moves the first slice.
    """
    rows, first = [], 0
    for job, target in zip(jobs, targets(jobs)[0]):
        at, number, size = job.slices
        slices = number if isinstance(number, int) else -1
        layout = (target, job.size, job.inner, int(job.up), job.width, job.rank, job.rows, job.rule)
        rows.append((first, at.fixed, slices, size, *layout, at.per_block))
        first += blocks_of(job)
    return tuple(rows)


def blocks_of(job: GradientJob) -> int:
    """How many programs of ``finish`` make the gradient."""
    return -(-job.size // FINISH_BLOCK)
