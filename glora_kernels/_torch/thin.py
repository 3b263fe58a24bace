"""Gradients that need no dense dW: the term is a product of thin factors, at most R wide.

For a term that adds ``rows^T columns`` to W_eff, with dW = dy^T x never formed:
``d rows = columns dW^T = (columns x^T) dy`` and ``d columns = rows dW = (rows dy^T) x``.
Thin factors are kept as (r, .) rather than (., r): on a CPU the same product is 2 to 10 times
slower with the long side first.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ..backend import BackwardCall
from ..terms import Constant, LowRank, Vector
from .assemble import factors_as
from .storages import into_storages


class Thin(NamedTuple):
    """B as ``rows^T columns``, of rank r (1 for a vector or constant), and its contraction with dW."""

    rows: Tensor  # (r, N)
    columns: Tensor | None  # (r, K); None stands for ones
    tokens: Tensor  # (r, M): columns x^T
    contracted: Tensor  # (r, N): columns dW^T


def contract_b(call: BackwardCall) -> Thin:
    """The contraction of B with dW. If B is a vector or constant, it reads only the sums of x over the inputs."""
    dy, x, term = call.dy, call.x, call.terms.B
    if isinstance(term, LowRank):
        assert x is not None
        down, up = factors_as(term, x.dtype)
        tokens = up @ x.t()
        return Thin(down.t(), up, tokens, tokens @ dy)
    assert isinstance(term, (Vector, Constant))
    entries = term.entries[None] if isinstance(term, Vector) else term.entry.expand(1, dy.shape[1])
    tokens = _token_sums(call)[None]
    return Thin(entries.to(dy.dtype), None, tokens, tokens @ dy)


def _token_sums(call: BackwardCall) -> Tensor:
    if call.token_sums is not None:
        return call.token_sums
    assert call.x is not None
    return call.x.sum(1)


def b_gradient(call: BackwardCall, thin: Thin) -> tuple[Tensor, ...]:
    """Gradients of the storages of B from its contraction with dW."""
    dy, x, term = call.dy, call.x, call.terms.B
    if isinstance(term, LowRank):
        assert x is not None
        return into_storages(term, thin.contracted.t(), (thin.rows @ dy.t()) @ x)
    assert term is not None
    return into_storages(term, thin.contracted[0])


def matmul_a_gradient(dy: Tensor, x: Tensor, weight: Tensor, term: LowRank, projected: Tensor) -> tuple[Tensor, ...]:
    """Gradients of A in ``W0 Ad Au``, or ``projected Au`` with ``projected = W0 Ad``; ``dAd = W0^T d projected``."""
    _, up = factors_as(term, x.dtype)
    d_projected = (up @ x.t()) @ dy
    return into_storages(term, (d_projected @ weight).t(), (projected.t().to(dy.dtype) @ dy.t()) @ x)
