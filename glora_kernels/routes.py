"""Which way a gradient can be had, by what the terms are: asked by every backend and by the plan."""

from __future__ import annotations

from .terms import Constant, LowRank, Terms, Vector


def needs_weight_gradient(terms: Terms, wanted: frozenset[str]) -> bool:
    """Whether the third unit, dW, is needed."""
    return "A" in wanted and isinstance(terms.A, LowRank) and terms.product == "hadamard"


def reads_token_sums(terms: Terms, wanted: frozenset[str]) -> bool:
    """Whether all that is read of x is ``sum_k x_mk``, as by the gradient ``dy^T (x 1)`` of a vector or constant B."""
    return "A" not in wanted and "B" in wanted and not isinstance(terms.B, LowRank)


def scales_inputs(terms: Terms) -> bool:
    """Whether A is a factor on each input or on everything: ``W_eff = W0 diag(1 + a) + B``."""
    return isinstance(terms.A, Constant) or (isinstance(terms.A, Vector) and terms.product == "matmul")


def scales_rows(terms: Terms) -> bool:
    """Whether A is a factor on each output: ``W_eff = diag(1 + a) W0 + B``."""
    return isinstance(terms.A, Vector) and terms.product == "hadamard"
