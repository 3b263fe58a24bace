"""The gradient of A as a hadamard vector, solved from the output at no dense product.

``da_n = sum_m dy_mn z_mn`` with ``z = x W0^T`` would be a dense GEMM to form. But the output holds
z: ``y = (1 + a) z + x B^T + b_eff``. So da is solved for, and only the rows where that would lose
digits are formed from z.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..terms import Terms, Vector, compute_dtype
from .assemble import row_scale
from .step import Step
from .thin import Thin

# Solving da from the output pays off, and its rounding errors average out, from this size on.
MIN_TOKENS_TO_REUSE = 64
MIN_INPUTS_TO_REUSE = 64
# Tokens on which the loss of digits is estimated, and how much of it is accepted. The contract
# allows an error of 3 u S in half types and 8 u S in others; part of it is left to the sums.
PROBED_TOKENS = 64
ACCEPTED_LOSS = {torch.float16: 2.0, torch.bfloat16: 2.0, torch.float32: 6.0, torch.float64: 6.0}


def reuses_output(tokens: int, inputs: int, terms: Terms) -> bool:
    """Whether ``da`` can be solved from the output, so that it is worth keeping for backward."""
    scaled_rows = isinstance(terms.A, Vector) and terms.product == "hadamard"
    return scaled_rows and tokens >= MIN_TOKENS_TO_REUSE and inputs >= MIN_INPUTS_TO_REUSE


def row_scale_gradient(step: Step, db: Tensor | None, thin: Thin | None) -> Tensor:
    """``da_n = sum_m dy_mn z_mn``, ``z = x W0^T``, of shape (N,).

    From ``y = s z + x B^T + b_eff`` with ``s = 1 + a``:
    ``s da = sum_m dy y - b_eff db - sum_k B dW``; rows where this loses digits are formed from z.
    """
    dy, x, weight = step.dy, step.x, step.weight
    assert x is not None
    if step.output is None:
        return _column_dots(dy, x @ weight.t())
    assert db is not None
    wide = compute_dtype(dy.dtype)
    scale = row_scale(step.terms, wide)[:, 0]
    b_eff = torch.zeros_like(scale) if step.b_eff is None else step.b_eff.to(wide)
    da = _column_dots(dy, step.output) - b_eff * db
    if thin is not None:
        da -= (thin.rows * thin.contracted).sum(0, dtype=wide)
    da /= scale
    lost = _unreliable_rows(dy, x, weight, step.output, scale, b_eff, thin)
    if lost.any():
        da[lost] = _column_dots(dy[:, lost], x @ weight[lost].t())
    return da


def _unreliable_rows(
    dy: Tensor, x: Tensor, weight: Tensor, output: Tensor, scale: Tensor, b_eff: Tensor, thin: Thin | None
) -> Tensor:
    """Rows where solving ``da`` from the output loses digits, as a mask (N,).

    What is taken off the output must not dwarf what is left of it: over some evenly spaced tokens,
    ``sum |dy| (|y| + |b_eff| + |x B^T|)`` is held against ``|s| sum |dy| |x| |W0|^T``, the scale of
    the rounding errors that the contract allows. ``|s z|`` is a cheap lower bound of the latter, so
    only rows that fail against it are held against the whole. A row without evidence (dy zero on
    all of these tokens, ``s = 0``, NaN) counts as unreliable.
    """
    accepted = ACCEPTED_LOSS[dy.dtype]
    tokens = dy.shape[0]
    count = min(tokens, PROBED_TOKENS)
    probe = torch.arange(count, device=dy.device) * tokens // count
    y = output[probe].to(scale.dtype)
    weights = dy[probe].to(scale.dtype).abs_()
    magnitude = y.abs() + b_eff.abs()
    rest = y - b_eff
    if thin is not None:
        rows, of_tokens = thin.rows.to(scale.dtype), thin.tokens[:, probe].t().to(scale.dtype)
        magnitude.addmm_(of_tokens.abs(), rows.abs())
        rest.addmm_(of_tokens, rows, alpha=-1)
    lost = torch.linalg.vecdot(weights, magnitude, dim=0)
    kept = torch.linalg.vecdot(weights, rest.abs_(), dim=0)
    unreliable = ~((lost < accepted * kept) & (scale != 0))
    if unreliable.any():
        allowed = x[probe].to(scale.dtype).abs_() @ weight[unreliable].to(scale.dtype).abs_().t()
        kept = torch.linalg.vecdot(weights[:, unreliable], allowed, dim=0) * scale[unreliable].abs()
        unreliable[unreliable.clone()] = ~(lost[unreliable] < accepted * kept)
    return unreliable


def _column_dots(left: Tensor, right: Tensor) -> Tensor:
    """``sum_m left_mn right_mn`` in the compute dtype, (N,)."""
    wide = compute_dtype(left.dtype)
    return torch.linalg.vecdot(left.to(wide), right.to(wide), dim=0)
