"""The truth: GLoRA written down literally, dense, in the dtype it is given.

Every other implementation is measured against these few lines (in fp64), so they follow the
paper (arXiv 2306.07967, Eq. 10 and Appendix E) and nothing else: no fusion, no shortcut.
Differentiable to any order, in reverse and forward mode, and under ``torch.func``.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .terms import Constant, LowRank, Term, Terms, Vector


def dense(term: Term, rows: int, columns: int) -> Tensor:
    """A term as a ``(rows, columns)`` matrix; a vector holds one value per row."""
    if isinstance(term, LowRank):
        down, up = term.factors
        return down @ up
    if isinstance(term, Vector):
        return term.entries[:, None].expand(rows, columns)
    return term.entry.expand(rows, columns)


def effective_weight(weight: Tensor, terms: Terms) -> Tensor:
    """``W0 + W0 * A + B`` (hadamard) or ``W0 + W0 @ A + B`` (matmul), shape ``(N, K)``."""
    rows, columns = weight.shape
    result = weight
    if terms.A is not None and terms.product == "hadamard":
        result = result + weight * dense(terms.A, rows, columns)
    elif isinstance(terms.A, LowRank):
        result = result + weight @ dense(terms.A, columns, columns)
    elif isinstance(terms.A, Vector):
        result = result + weight @ torch.diag(terms.A.entries)
    elif isinstance(terms.A, Constant):
        result = result + weight @ (terms.A.entry * torch.eye(columns).to(weight))
    if terms.B is not None:
        result = result + dense(terms.B, rows, columns)
    return result


def effective_bias(weight: Tensor, bias: Tensor | None, terms: Terms) -> Tensor | None:
    """``b0 + b0 * D + E + W0 c``, shape ``(N,)``; without b0 ``E + W0 c``, or None if empty."""
    rows, columns = weight.shape
    parts = [] if bias is None else [bias]
    if terms.D is not None and bias is not None:
        parts.append(bias * dense(terms.D, rows, 1)[:, 0])
    if terms.E is not None:
        parts.append(dense(terms.E, rows, 1)[:, 0])
    if terms.C is not None:
        parts.append(weight @ dense(terms.C, columns, 1)[:, 0])
    return sum(parts[1:], parts[0]) if parts else None


def glora_linear(x: Tensor, weight: Tensor, bias: Tensor | None, terms: Terms) -> Tensor:
    """``y = x W_eff^T + b_eff``.

    Args:
        x: ``(..., K)``.
        weight: ``W0``, ``(N, K)``.
        bias: ``b0``, ``(N,)``, or None.
        terms: support tensors of any floating dtype; they are cast to that of ``weight``.

    Returns:
        ``(..., N)``.
    """
    terms = terms.map(lambda storage: storage.to(weight.dtype))
    return F.linear(x, effective_weight(weight, terms), effective_bias(weight, bias, terms))


def glora_merge(weight: Tensor, bias: Tensor | None, terms: Terms) -> tuple[Tensor, Tensor | None]:
    """``(W_eff, b_eff)``, every operation in the dtype of ``weight``."""
    terms = terms.map(lambda storage: storage.to(weight.dtype))
    return effective_weight(weight, terms), effective_bias(weight, bias, terms)
