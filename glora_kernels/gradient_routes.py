"""How a gradient can be formed, by the kinds of the terms: for autograd, torch, Triton, the cost model and explain."""

from __future__ import annotations

import torch

from .terms import Constant, LowRank, Terms, Vector


def needs_weight_gradient(terms: Terms, wanted: frozenset[str]) -> bool:
    """Whether the third dense product, dW, is needed."""
    return "A" in wanted and isinstance(terms.A, LowRank) and terms.product == "hadamard"


def reads_token_sums(terms: Terms, wanted: frozenset[str]) -> bool:
    """Whether only ``sum_k x_mk`` of x is read, as by the gradient ``dy^T (x 1)`` of a vector or constant B."""
    return "A" not in wanted and "B" in wanted and not isinstance(terms.B, LowRank)


def scales_inputs(terms: Terms) -> bool:
    """Whether A scales each input, or everything: ``W_eff = W0 diag(1 + a) + B``."""
    return isinstance(terms.A, Constant) or (isinstance(terms.A, Vector) and terms.product == "matmul")


def scales_rows(terms: Terms) -> bool:
    """Whether A scales each output: ``W_eff = diag(1 + a) W0 + B``."""
    return isinstance(terms.A, Vector) and terms.product == "hadamard"


# Solving pays off, and its rounding errors average out, from this size on.
MIN_TOKENS_TO_REUSE = 64
MIN_INPUTS_TO_REUSE = 64
# Tokens on which the loss of digits is estimated, and how much of it is accepted. The contract allows an error of
# 3 u S in half types and 8 u S in others; the sums need a part of that. On the torch backend a first estimate takes
# one in so many of the inputs.
PROBED_TOKENS = 16
PROBED_PART = 8
ACCEPTED_LOSS = {torch.float16: 2.0, torch.bfloat16: 2.0, torch.float32: 3.0, torch.float64: 3.0}


def tokens_to_reuse_output(inputs: int, terms: Terms) -> int | None:
    """From how many tokens on ``da`` can be solved from the output, which is then kept for backward; None: never."""
    return tokens_to_solve(inputs) if scales_rows(terms) else None


def tokens_to_solve(inputs: int) -> int | None:
    """From how many tokens on solving for a row scale pays off; None: never."""
    return MIN_TOKENS_TO_REUSE if inputs >= MIN_INPUTS_TO_REUSE else None


def reuses_output(tokens: int, inputs: int, terms: Terms) -> bool:
    """Whether ``da`` can be solved from the output of a call of so many tokens."""
    fewest = tokens_to_reuse_output(inputs, terms)
    return fewest is not None and tokens >= fewest
