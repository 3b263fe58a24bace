"""The backward pass in closed form, with the fewest dense matrix products the mathematics allows.

One unit is one dense GEMM of 2 M N K operations. With dW = dy^T x, an (N, K) matrix:

* ``dx = dy W_eff`` costs one unit, whatever the kinds;
* a low-rank B, or a vector or constant one, reads dW only through thin products, such as
  ``dBd = dy^T (x Bu^T)``: no unit;
* A as a constant, and every A of the matmul product, needs no dW either: ``dx`` is formed from
  ``g = dy W0``, and ``da = sum x * g``;
* A as a hadamard vector needs ``da_n = sum_m dy_mn z_mn`` with ``z = x W0^T``. The output holds
  z already, ``y = (1 + a) z + x B^T + b_eff``, so ``da`` is solved for, except in rows where that
  would lose digits: see :func:`_unreliable_rows`;
* A as a hadamard low rank needs dW itself: ``dAd = (dW * W0) Au^T``, ``dAu = Ad^T (dW * W0)``.
  One more unit, and B is then read from dW as well.

Shapes: dy (M, N), x (M, K), weight (N, K). All gradients come back in the shape and dtype of
the storage they belong to, zero where the storage was not read.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..terms import Constant, LowRank, Term, Terms, Vector, compute_dtype
from .assemble import assemble, effective_bias, factors_as, row_scale

# Solving da from the output pays off, and its rounding errors average out, from this size on.
MIN_TOKENS_TO_REUSE = 64
MIN_INPUTS_TO_REUSE = 64
# Tokens on which the loss of digits is estimated, and how much of it is accepted. The contract
# allows an error of 3 u S in half types and 8 u S in others; part of it is left to the sums.
PROBED_TOKENS = 64
ACCEPTED_LOSS = {torch.float16: 2.0, torch.bfloat16: 2.0, torch.float32: 6.0, torch.float64: 6.0}

SlotGradients = dict[str, tuple[Tensor, ...]]


def reuses_output(tokens: int, inputs: int, terms: Terms) -> bool:
    """Whether ``da`` can be solved from the output, so that it is worth keeping for backward."""
    scaled_rows = isinstance(terms.A, Vector) and terms.product == "hadamard"
    return scaled_rows and tokens >= MIN_TOKENS_TO_REUSE and inputs >= MIN_INPUTS_TO_REUSE


def needs_weight_gradient(terms: Terms, wanted: frozenset[str]) -> bool:
    """Whether the third unit, dW, is needed."""
    return "A" in wanted and isinstance(terms.A, LowRank) and terms.product == "hadamard"


def backward(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    terms: Terms,
    output: Tensor | None,
    projected: Tensor | None,
    wanted: frozenset[str],
    wants_x: bool,
) -> tuple[Tensor | None, SlotGradients]:
    """Gradients of ``x`` (if ``wants_x``) and of the storages of the slots in ``wanted``.

    ``output`` is y if it is at hand and unchanged, ``projected`` what ``assemble.project`` returned;
    ``x`` may be None if neither A nor B is wanted.
    """
    db = dy.sum(0, dtype=compute_dtype(dy.dtype)) if wanted & {"C", "D", "E"} or output is not None else None
    grads = {slot: _bias_gradient(slot, db, weight, bias, terms) for slot in wanted & {"C", "D", "E"}}
    if x is None:
        assert not wanted & {"A", "B"}
        return _input_gradient(dy, weight, terms, projected) if wants_x else None, grads

    if needs_weight_gradient(terms, wanted):
        grads.update(_dense_gradients(dy, x, weight, terms, wanted))
        return _input_gradient(dy, weight, terms, projected) if wants_x else None, grads

    thin = _thin_b(dy, x, terms.B) if terms.B is not None and ("B" in wanted or output is not None) else None
    if "B" in wanted:
        assert terms.B is not None and thin is not None
        grads["B"] = _b_gradient(dy, x, terms.B, thin)
    if "A" not in wanted:
        return _input_gradient(dy, weight, terms, projected) if wants_x else None, grads

    if isinstance(terms.A, LowRank):
        grads["A"] = _matmul_low_rank_gradient(dy, x, weight, terms.A, projected)
    elif terms.product == "hadamard" and isinstance(terms.A, Vector):
        da = _row_scale_gradient(dy, x, weight, bias, terms, output, db, thin)
        grads["A"] = _into_storages(terms.A, da)
    else:
        dx, da = _scaled_input_gradient(dy, x, weight, terms)
        grads["A"] = _into_storages(terms.A, da)
        return dx if wants_x else None, grads
    return _input_gradient(dy, weight, terms, projected) if wants_x else None, grads


def _input_gradient(dy: Tensor, weight: Tensor, terms: Terms, projected: Tensor | None) -> Tensor:
    w_eff, _ = assemble(weight, None, Terms(A=terms.A, B=terms.B, product=terms.product), projected)
    return dy @ w_eff


# -- A as a hadamard low rank: through dW ----------------------------------------------------------


def _dense_gradients(dy: Tensor, x: Tensor, weight: Tensor, terms: Terms, wanted: frozenset[str]) -> SlotGradients:
    """A, and B if wanted, from the dense dW; hadamard product, A low rank."""
    wide = compute_dtype(dy.dtype)
    dw = (dy.t() @ x).to(wide)
    grads: SlotGradients = {}
    if "B" in wanted:
        grads["B"] = _contract(terms.B, dw)
    grads["A"] = _contract(terms.A, dw.mul_(weight))
    return grads


def _contract(term: Term | None, dw: Tensor) -> tuple[Tensor, ...]:
    """Gradients of a term that adds its (N, K) matrix to one whose gradient is ``dw``."""
    if isinstance(term, LowRank):
        down, up = factors_as(term, dw.dtype)
        return _into_storages(term, (up @ dw.t()).t(), down.t() @ dw)
    assert term is not None
    return _into_storages(term, dw.sum(1))


# -- B, and A of the matmul product: through thin products -----------------------------------------


class _Thin(NamedTuple):
    """B as ``rows^T @ columns`` (rank r; 1 for a vector or constant) and its contraction with dW."""

    rows: Tensor  # (r, N)
    tokens: Tensor  # (r, M): columns x^T
    contracted: Tensor  # (r, N): columns dW^T


def _thin_b(dy: Tensor, x: Tensor, term: Term) -> _Thin:
    if isinstance(term, LowRank):
        down, up = factors_as(term, x.dtype)
        rows, tokens = down.t(), up @ x.t()
    else:
        entries = term.entries[None] if isinstance(term, Vector) else term.entry.expand(1, dy.shape[1])
        rows, tokens = entries.to(x.dtype), x.sum(1)[None]
    return _Thin(rows, tokens, tokens @ dy)


def _b_gradient(dy: Tensor, x: Tensor, term: Term, thin: _Thin) -> tuple[Tensor, ...]:
    if isinstance(term, LowRank):
        return _into_storages(term, thin.contracted.t(), (thin.rows @ dy.t()) @ x)
    return _into_storages(term, thin.contracted[0])


def _matmul_low_rank_gradient(
    dy: Tensor, x: Tensor, weight: Tensor, term: LowRank, projected: Tensor | None
) -> tuple[Tensor, ...]:
    """A of ``W0 @ Ad @ Au``: with V = W0 Ad it is a low-rank term ``V @ Au``, and ``dAd = W0^T dV``."""
    assert projected is not None
    _, up = factors_as(term, x.dtype)
    dv = (up @ x.t()) @ dy
    return _into_storages(term, (dv @ weight).t(), (projected.t().to(dy.dtype) @ dy.t()) @ x)


def _scaled_input_gradient(dy: Tensor, x: Tensor, weight: Tensor, terms: Terms) -> tuple[Tensor, Tensor]:
    """``(dx, da)`` where A scales inputs or everything: g = dy W0, dx = g (1 + a) + dy B, da = sum x * g."""
    wide = compute_dtype(dy.dtype)
    g = (dy @ weight).to(wide)
    da = torch.linalg.vecdot(x.to(wide), g, dim=0)
    dx = g.mul_(row_scale(terms, wide))
    if isinstance(terms.B, LowRank):
        down, up = factors_as(terms.B, dy.dtype)
        dx.addmm_((down.t() @ dy.t()).t().to(wide), up.to(wide))
    elif isinstance(terms.B, Vector):
        dx.add_((dy @ terms.B.entries.to(dy.dtype)[:, None]).to(wide))
    elif isinstance(terms.B, Constant):
        dx.add_(dy.sum(1, keepdim=True, dtype=wide) * terms.B.entry.to(wide))
    return dx.to(dy.dtype), da


# -- A as a hadamard vector: from the output -------------------------------------------------------


def _row_scale_gradient(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    terms: Terms,
    output: Tensor | None,
    db: Tensor | None,
    thin: _Thin | None,
) -> Tensor:
    """``da_n = sum_m dy_mn z_mn``, ``z = x W0^T``, of shape (N,).

    From ``y = s z + x B^T + b_eff`` with ``s = 1 + a``:
    ``s da = sum_m dy y - b_eff db - sum_k B dW``; rows where this loses digits are formed from z.
    """
    if output is None:
        return _column_dots(dy, x @ weight.t())
    assert db is not None
    wide = compute_dtype(dy.dtype)
    scale = row_scale(terms, wide)[:, 0]
    b_eff = effective_bias(weight.to(wide) if terms.C is not None else weight, bias, terms)
    # The forward pass added the rounded bias, so the rounded one is taken off.
    b_eff = torch.zeros_like(scale) if b_eff is None else b_eff.to(dy.dtype).to(wide)
    da = _column_dots(dy, output) - b_eff * db
    if thin is not None:
        da -= (thin.rows * thin.contracted).sum(0, dtype=wide)
    da /= scale
    lost = _unreliable_rows(dy, x, weight, output, scale, b_eff, thin)
    if lost.any():
        da[lost] = _column_dots(dy[:, lost], x @ weight[lost].t())
    return da


def _unreliable_rows(
    dy: Tensor, x: Tensor, weight: Tensor, output: Tensor, scale: Tensor, b_eff: Tensor, thin: _Thin | None
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


# -- C, D, E: through the gradient of the bias -----------------------------------------------------


def _bias_gradient(
    slot: str, db: Tensor | None, weight: Tensor, bias: Tensor | None, terms: Terms
) -> tuple[Tensor, ...]:
    """Gradients of C, D or E from ``db = sum_m dy``, (N,)."""
    assert db is not None
    term = getattr(terms, slot)
    if slot == "D":
        assert bias is not None
        return _into_storages(term, db * bias)
    if slot == "E":
        return _into_storages(term, db)
    dc = weight.to(db.dtype).t() @ db
    if isinstance(term, Vector):
        return _into_storages(term, dc)
    down, up = factors_as(term, db.dtype)
    return _into_storages(term, dc[:, None] @ up.t(), (down.t() @ dc)[:, None])


# -- storages --------------------------------------------------------------------------------------


def _into_storages(term: Term | None, *values: Tensor) -> tuple[Tensor, ...]:
    """Gradients in the shape of the term's storages: ``values`` where they are read, else zero.

    A constant takes one value a row and is given their sum.
    """
    if isinstance(term, LowRank):
        rank = term.factors[1].shape[0]
        down, up = (torch.zeros_like(storage) for storage in term.storages)
        down[:, :rank] = values[0]
        up[:rank] = values[1]
        return down, up
    assert term is not None
    grad = torch.zeros_like(term.value)
    if isinstance(term, Vector):
        (grad if grad.dim() == 1 else grad[:, 0]).copy_(values[0])
    else:
        grad[(0,) * grad.dim()] = values[0].sum()
    return (grad,)
