"""One backward pass: its operands, and the buffer of partial sums that its kernels share."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from ..backend import BackwardCall
from ..planning.settings import Tile
from ..terms import Terms, compute_dtype
from .context import Context, share_of
from .operands import NONE, BiasOperands, Operand, bias_operands, cdiv

ALIGN = 16  # elements: every part of the buffer begins at a multiple of 64 bytes


class Slices(NamedTuple):
    """``number`` slices of ``size`` elements each; the first begins at element ``at`` of the buffer."""

    at: int
    number: int
    size: int


NO_SLICES = Slices(0, 0, 0)


class Partials:
    """The layout of one buffer for all partial sums: reserve every part first, then allocate."""

    def __init__(self) -> None:
        self.size = 0

    def reserve(self, count: int, size: int) -> Slices:
        at = self.size
        self.size += -(-count * size // ALIGN) * ALIGN
        return Slices(at, count, size)

    def allocate(self, like: Tensor, dtype: torch.dtype) -> Tensor:
        return torch.empty(max(self.size, 1), dtype=dtype, device=like.device)


@dataclass
class BackwardRun:
    """One backward pass: its operands, and the slices of its buffer of partial sums."""

    call: BackwardCall
    strategy: str  # "assemble" or "fused"
    shared: Context  # the architecture, precisions and type of an index of all its launches
    route: str  # thin, projected, scaled, solved or dense: see backward.py
    a: Operand  # A and B as they act on a tile of the weight
    b: Operand
    partials: Partials = field(default_factory=Partials)  # the layout of the buffer
    slices: dict[str, Slices] = field(default_factory=dict)  # by the name of the sum, such as "db"
    buffer: Tensor | None = None  # all partial sums, allocated once every slice is reserved
    lost: Tensor | None = None  # (N,) int32, 1 where a row of da is lost: from the weight pass, on the route solved

    @cached_property
    def prompt(self) -> BiasOperands:
        """The operands of C; D, E and b0 are left out."""
        return bias_operands(Terms(C=self.call.terms.C), None)

    @cached_property
    def token_tile(self) -> Tile:
        return self.shared.tile("token_pass", self.a.rank, self.b.rank)

    @cached_property
    def weight_tile(self) -> Tile:
        return self.shared.tile("weight_pass", self.a.rank, self.b.rank, self.prompt.rank)

    @cached_property
    def contract_tile(self) -> Tile:
        kernel = "gemm_contract" if self.strategy == "fused" or self.route == "solved" else "contract"
        return self.shared.tile(kernel, self.a.rank, self.b.rank, self.prompt.rank)

    @property
    def token_blocks(self) -> int:
        return cdiv(self.call.dy.shape[0], self.token_tile.tokens)

    @property
    def weight_share(self) -> int:
        return share_of(self.call.weight.shape[1], self.weight_tile, self.route in ("projected", "solved"))

    @property
    def wide(self) -> torch.dtype:
        return compute_dtype(self.call.weight.dtype)

    @property
    def contracts_b(self) -> bool:
        """Whether B is contracted with dW: for the gradient of B, or to solve for the gradient of A."""
        return self.wants("B") or (self.route == "solved" and self.b.form != NONE)

    @property
    def sums_bias(self) -> bool:
        return any(map(self.has, ("db", "db_sum", "db_bias")))

    def wants(self, slot: str) -> bool:
        return slot in self.call.wanted

    def has(self, name: str) -> bool:
        return name in self.slices

    def reserve(self, name: str, count: int, size: int) -> None:
        self.slices[name] = self.partials.reserve(count, size)

    def of(self, name: str) -> Slices:
        return self.slices.get(name, NO_SLICES)

    def at(self, name: str) -> int:
        return self.of(name).at


def stride(tensor: Tensor | None, dimension: int) -> int:
    return 0 if tensor is None else tensor.stride(dimension)
