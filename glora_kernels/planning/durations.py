"""The predicted time of a launch on a machine, in seconds."""

from __future__ import annotations

import math

from .machines import Machine
from .prices import BLAS, FUSED, PASS, PricedLaunch
from .problem import Problem

# Shares of the vendor's rate; [E] is an estimate, as in machines.py.
SINGLE_SHARE = 0.5  # products in Triton, in fp32 without TF32 [E]
PASS_SHARE = 0.2  # thin products inside passes, padded to a rank of 16 [E]
# Tiles (rows, columns) and the share of the best rate that they reach: smaller tiles load more for each operation.
# [E] the first four are from a study that is not in this repository.
TILES = ((128, 256, 1.0), (128, 128, 0.92), (64, 128, 0.78), (64, 64, 0.55), (32, 64, 0.35), (16, 64, 0.2))
SPLITS = (1, 2, 4, 8)  # into how many parts the vendor's library splits the sum of a product; our kernels do not split
SHORTEST_SPLIT = 512  # the fewest terms of the sum in one part
DRAW = 2.0  # a processor can draw this many times its even share of the bandwidth [E]


def seconds(launch: PricedLaunch, problem: Problem, machine: Machine) -> float:
    """The predicted time of a launch on the device."""
    rate = _rate(launch.category, problem, machine)
    bandwidth = machine.cache_bandwidth if launch.bytes < machine.cache else machine.bandwidth
    if launch.shape is None:
        return machine.overhead + max(launch.flops / rate, launch.bytes / bandwidth)
    return machine.overhead + _product_seconds(launch, machine, rate, bandwidth)


def _rate(category: str, problem: Problem, machine: Machine) -> float:
    """FLOP/s of a launch of full tiles on all processors."""
    half = problem.element == 2 or problem.tf32
    vendor = machine.half / (1 + problem.tf32) if half else machine.single * 4 / problem.element
    if category in (BLAS, PASS):
        return vendor * (PASS_SHARE if category == PASS else 1.0)
    return vendor * ((machine.assembled if category == FUSED else machine.triton) if half else SINGLE_SHARE)


def _product_seconds(launch: PricedLaunch, machine: Machine, rate: float, bandwidth: float) -> float:
    """The shortest time over a few tile sizes.

    Tiles run in waves over the processors. If the last wave is not full, half of what it leaves idle counts, since the
    real tiles are not known here. The time is the longer of two: the arithmetic, and the bytes that the processors at
    work can draw from memory. The vendor's library may split the sum; it then adds up parts in fp32.
    """
    rows, columns, depth = launch.shape or (0, 0, 0)
    short, long = (rows, columns) if rows < columns else (columns, rows)
    memory, parts = launch.bytes / bandwidth, rows * columns * 4 / machine.cache_bandwidth
    allowed = [
        splits for splits in SPLITS if splits == 1 or (launch.category == BLAS and depth >= splits * SHORTEST_SPLIT)
    ]
    best = math.inf
    for tile_rows, tile_columns, share in TILES:
        tiles = -(-short // tile_rows) * -(-long // tile_columns)
        one = 2 * tile_rows * tile_columns * depth * machine.processors / (rate * share)
        for splits in allowed:
            load = tiles * splits / machine.processors
            computing = one / splits * ((load + math.ceil(load)) / 2 if load > 1 else 1.0)
            drawing = memory / (DRAW * load) if DRAW * load < 1 else memory
            merging = machine.overhead + splits * parts if splits > 1 else 0.0
            best = min(best, (computing if computing > drawing else drawing) + merging)
    return best
