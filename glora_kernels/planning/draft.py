"""A schedule while it is being written."""

from __future__ import annotations

from typing import Any

import torch

from ..terms import SLOTS
from .numerics import Numerics, numerics
from .operands import padded_rank
from .problem import Problem
from .settings import Tile, tile_for
from .steps import Allocate, Amount, Copy, Launch, Product, Schedule, Size, Step


class Draft:
    """The steps so far, for one problem.

    Args:
        tokens: any number of tokens of the class for which tiles are looked up.
        index: the type of offsets, int32 or int64.
        operands: the slots that the caller fills, in order.
    """

    def __init__(self, problem: Problem, tokens: int, index: torch.dtype, operands: tuple[str, ...]):
        self.problem, self.tokens, self.index = problem, tokens, index
        self.numerics: Numerics = numerics(problem.dtype, problem.architecture, problem.tf32)
        self.steps: list[Step] = []
        self.operands = operands
        stored = [pair for slot in SLOTS for pair in zip(problem.names(slot), problem.part(slot).storages)]
        if problem.bias is not None:
            stored.append(("bias", problem.bias))
        self._awry = {name for name, storage in stored if not storage.in_place}
        if "bias" in self._awry and not problem.adapts_bias:
            self._awry.add("b_eff")  # it is the bias itself
        self.dtypes = dict.fromkeys(operands, problem.dtype) | {name: storage.dtype for name, storage in stored}
        self.dtypes["projected"] = problem.wide
        self.weight_strides = problem.weight_strides
        if not problem.weight_in_place:
            self.steps.append(Copy("weight"))
            self.weight_strides = (problem.inputs, 1)

    def tile(self, kernel: str, *ranks: int) -> Tile:
        p = self.problem
        return tile_for(kernel, p.architecture, p.element, self.tokens, max(map(padded_rank, ranks)))

    def allocate(self, slot: str, *shape: Size, dtype: torch.dtype | None = None) -> str:
        self.dtypes[slot] = self.problem.dtype if dtype is None else dtype
        self.steps.append(Allocate(slot, shape, self.dtypes[slot]))
        return slot

    def launch(self, kernel: str, tile: Tile, programs: int, arguments: dict[str, Any], token_block: int = 0) -> None:
        pointers = {value for name, value in arguments.items() if name.endswith("_ptr")}
        for slot in sorted(pointers & self._awry):
            self.steps.append(Copy(slot))
            self._awry.discard(slot)
        settled = {name: value.settled for name, value in arguments.items() if isinstance(value, Amount)}
        self.steps.append(Launch(kernel, tile, programs, token_block, {**arguments, **settled}))

    def product(
        self, slot: str, form: str, left: str, right: str, shape: tuple[Size, Size, Size], bias: str | None = None
    ) -> str:
        fp16 = form == "weight gradient" and self.problem.dtype == torch.float16
        self.dtypes[slot] = torch.float32 if fp16 else self.problem.dtype
        self.steps.append(Product(slot, form, left, right, bias, shape))
        return slot

    def finished(self, *results: str | None, **rest: Any) -> Schedule:
        return Schedule(self.operands, tuple(self.steps), self.dtypes, results, **rest)
