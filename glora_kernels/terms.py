"""What adapts a frozen linear layer: the five support tensors A to E, each of one kind.

One storage of the maximal rank serves every kind (*weight entanglement*, arXiv 2306.07967):
a low rank reads its first ``rank`` columns, a vector its first column, a constant its first
element. The terms therefore hold the storage itself and say how much of it is read; what is
not read never influences a result, and the gradient has the shape of the storage.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Union

import torch
from torch import Tensor

PRODUCTS = ("hadamard", "matmul")
SLOTS = ("A", "B", "C", "D", "E")


@dataclass(frozen=True, eq=False)
class LowRank:
    """``down[:, :rank] @ up[:rank]``.

    Args:
        down: ``(rows, R)``, the storage of the left factor.
        up: ``(R, columns)``, the storage of the right factor.
        rank: how many columns of ``down`` and rows of ``up`` are read; None reads all R.
    """

    down: Tensor
    up: Tensor
    rank: int | None = None

    @property
    def storages(self) -> tuple[Tensor, ...]:
        return (self.down, self.up)

    @property
    def read_rank(self) -> int:
        """How many columns of ``down`` and rows of ``up`` are read, never more than the storage has."""
        stored = self.up.shape[0]
        return stored if self.rank is None else min(self.rank, stored)

    @property
    def factors(self) -> tuple[Tensor, Tensor]:
        """The part that is read: ``(rows, rank)`` and ``(rank, columns)``."""
        if self.rank is None:
            return self.down, self.up
        return self.down[:, : self.rank], self.up[: self.rank]


@dataclass(frozen=True, eq=False)
class Vector:
    """One value per row (or per column: see the table in :class:`Terms`).

    Args:
        value: ``(length,)``, or a storage ``(length, R)`` of which the first column is read.
    """

    value: Tensor

    @property
    def storages(self) -> tuple[Tensor, ...]:
        return (self.value,)

    @property
    def entries(self) -> Tensor:
        """The part that is read: ``(length,)``."""
        return self.value if self.value.dim() == 1 else self.value[:, 0]


@dataclass(frozen=True, eq=False)
class Constant:
    """One value for the whole term.

    Args:
        value: a tensor of at least one element, of which the first is read.
    """

    value: Tensor

    @property
    def storages(self) -> tuple[Tensor, ...]:
        return (self.value,)

    @property
    def entry(self) -> Tensor:
        """The part that is read: a tensor of shape ``()``."""
        return self.value[(0,) * self.value.dim()]


Term = Union[LowRank, Vector, Constant]
KINDS: dict[str, tuple[type, ...]] = {
    "A": (LowRank, Vector, Constant),
    "B": (LowRank, Vector, Constant),
    "C": (LowRank, Vector),
    "D": (Vector, Constant),
    "E": (Vector, Constant),
}


class Structure(NamedTuple):
    """A :class:`Terms` without its tensors: hashable, and enough to put them back."""

    slots: tuple[tuple[str, type, int | None], ...]
    product: str


@dataclass(frozen=True, eq=False)
class Terms:
    """The support tensors of one layer; None stands for the kind *none*.

    ``hadamard``: ``W_eff = W0 + W0 * A + B`` with A an ``(N, K)`` matrix, elementwise.
    ``matmul``: ``W_eff = W0 + W0 @ A + B`` with A a ``(K, K)`` matrix.
    Both: ``b_eff = b0 + b0 * D + E + W0 c``.

    ========== ============================== ==================== ============
    tensor     LowRank                        Vector               Constant
    ========== ============================== ==================== ============
    A hadamard down (N, R), up (R, K)         (N,), one per row    everywhere
    A matmul   down (K, R), up (R, K)         (K,), the diagonal   times identity
    B          down (N, R), up (R, K)         (N,), one per row    everywhere
    C          down (K, R), up (R, 1)         (K,)                 not allowed
    D, E       not allowed                    (N,)                 everywhere
    ========== ============================== ==================== ============

    Attributes:
        active: the slots that are not none with their terms, in the order A to E.
        storages: the storages of the active slots, in that order.

    Raises:
        TypeError: a term of a kind its slot does not allow.
        ValueError: an unknown product.
    """

    A: Term | None = None
    B: Term | None = None
    C: LowRank | Vector | None = None
    D: Vector | Constant | None = None
    E: Vector | Constant | None = None
    product: str = "hadamard"
    active: tuple[tuple[str, Term], ...] = field(init=False, repr=False)
    storages: tuple[Tensor, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if self.product not in PRODUCTS:
            raise ValueError(f"product: expected one of {PRODUCTS}, got {self.product!r}")
        terms = (self.A, self.B, self.C, self.D, self.E)
        active = tuple([(slot, term) for slot, term in zip(SLOTS, terms) if term is not None])
        for slot, term in active:
            if not isinstance(term, KINDS[slot]):
                names = ", ".join(kind.__name__ for kind in KINDS[slot])
                raise TypeError(f"{slot}: expected {names} or None, got {type(term).__name__}")
        object.__setattr__(self, "active", active)
        object.__setattr__(self, "storages", tuple([storage for _, term in active for storage in term.storages]))

    @property
    def adapts_weight(self) -> bool:
        return self.A is not None or self.B is not None

    @property
    def adapts_bias(self) -> bool:
        return self.C is not None or self.D is not None or self.E is not None

    @property
    def structure(self) -> Structure:
        """What :meth:`unflatten` needs beside the storages."""
        slots = tuple([(slot, type(term), getattr(term, "rank", None)) for slot, term in self.active])
        return Structure(slots, self.product)

    def flatten(self) -> tuple[list[Tensor], Structure]:
        """The storages in a fixed order, and :attr:`structure`."""
        return list(self.storages), self.structure

    @staticmethod
    def unflatten(storages: Sequence[Tensor], structure: Structure) -> Terms:
        """The inverse of :meth:`flatten`."""
        rest = iter(storages)
        terms: dict[str, Term] = {}
        for slot, kind, rank in structure.slots:
            if kind is LowRank:
                terms[slot] = LowRank(next(rest), next(rest), rank)
            else:
                terms[slot] = kind(next(rest))
        return Terms(**terms, product=structure.product)  # type: ignore[arg-type]

    def map(self, function) -> Terms:
        """The same terms with ``function`` applied to every storage."""
        storages, structure = self.flatten()
        return Terms.unflatten([function(storage) for storage in storages], structure)


def rank_of(term: object) -> int:
    """How much of a low rank is read; 0 for every other term."""
    return term.read_rank if isinstance(term, LowRank) else 0


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Effective weights are formed in fp64 for fp64 layers and in fp32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32
