"""What the cost of a layer call depends on."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ..gradient_routes import MIN_INPUTS_TO_REUSE, MIN_TOKENS_TO_REUSE
from ..precision import tf32_allowed
from ..terms import SLOTS, Constant, LowRank, Terms, Vector, rank_of

NONE, CONSTANT, VECTOR, LOW_RANK = "none", "constant", "vector", "low rank"
_KINDS: dict[type, str] = {type(None): NONE, Constant: CONSTANT, Vector: VECTOR, LowRank: LOW_RANK}


class Problem(NamedTuple):
    """One layer call: what its cost depends on.

    Attributes:
        tokens, outputs, inputs: M, N, K.
        kinds, ranks: the kinds and ranks of A to E; the rank is 0 where the kind has none.
        product: ``"hadamard"`` or ``"matmul"``.
        element: bytes of an element of W0, x and dy.
        factor: bytes of an element of the factors of A and B.
        bias: whether there is a b0.
        wanted: the slots that want a gradient; None for all slots that have a term.
        wants_x: whether x wants a gradient.
        tf32: whether fp32 products use TF32.
        architecture: ``sm_90``, ``gfx942`` and the like; ``interpreter`` is treated as an ``sm_90``.
    """

    tokens: int
    outputs: int
    inputs: int
    kinds: tuple[str, str, str, str, str]
    ranks: tuple[int, int, int, int, int]
    product: str
    element: int
    factor: int
    bias: bool
    wanted: frozenset[str] | None
    wants_x: bool
    tf32: bool
    architecture: str

    @staticmethod
    def of(
        tokens: int,
        weight: Tensor,
        terms: Terms,
        architecture: str,
        *,
        bias: bool = True,
        wanted: frozenset[str] | None = None,
        wants_x: bool = True,
    ) -> Problem:
        """The problem of a call. Every call makes one, so only plain look-ups are done here."""
        a, b, c, d, e = terms.A, terms.B, terms.C, terms.D, terms.E
        outputs, inputs = weight.shape
        element = weight.element_size()
        left = a if type(a) is LowRank else b
        return Problem(
            tokens,
            outputs,
            inputs,
            (_KINDS[type(a)], _KINDS[type(b)], _KINDS[type(c)], _KINDS[type(d)], _KINDS[type(e)]),
            (rank_of(a), rank_of(b), rank_of(c), 0, 0),
            terms.product,
            element,
            left.down.element_size() if type(left) is LowRank else element,
            bias,
            wanted,
            wants_x,
            element == 4 and tf32_allowed() and architecture[0] != "g",
            architecture,
        )

    def kind(self, slot: str) -> str:
        return self.kinds[SLOTS.index(slot)]

    def rank(self, slot: str) -> int:
        return self.ranks[SLOTS.index(slot)]

    def has(self, slot: str) -> bool:
        return self.kind(slot) != NONE

    def wants(self, slot: str) -> bool:
        """Whether the slot wants a gradient; without a bias to scale, D has none."""
        asked = self.wanted is None or slot in self.wanted
        return asked and self.has(slot) and (slot != "D" or self.bias)

    @property
    def adapts_weight(self) -> bool:
        return self.has("A") or self.has("B")

    @property
    def adapts_bias(self) -> bool:
        return self.has("C") or self.has("E") or (self.has("D") and self.bias)

    @property
    def projects(self) -> bool:
        """Whether A is a low rank of the matmul product, so that V = W0 Ad is needed."""
        return self.kind("A") == LOW_RANK and self.product == "matmul"

    @property
    def wide(self) -> int:
        """Bytes of an element of sums and effective weights."""
        return max(self.element, 4)

    @property
    def x_bytes(self) -> int:
        return self.tokens * self.inputs * self.element

    @property
    def y_bytes(self) -> int:
        return self.tokens * self.outputs * self.element

    @property
    def weight_bytes(self) -> int:
        return self.outputs * self.inputs * self.element

    @property
    def factor_bytes(self) -> int:
        """Bytes of the factors of A and B."""
        return self.factor * (self.outputs + self.inputs) * (self.rank("A") + self.rank("B"))


def route_of(problem: Problem) -> str:
    """The route of the backward pass (see ``_triton/backward.py``), if y is kept wherever that can pay off."""
    kind = problem.kind("A")
    if not problem.wants("A"):
        return "thin"
    if kind == CONSTANT or (kind == VECTOR and problem.product == "matmul"):
        return "scaled"
    if kind == LOW_RANK:
        return "projected" if problem.projects else "dense"
    return "solved" if problem.tokens >= MIN_TOKENS_TO_REUSE and problem.inputs >= MIN_INPUTS_TO_REUSE else "dense"
