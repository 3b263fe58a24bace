"""The backward pass in closed form, with the fewest dense matrix products the mathematics allows.

One unit is one dense GEMM of 2 M N K operations. With dW = dy^T x, an (N, K) matrix:

* ``dx = dy W_eff`` costs one unit, whatever the kinds;
* the gradient of B needs dW only through thin products, such as ``dBd = dy^T (x Bu^T)``: no unit.
  If B is a vector or a constant, it needs of x only the sum over the inputs;
* A as a constant, and every A of the matmul product, needs no dW either: ``dx`` is formed from
  ``g = dy W0``, and ``da = sum x * g``;
* A as a hadamard vector needs ``da_n = sum_m dy_mn z_mn`` with ``z = x W0^T``. The output contains
  z already, ``y = (1 + a) z + x B^T + b_eff``, so ``da`` is solved for, except in rows where that
  would lose digits: see ``row_scale.py``;
* A as a hadamard low rank needs dW itself: ``dAd = (dW * W0) Au^T``, ``dAu = Ad^T (dW * W0)``.
  That is one more unit, and the gradient of B is then formed from dW as well.

Shapes: dy (M, N), x (M, K), weight (N, K).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..backend import BackwardCall, SlotGradients
from ..gradient_routes import needs_weight_gradient, scales_inputs
from ..terms import Constant, LowRank, Term, Terms, Vector, compute_dtype
from .assemble import assemble, factors_as, row_scale
from .row_scale import row_scale_gradient
from .storages import into_storages
from .thin import b_gradient, contract_b, matmul_a_gradient


def backward(call: BackwardCall) -> tuple[Tensor | None, SlotGradients]:
    """The gradient of x, if wanted, and the gradients of the storages of every wanted slot."""
    wanted = call.wanted
    db = None
    if wanted & {"C", "D", "E"} or call.output is not None:
        db = call.dy.sum(0, dtype=compute_dtype(call.dy.dtype))
    grads = (
        {}
        if db is None
        else {slot: bias_gradient(slot, db, call.weight, call.bias, call.terms) for slot in wanted & {"C", "D", "E"}}
    )
    if needs_weight_gradient(call.terms, wanted):
        grads.update(_gradients_through_dw(call))
    elif "A" in wanted and scales_inputs(call.terms):
        dx, grads["A"] = _scaled_input_gradient(call)
        grads.update(_b_gradients(call))
        return dx if call.wants_x else None, grads
    elif wanted & {"A", "B"}:
        grads.update(_thin_gradients(call, db))
    return _input_gradient(call) if call.wants_x else None, grads


def _input_gradient(call: BackwardCall) -> Tensor:
    """``dx = dy W_eff``."""
    terms = Terms(A=call.terms.A, B=call.terms.B, product=call.terms.product)
    w_eff, _ = assemble(call.weight, None, terms, call.projected)
    return call.dy @ w_eff


def _gradients_through_dw(call: BackwardCall) -> SlotGradients:
    """The gradients of A, and of B if wanted, from the dense dW; A is a low rank of the hadamard product."""
    dy, x, terms = call.dy, call.x, call.terms
    assert x is not None and terms.A is not None
    dw = (dy.t() @ x).to(compute_dtype(dy.dtype))
    grads: SlotGradients = {}
    if "B" in call.wanted:
        assert terms.B is not None
        grads["B"] = contract(terms.B, dw)
    grads["A"] = contract(terms.A, dw.mul_(call.weight))
    return grads


def contract(term: Term, dw: Tensor) -> tuple[Tensor, ...]:
    """Gradients of a term that adds its (N, K) matrix to a matrix whose gradient is ``dw``."""
    if isinstance(term, LowRank):
        down, up = factors_as(term, dw.dtype)
        return into_storages(term, (up @ dw.t()).t(), down.t() @ dw)
    return into_storages(term, dw.sum(1))


def _b_gradients(call: BackwardCall) -> SlotGradients:
    if "B" not in call.wanted:
        return {}
    return {"B": b_gradient(call, contract_b(call))}


def _thin_gradients(call: BackwardCall, db: Tensor | None) -> SlotGradients:
    """The gradients of A and B where no dW is needed and A does not scale inputs."""
    dy, x, weight, terms = call.dy, call.x, call.weight, call.terms
    if "A" not in call.wanted:
        return _b_gradients(call)
    assert x is not None
    if isinstance(terms.A, LowRank):
        assert call.projected is not None
        return {"A": matmul_a_gradient(dy, x, weight, terms.A, call.projected), **_b_gradients(call)}
    grads: SlotGradients = {}
    thin = None
    if terms.B is not None and ("B" in call.wanted or call.output is not None):
        thin = contract_b(call)
        if "B" in call.wanted:
            grads["B"] = b_gradient(call, thin)
    assert terms.A is not None
    da = row_scale_gradient(call, db, thin)
    return {"A": into_storages(terms.A, da), **grads}


def _scaled_input_gradient(call: BackwardCall) -> tuple[Tensor, tuple[Tensor, ...]]:
    """dx and the gradients of A where A scales inputs: ``g = dy W0, dx = g (1 + a) + dy B, da = sum x * g``."""
    dy, x, terms = call.dy, call.x, call.terms
    assert x is not None and terms.A is not None
    wide = compute_dtype(dy.dtype)
    g = (dy @ call.weight).to(wide)
    da = torch.linalg.vecdot(x.to(wide), g, dim=0)
    dx = g.mul_(row_scale(terms, wide))
    if isinstance(terms.B, LowRank):
        down, up = factors_as(terms.B, dy.dtype)
        dx.addmm_((down.t() @ dy.t()).t().to(wide), up.to(wide))
    elif isinstance(terms.B, Vector):
        dx.add_((dy @ terms.B.entries.to(dy.dtype)[:, None]).to(wide))
    elif isinstance(terms.B, Constant):
        dx.add_(dy.sum(1, keepdim=True, dtype=wide) * terms.B.entry.to(wide))
    return dx.to(dy.dtype), into_storages(terms.A, da)


def bias_gradient(slot: str, db: Tensor, weight: Tensor, bias: Tensor | None, terms: Terms) -> tuple[Tensor, ...]:
    """Gradients of C, D or E from ``db = sum_m dy``, (N,)."""
    term = getattr(terms, slot)
    if slot == "D":
        assert bias is not None
        return into_storages(term, db * bias)
    if slot == "E":
        return into_storages(term, db)
    dc = weight.to(db.dtype).t() @ db
    if isinstance(term, Vector):
        return into_storages(term, dc)
    down, up = factors_as(term, db.dtype)
    return into_storages(term, dc[:, None] @ up.t(), (down.t() @ dc)[:, None])
