"""The gradients of the storages from the gradients of W_eff and b_eff, where dW is a dense (N, K) matrix."""

from __future__ import annotations

from torch import Tensor

from ..backend import SlotGradients
from ..terms import LowRank, Terms, compute_dtype
from .assemble import factors_as
from .gradients import bias_gradient, contract
from .storages import into_storages


def contract_dense(
    weight: Tensor, bias: Tensor | None, terms: Terms, dw: Tensor | None, db: Tensor | None, wanted: frozenset[str]
) -> SlotGradients:
    """The gradients of every wanted slot.

    Args:
        weight, bias, terms: as in the forward pass; ``weight`` is (N, K).
        dw: the gradient of W_eff, (N, K); read if A or B is wanted.
        db: the gradient of b_eff, (N,); read if C, D or E is wanted.
    """
    wide = compute_dtype(weight.dtype)
    grads: SlotGradients = {}
    if wanted & {"A", "B"}:
        assert dw is not None
        dw = dw.to(wide)
        if "B" in wanted:
            assert terms.B is not None
            grads["B"] = contract(terms.B, dw)
        if "A" in wanted:
            grads["A"] = _contract_a(weight.to(wide), terms, dw)
    for slot in wanted & {"C", "D", "E"}:
        assert db is not None
        grads[slot] = bias_gradient(slot, db.to(wide), weight, bias, terms)
    return grads


def _contract_a(weight: Tensor, terms: Terms, dw: Tensor) -> tuple[Tensor, ...]:
    """The gradients of A. Hadamard: ``dA = dW * W0``. Matmul: ``dA = W0^T dW``, (K, K), which is never formed."""
    term = terms.A
    assert term is not None
    if terms.product == "hadamard":
        return contract(term, dw * weight)
    if not isinstance(term, LowRank):
        return into_storages(term, (dw * weight).sum(0))
    down, up = factors_as(term, dw.dtype)
    return into_storages(term, weight.t() @ (dw @ up.t()), (weight @ down).t() @ dw)
