"""The gradients that ``finish`` is to make, and the partial sums that each is made of."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from .run import ALIGN, Slices

FINISH_BLOCK = 256
PLAIN, TIMES_BIAS, TIMES_UP, SOLVED = range(4)  # what happens to a sum: see kernels/finish.py
TABLES = 1 << 16  # how many are kept; each takes less than a kilobyte
_captured: list[tuple[Tensor, Tensor]] = []


class GradientJob(NamedTuple):
    """One gradient: the size of its storage, and how its elements are found in the slices (see kernels/finish.py)."""

    size: int  # elements of the storage
    inner: int  # columns of the storage
    up: bool  # whether it is a right factor (R, columns): c is then the column, j the rank
    slices: Slices  # the partial sums that are added up
    width: int  # elements of a slice from c to c + 1
    rank: int  # how many j are read; the rest of the gradient is zero
    rows: int  # how many c are read: ``count`` in kernels/finish.py
    rule: int = PLAIN  # what happens to a sum


def left_job(storage: Tensor, slices: Slices, rank: int, rule: int = PLAIN, width: int | None = None) -> GradientJob:
    """A left factor or a vector: each row of the storage reads one row of the slices."""
    inner = storage.shape[1] if storage.dim() == 2 else 1
    width = rank if width is None else width
    return GradientJob(storage.numel(), inner, False, slices, width, rank, storage.shape[0], rule)


def right_job(storage: Tensor, slices: Slices, rank: int) -> GradientJob:
    """A right factor, (R, columns), from slices of (columns, rank)."""
    return GradientJob(storage.numel(), storage.shape[1], True, slices, rank, rank, storage.shape[1])


def constant_job(storage: Tensor, slices: Slices) -> GradientJob:
    """A constant: slices of one number, for its first element."""
    return GradientJob(storage.numel(), storage.numel(), False, slices, 1, 1, 1)


def targets(jobs: tuple[GradientJob, ...]) -> tuple[list[int], int]:
    """Where each gradient begins in the common buffer, and the size of that buffer."""
    starts, size = [], 0
    for job in jobs:
        starts.append(size)
        size += -(-job.size // ALIGN) * ALIGN
    return starts, size


def blocks(jobs: tuple[GradientJob, ...]) -> int:
    return sum(-(-job.size // FINISH_BLOCK) for job in jobs)


@lru_cache(maxsize=TABLES)
def table(jobs: tuple[GradientJob, ...], device: torch.device) -> Tensor:
    """The jobs as a table on the device. Tables are small, and they are kept, since the same paths come again.

    A table is copied from pinned memory: the host then need not wait, and a capture does not fail. A table that a
    captured graph reads is kept for good.
    """
    rows, first = [], 0
    for job, target in zip(jobs, targets(jobs)[0]):
        where = (first, job.slices.at, job.slices.number, job.slices.size, target)
        rows.append([*where, job.size, job.inner, int(job.up), job.width, job.rank, job.rows, job.rule])
        first += -(-job.size // FINISH_BLOCK)
    if device.type != "cuda":
        return torch.tensor(rows, dtype=torch.int64, device=device)
    host = torch.tensor(rows, dtype=torch.int64).pin_memory()
    copy = host.to(device, non_blocking=True)
    if torch.cuda.is_current_stream_capturing():
        _captured.append((host, copy))
    return copy
