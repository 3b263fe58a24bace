"""The forward pass and merging: which kernels run, and on which operands."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..backend import ForwardResult
from ..terms import Terms
from .context import Context, context
from .kernels.assemble import assembled
from .kernels.fused import multiply
from .operands import ADDED, a_operand, b_operand, bias_operands


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, terms: Terms, strategy: str) -> ForwardResult:
    """y for x of shape (M, K), by the given strategy."""
    shared = context(x.shape[0], weight, x)
    if strategy == "assemble" or not terms.adapts_weight:
        w_eff, b_eff, projected = assemble(weight, bias, terms, shared)
        return ForwardResult(F.linear(x, w_eff, b_eff), projected, b_eff)
    projected = project(weight, terms, shared)
    folded = bias_operands(terms, bias)
    y = torch.empty(x.shape[0], weight.shape[0], dtype=x.dtype, device=x.device)
    b_eff = torch.empty(weight.shape[0], dtype=x.dtype, device=x.device) if folded.exists else None
    a, b = a_operand(terms, projected, weight.dtype), b_operand(terms, weight.dtype)
    multiply(x, weight, y, a, b, folded, b_eff, shared)
    return ForwardResult(y, projected, b_eff)


def project(weight: Tensor, terms: Terms, shared: Context) -> Tensor | None:
    """V = W0 Ad, (N, R), where A is a low rank of the matmul product, else None; nothing else is written."""
    if a_operand(terms, None, weight.dtype).form != ADDED:
        return None
    return assembled(weight, None, terms, shared, write_weight=False, write_bias=False)[2]


def assemble(
    weight: Tensor, bias: Tensor | None, terms: Terms, shared: Context
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """``(W_eff, b_eff, V)``; an operand that no term changes is returned as it is."""
    writes_bias = bias_operands(terms, bias).adapts
    if not terms.adapts_weight and not writes_bias:
        return weight, bias, None
    w_eff, b_eff, projected = assembled(weight, bias, terms, shared, terms.adapts_weight, writes_bias)
    return weight if w_eff is None else w_eff, b_eff if writes_bias else bias, projected
