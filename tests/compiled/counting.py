"""Counters for a launch: instructions by class, sectors of global memory, waves of shared memory, beside the fewest.

- A request is one instruction of one warp.
- A **sector** is 32 bytes of global memory that begin at a multiple of 32. The fewest for a request are those that its
  distinct bytes would fill.
- A **wave** is one pass of a request to shared memory, which has 32 banks of 4 bytes. Accesses of 4 bytes or less go
  for 32 threads at once, of 8 for 16, of 16 for 8 (so do the rows of ldmatrix); each pass takes one word from each
  bank. The fewest for a request are those that its distinct bytes would fill, at 128 bytes each.

What products of warpgroups (``wgmma``) read is not counted as a request: the hardware reads it by itself.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass

import numpy as np

from .machine.numbers import Array
from .machine.program import Instruction, Program

_FLOATS = ("f16", "f32", "bf16", "f16x2", "bf16x2")
_CLASSES = {
    **dict.fromkeys(("bar", "barrier", "fence"), "order"),
    **dict.fromkeys(("ldmatrix", "stmatrix"), "shared"),
    **dict.fromkeys(("bra", "ret"), "jumps"),
    **dict.fromkeys(("mov", "prmt"), "moves"),
    "cvt": "conversions",
    "shfl": "shuffles",
    "mma": "matrix",
}
CLASSES = (
    "matrix", "float", "integer", "conversions", "moves", "shuffles", "shared", "global", "copies", "order", "jumps"
)  # fmt: skip


def class_of(instruction: Instruction) -> str:
    opcode = instruction.opcode
    if opcode[0] in ("ld", "st"):
        return "global" if "global" in opcode else "shared" if opcode[1].startswith("shared") else "moves"
    if opcode[0] == "wgmma":
        return "matrix" if opcode[1] == "mma_async" else "order"
    if opcode[0] == "cp":
        return "order" if opcode[-1].endswith("_group") else "copies"
    if opcode[0] in _CLASSES:
        return _CLASSES[opcode[0]]
    return "float" if any(part in _FLOATS for part in opcode[1:]) else "integer"


@dataclass
class Requests:
    """Of one instruction, or of several.

    Attributes:
        passes: sectors or waves; ``fewest``: as few as there could be.
        bytes: distinct ones in a request, added up.
    """

    count: int = 0
    passes: int = 0
    fewest: int = 0
    bytes: int = 0

    def add(self, other: Requests) -> None:
        self.count += other.count
        self.passes += other.passes
        self.fewest += other.fewest
        self.bytes += other.bytes

    @property
    def ratio(self) -> float:
        return self.passes / self.fewest if self.fewest else 1.0


class Counters:
    """A :class:`tests.compiled.machine.machine.Watch` of a launch.

    Attributes:
        warps: executions of an instruction by a warp, by its class.
        to_global, to_shared: requests, by instruction.
    """

    def __init__(self, program: Program):
        self._classes = [Counter(map(class_of, block)) for block in program.blocks]
        self.warps: Counter[str] = Counter()
        self.to_global: dict[Instruction, Requests] = defaultdict(Requests)
        self.to_shared: dict[Instruction, Requests] = defaultdict(Requests)

    def visited(self, block: int, warps: int) -> None:
        for name, count in self._classes[block].items():
            self.warps[name] += count * warps

    def global_access(self, lanes: Array, addresses: Array, width: int, instruction: Instruction) -> None:
        self.to_global[instruction].add(sectors(lanes, addresses, width))

    def shared_access(self, lanes: Array, addresses: Array, width: int, instruction: Instruction) -> None:
        self.to_shared[instruction].add(waves(lanes, addresses, width))


def sectors(lanes: Array, addresses: Array, width: int) -> Requests:
    """Of an access of ``width`` bytes by each of the lanes."""
    warps, addresses = lanes // 32, addresses.astype(np.int64)
    distinct = _per_warp(warps, addresses) * width
    touched = _per_warp(warps, addresses // 32)
    return Requests(distinct.size, int(touched.sum()), int((-(-distinct // 32)).sum()), int(distinct.sum()))


def waves(lanes: Array, addresses: Array, width: int) -> Requests:
    """Of an access of ``width`` bytes by each of the lanes."""
    addresses = addresses.astype(np.int64)
    distinct = _per_warp(lanes // 32, addresses) * width
    together = 128 // max(width, 4)
    words = (addresses // 4)[:, None] + np.arange(max(1, width // 4))
    passes = np.broadcast_to((lanes // together)[:, None], words.shape)
    found = np.unique(np.stack([passes.reshape(-1), words.reshape(-1)], axis=1), axis=0)
    banks, counts = np.unique(found[:, 0] * 32 + found[:, 1] % 32, return_counts=True)
    starts = np.flatnonzero(np.diff(banks // 32, prepend=-1))
    most = np.maximum.reduceat(counts, starts)
    return Requests(distinct.size, int(most.sum()), int((-(-distinct // 128)).sum()), int(distinct.sum()))


def _per_warp(warps: Array, values: Array) -> Array:
    """How many distinct values each warp has."""
    found = np.unique(np.stack([warps, values], axis=1), axis=0)
    return np.unique(found[:, 0], return_counts=True)[1]
