"""What a layer call is planned from: everything but the values and the number of tokens."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from ..gradient_routes import tokens_to_solve
from ..path_encoding import PLACES, STORAGES
from ..precision import tf32_allowed
from ..terms import KINDS as TERM_KINDS
from ..terms import SLOTS, Constant, LowRank, Structure, Term, Terms, Vector, compute_dtype, rank_of

NONE, CONSTANT, VECTOR, LOW_RANK = "none", "constant", "vector", "low rank"
_KINDS: dict[type, str] = {Constant: CONSTANT, Vector: VECTOR, LowRank: LOW_RANK}
_TYPES = {kind: term for term, kind in _KINDS.items()}
KINDS = {slot: (*(_KINDS[term] for term in terms), NONE) for slot, terms in TERM_KINDS.items()}  # all, by slot


class Stored(NamedTuple):
    """A tensor that the kernels read by rows of unit stride.

    Attributes:
        shape, dtype: its own.
        in_place: whether the kernels can read it where it lies. If not, each call makes a contiguous copy of it.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    in_place: bool

    @staticmethod
    def of(tensor: Tensor) -> Stored:
        return Stored(tuple(tensor.shape), tensor.dtype, tensor.is_contiguous() and not tensor.is_neg())

    @property
    def row(self) -> int:
        """The stride from one row to the next, of one or two dimensions."""
        return self.shape[1] if len(self.shape) == 2 else 1


class Part(NamedTuple):
    """One term: its kind, the rank that is read (0 where the kind has none), and its storages."""

    kind: str
    rank: int
    storages: tuple[Stored, ...]

    @staticmethod
    def of(term: Term | None) -> Part:
        if term is None:
            return ABSENT
        return _shared(Part(_KINDS[type(term)], rank_of(term), tuple([Stored.of(s) for s in term.storages])))


@lru_cache(maxsize=1 << 10)
def _shared(part: Part) -> Part:
    """One object for all that are equal, since plans hold many."""
    return part


ABSENT = Part(NONE, 0, ())


class Problem(NamedTuple):
    """One layer call, apart from its values and its number of tokens.

    Attributes:
        outputs, inputs: N, K.
        parts: the terms A to E.
        product: ``"hadamard"`` or ``"matmul"``.
        dtype: the type of W0, x and dy.
        weight_strides: the strides of W0, (N, K).
        weight_in_place: False for a W0 with a pending negation, which only PyTorch's own operations would see.
        bias: b0, or None.
        wanted: the slots that want a gradient.
        wants_x: whether x wants a gradient.
        tf32: whether fp32 products use TF32.
        architecture: ``sm_90``, ``gfx942`` and the like; ``interpreter`` is treated as an ``sm_90``.
    """

    outputs: int
    inputs: int
    parts: tuple[Part, Part, Part, Part, Part]
    product: str
    dtype: torch.dtype
    weight_strides: tuple[int, ...]
    weight_in_place: bool
    bias: Stored | None
    wanted: frozenset[str]
    wants_x: bool
    tf32: bool
    architecture: str

    @staticmethod
    def of(
        weight: Tensor, bias: Tensor | None, terms: Terms, wanted: frozenset[str], wants_x: bool, architecture: str
    ) -> Problem:
        """The problem of a call with these operands; ``wanted`` without the slots that have no term."""
        outputs, inputs = weight.shape
        return Problem(
            outputs,
            inputs,
            (Part.of(terms.A), Part.of(terms.B), Part.of(terms.C), Part.of(terms.D), Part.of(terms.E)),
            terms.product,
            weight.dtype,
            weight.stride(),
            not weight.is_neg(),
            None if bias is None else Stored.of(bias),
            wanted,
            wants_x,
            weight.dtype == torch.float32 and architecture[0] != "g" and tf32_allowed(),
            architecture,
        )

    @property
    def whole(self) -> Problem:
        """The problem by which a strategy is chosen: with a bias, and with every gradient wanted.

        So a strategy does not depend on what is trained, and forward and backward agree.
        """
        bias = Stored((self.outputs,), self.dtype, True)
        active = frozenset(slot for slot, part in zip(SLOTS, self.parts) if part.kind != NONE)
        return self._replace(bias=bias, wanted=active, wants_x=True)

    def part(self, slot: str) -> Part:
        return self.parts[SLOTS.index(slot)]

    def kind(self, slot: str) -> str:
        return self.part(slot).kind

    def rank(self, slot: str) -> int:
        return self.part(slot).rank

    def has(self, slot: str) -> bool:
        return self.kind(slot) != NONE

    def wants(self, slot: str) -> bool:
        """Whether the slot wants a gradient; without a bias to scale, D has none."""
        return slot in self.wanted and (slot != "D" or self.bias is not None)

    def names(self, slot: str) -> tuple[str, ...]:
        """The names of the storages that are read of a slot."""
        return tuple(STORAGES[place] for place in PLACES[slot][: len(self.part(slot).storages)])

    @property
    def structure(self) -> Structure:
        """What :meth:`Terms.unflatten` needs to put the terms together again."""
        active = ((slot, part) for slot, part in zip(SLOTS, self.parts) if part.kind != NONE)
        slots = tuple((slot, _TYPES[part.kind], part.rank if part.kind == LOW_RANK else None) for slot, part in active)
        return Structure(slots, self.product)

    @property
    def storages(self) -> tuple[str, ...]:
        """The names of all storages that are read, from A to E."""
        return tuple(name for slot in SLOTS for name in self.names(slot))

    @property
    def adapts_weight(self) -> bool:
        return self.has("A") or self.has("B")

    @property
    def adapts_bias(self) -> bool:
        return self.has("C") or self.has("E") or (self.has("D") and self.bias is not None)

    @property
    def has_bias(self) -> bool:
        """Whether there is a b_eff."""
        return self.bias is not None or self.has("C") or self.has("E")

    @property
    def projects(self) -> bool:
        """Whether A is a low rank of the matmul product, so that V = W0 Ad is needed."""
        return self.kind("A") == LOW_RANK and self.product == "matmul"

    @property
    def wide(self) -> torch.dtype:
        """The type of sums and of effective weights before they are rounded."""
        return compute_dtype(self.dtype)

    @property
    def element(self) -> int:
        """Bytes of an element of W0, x and dy."""
        return self.dtype.itemsize

    @property
    def weight_bytes(self) -> int:
        return self.outputs * self.inputs * self.element

    @property
    def factor_bytes(self) -> int:
        """Bytes of what is read of the factors of A and B."""
        low = [part for part in self.parts[:2] if part.kind == LOW_RANK]
        return sum(part.rank * part.storages[0].dtype.itemsize for part in low) * (self.outputs + self.inputs)


def route_of(problem: Problem, keeps_output: bool) -> str:
    """The route of the backward pass (the table is in ``schedule.py``), if the output is at hand or not."""
    kind = problem.kind("A")
    if not problem.wants("A"):
        return "thin"
    if kind == CONSTANT or (kind == VECTOR and problem.product == "matmul"):
        return "scaled"
    if kind == LOW_RANK:
        return "projected" if problem.projects else "dense"
    return "solved" if keeps_output else "dense"


def keeps_output(problem: Problem, tokens: int) -> bool:
    """Whether the output is worth keeping for backward, so that da can be solved from it."""
    fewest = tokens_to_solve(problem.inputs)
    row_scale = problem.kind("A") == VECTOR and problem.product == "hadamard" and problem.wants("A")
    return row_scale and fewest is not None and tokens >= fewest
