"""Layer calls as plain data: every path of a supernet, on layers of given shapes, without a tensor."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch

from ..path_encoding import PLACES
from ..precision import tf32_allowed
from ..terms import SLOTS
from .operands import padded_rank
from .prediction import strategy_for
from .problem import ABSENT, KINDS, LOW_RANK, NONE, Part, Problem, Stored, keeps_output
from .schedule import Call, backward, forward
from .steps import Schedule

Path = tuple[tuple[str, int], ...]  # kind and rank of A to E; rank 0 where the kind has none

_LARGE = 256  # from here on a size matters by whether it is a multiple of 16


class Layer(NamedTuple):
    """A linear layer: N, K, and whether it has a bias."""

    outputs: int
    inputs: int
    bias: bool = True


class Case(NamedTuple):
    """One call of a layer on one path.

    Attributes:
        rank: of the storages of low ranks, of which paths read a part.
        dtype: of W0, x and dy.
        factors: of the storages.
        wants_x: whether x wants a gradient; every term does.
        keeps_output: whether y is kept where da can be solved from it.
    """

    layer: Layer
    path: Path
    rank: int
    product: str
    dtype: torch.dtype
    factors: torch.dtype
    tokens: int
    strategy: str
    wants_x: bool
    keeps_output: bool
    architecture: str

    @property
    def problem(self) -> Problem:
        """For contiguous operands, under torch's present setting for fp32 products."""
        (outputs, inputs, bias), dtype = self.layer, self.dtype
        return Problem(
            outputs,
            inputs,
            tuple(self._part(slot, *kind) for slot, kind in zip(SLOTS, self.path)),  # type: ignore[arg-type]
            self.product,
            dtype,
            (inputs, 1),
            True,
            Stored((outputs,), dtype, True) if bias else None,
            frozenset(slot for slot, (kind, _) in zip(SLOTS, self.path) if kind != NONE),
            self.wants_x,
            dtype == torch.float32 and self.architecture[0] != "g" and tf32_allowed(),
            self.architecture,
        )

    @property
    def schedules(self) -> tuple[Schedule, Schedule]:
        """Forward and backward."""
        problem = self.problem
        output = self.keeps_output and keeps_output(problem, self.tokens)
        call = Call.of(problem, self.strategy, self.tokens, output=output)
        return forward(problem, call), backward(problem, call)

    def _part(self, slot: str, kind: str, rank: int) -> Part:
        if kind == NONE:
            return ABSENT
        outputs, inputs, _ = self.layer
        rows = inputs if slot == "C" or (slot == "A" and self.product == "matmul") else outputs
        shapes = (rows, self.rank), (self.rank, 1 if slot == "C" else inputs)
        if len(PLACES[slot]) == 1:
            shapes = (rows,), ()  # type: ignore[assignment]
        stored = tuple(Stored(shape, self.factors, True) for shape in shapes)
        return Part(kind, rank, stored if kind == LOW_RANK else stored[:1])

    @property
    def representative(self) -> Case:
        """A case with the same builds, the same one for all that are alike.

        Triton asks of a number whether it is 1, a multiple of 16, or too large for 32 bits. The planner asks of a rank
        what it is padded to, if at all, and of a size whether it is small.
        """
        outputs, inputs, bias = self.layer
        # At least every offset, and the elements of all partial sums: a block has 16 rows or more.
        largest = (self.tokens + outputs + 512) * (outputs + inputs) * max(2, self.rank) // 2
        if largest >= 2**31:
            return self
        path = tuple([(kind, _smallest_alike(rank) if rank else 0) for kind, rank in self.path])
        return self._replace(layer=Layer(_size_alike(outputs), _size_alike(inputs), bias), path=path)

    def __str__(self) -> str:
        outputs, inputs, bias = self.layer
        path = " ".join(f"{slot}={kind}{f' {rank}' if rank else ''}" for slot, (kind, rank) in zip(SLOTS, self.path))
        types = f"{str(self.dtype)[6:]}/{str(self.factors)[6:]}"
        flags = {" without bias": bias, " without dx": self.wants_x, " without y": self.keeps_output}
        call = f"{outputs}x{inputs} R={self.rank} M={self.tokens} {self.strategy}"
        return f"{self.product} {path} {types} {call}" + "".join(text for text, there in flags.items() if not there)


def _size_alike(size: int) -> int:
    return size if size < _LARGE else _LARGE + (size % 16 > 0)


@lru_cache
def _smallest_alike(rank: int) -> int:
    def asked(rank: int) -> tuple[int, bool, bool, bool]:
        padded = padded_rank(rank)
        return padded, rank == padded, rank == 1, rank % 16 == 0

    return next(other for other in range(1, rank + 1) if asked(other) == asked(rank))


def paths(ranks: Sequence[int]) -> Iterator[Path]:
    """Every path with low ranks of these ranks."""

    def choices(slot: str) -> Iterator[tuple[str, int]]:
        for kind in KINDS[slot]:
            yield from ((kind, rank) for rank in (ranks if kind == LOW_RANK else (0,)))

    return itertools.product(*map(choices, SLOTS))


def cases(
    calls: Iterable[tuple[Layer, int]],
    taken: Iterable[Path],
    strategies: Sequence[str] | None,
    *,
    rank: int,
    product: str,
    dtype: torch.dtype,
    factors: torch.dtype,
    architecture: str,
    wants_x: Sequence[bool] = (True,),
    keeps_output: Sequence[bool] = (True,),
) -> Iterator[Case]:
    """Calls of layers with so many tokens on every path that is taken.

    Args:
        strategies: None for the one that is predicted to be faster.
    """
    for (layer, tokens), path in itertools.product(calls, list(taken)):
        case = Case(layer, path, rank, product, dtype, factors, tokens, "", True, True, architecture)
        taken_strategies = strategies or (strategy_for(case.problem, tokens),)
        for strategy, wants, keeps in itertools.product(taken_strategies, wants_x, keeps_output):
            yield case._replace(strategy=strategy, wants_x=wants, keeps_output=keeps)
