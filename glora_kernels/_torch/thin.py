"""Terms whose gradients need no dense dW: each is a product of thin factors, at most R wide.

For a term that adds ``rows^T columns`` to W_eff, with dW = dy^T x never formed:
``d rows = columns dW^T = (columns x^T) dy`` and ``d columns = rows dW = (rows dy^T) x``.
Thin factors are kept as (r, .) rather than (., r): the same product is 2 to 10 times slower on a
CPU with the long side first.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ..terms import LowRank, Term, Vector
from .assemble import factors_as
from .storages import into_storages


class Thin(NamedTuple):
    """B as ``rows^T columns``, of rank r (1 for a vector or constant), and its contraction with dW."""

    rows: Tensor  # (r, N)
    columns: Tensor | None  # (r, K); None stands for ones
    tokens: Tensor  # (r, M): columns x^T
    contracted: Tensor  # (r, N): columns dW^T


def contract_b(dy: Tensor, x: Tensor, term: Term) -> Thin:
    if isinstance(term, LowRank):
        down, up = factors_as(term, x.dtype)
        tokens = up @ x.t()
        return Thin(down.t(), up, tokens, tokens @ dy)
    entries = term.entries[None] if isinstance(term, Vector) else term.entry.expand(1, dy.shape[1])
    tokens = x.sum(1)[None]
    return Thin(entries.to(x.dtype), None, tokens, tokens @ dy)


def b_gradient(dy: Tensor, x: Tensor, term: Term, thin: Thin) -> tuple[Tensor, ...]:
    if isinstance(term, LowRank):
        return into_storages(term, thin.contracted.t(), (thin.rows @ dy.t()) @ x)
    return into_storages(term, thin.contracted[0])


def matmul_a_gradient(dy: Tensor, x: Tensor, weight: Tensor, term: LowRank, projected: Tensor) -> tuple[Tensor, ...]:
    """A of ``W0 Ad Au``: with ``projected = W0 Ad`` it is the term ``projected Au``, and ``dAd = W0^T d projected``."""
    _, up = factors_as(term, x.dtype)
    d_projected = (up @ x.t()) @ dy
    return into_storages(term, (d_projected @ weight).t(), (projected.t().to(dy.dtype) @ dy.t()) @ x)
