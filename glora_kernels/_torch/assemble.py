"""W_eff and b_eff, formed in fp32 (fp64 for fp64 layers) and rounded once.

Merging and the forward pass share this one function, so a merged layer multiplies by the very
same bits as the unmerged one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..terms import Constant, LowRank, Term, Terms, Vector, compute_dtype


def assemble(
    weight: Tensor, bias: Tensor | None, terms: Terms, projected: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """``(W_eff, b_eff)`` in the dtype of ``weight``; an operand that no term changes is returned as it is.

    ``projected`` is the result of :func:`project` for these arguments, if there is one already.
    """
    dtype = weight.dtype
    wide_weight = weight.to(compute_dtype(dtype)) if terms.adapts_weight or terms.C is not None else weight
    w_eff = _effective_weight(wide_weight, terms, projected).to(dtype) if terms.adapts_weight else weight
    b_eff = _effective_bias(wide_weight, bias, terms)
    return w_eff, None if b_eff is None else b_eff.to(dtype)


def _effective_bias(weight: Tensor, bias: Tensor | None, terms: Terms) -> Tensor | None:
    """``b0 + b0 * D + E + W0 c`` in the compute dtype; ``weight`` is read only if C is there."""
    if not terms.adapts_bias:
        return bias
    result = None if bias is None else bias.to(compute_dtype(weight.dtype))
    if terms.D is not None and result is not None:
        result = torch.addcmul(result, result, _per_row(terms.D, result.dtype))
    if terms.E is not None:
        shift = _per_row(terms.E, compute_dtype(weight.dtype))
        result = shift.expand(weight.shape[0]) if result is None else result + shift
    if terms.C is not None:
        prompt = weight @ _column_prompt(terms.C, weight.dtype)
        result = prompt if result is None else result + prompt
    return result


def _column_prompt(term: LowRank | Vector, dtype: torch.dtype) -> Tensor:
    """c of ``W0 c``, ``(K,)``."""
    if isinstance(term, Vector):
        return term.entries.to(dtype)
    down, up = factors_as(term, dtype)
    return (down @ up)[:, 0]


def factors_as(term: LowRank, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    down, up = term.factors
    return down.to(dtype), up.to(dtype)


def _per_row(term: Term, dtype: torch.dtype) -> Tensor:
    """A vector as ``(rows,)``, a constant as ``()``."""
    assert isinstance(term, (Vector, Constant))
    return (term.entries if isinstance(term, Vector) else term.entry).to(dtype)


def row_scale(terms: Terms, dtype: torch.dtype) -> Tensor:
    """``1 + a`` of a vector or constant A, shaped to multiply an ``(N, K)`` weight."""
    assert terms.A is not None
    scale = _per_row(terms.A, dtype) + 1
    return scale[:, None] if isinstance(terms.A, Vector) and terms.product == "hadamard" else scale


def project(weight: Tensor, terms: Terms) -> Tensor | None:
    """``V = W0 Ad``, (N, r), where A is a low rank of the matmul product: the term is then ``V Au``."""
    if terms.product != "matmul" or not isinstance(terms.A, LowRank):
        return None
    wide = compute_dtype(weight.dtype)
    return weight.to(wide) @ factors_as(terms.A, wide)[0]


def _effective_weight(weight: Tensor, terms: Terms, projected: Tensor | None) -> Tensor:
    """W_eff, a new tensor in the dtype of ``weight``, in as few passes over it as the kinds allow."""
    if terms.B is not None and not isinstance(terms.B, LowRank):
        shift = _per_row(terms.B, weight.dtype)
        shift = shift[:, None] if isinstance(terms.B, Vector) else shift
        if terms.A is None:
            return weight + shift
        if not isinstance(terms.A, LowRank):
            return torch.addcmul(shift, weight, row_scale(terms, weight.dtype))
        return _scaled(weight, terms, projected).add_(shift)
    if terms.B is None:
        return _scaled(weight, terms, projected)
    down, up = factors_as(terms.B, weight.dtype)
    if terms.A is None:
        return torch.addmm(weight, down, up)
    return _scaled(weight, terms, projected).addmm_(down, up)


def _scaled(weight: Tensor, terms: Terms, projected: Tensor | None) -> Tensor:
    """``W0 + W0 * A`` or ``W0 + W0 @ A``, as a new tensor."""
    if not isinstance(terms.A, LowRank):
        return weight * row_scale(terms, weight.dtype)
    down, up = factors_as(terms.A, weight.dtype)
    if terms.product == "matmul":
        return torch.addmm(weight, weight @ down if projected is None else projected, up)
    product = down @ up
    return torch.addcmul(weight, weight, product, out=product)
