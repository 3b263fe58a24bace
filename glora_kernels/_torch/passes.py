"""Single passes: each makes a plan and runs it once."""

from __future__ import annotations

from torch import Tensor

from ..backend import BackwardCall, ForwardResult, SlotGradients
from ..terms import Terms
from .plans import TorchPlan

NOTHING: frozenset[str] = frozenset()


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, terms: Terms) -> ForwardResult:
    """y for x of any leading shape."""
    return TorchPlan(weight.dtype, terms, NOTHING, False).forward(x, weight, bias, terms.storages)


def backward(call: BackwardCall) -> tuple[Tensor | None, SlotGradients]:
    """The gradient of x, if wanted, and the gradients of the storages of every wanted slot."""
    dy, x, weight, bias, terms, output, b_eff, projected, wanted, wants_x, token_sums = call
    plan = TorchPlan(weight.dtype, terms, wanted, wants_x)
    dx, found = plan.backward(dy, x, weight, bias, terms.storages, output, b_eff, projected, token_sums)
    grads, rest = {}, iter(found)
    for slot, term in terms.active:
        own = tuple(next(rest) for _ in term.storages)
        if slot in wanted:
            grads[slot] = own
    return dx, grads  # type: ignore[return-value]


def assemble(weight: Tensor, bias: Tensor | None, terms: Terms) -> tuple[Tensor, Tensor | None]:
    """``(W_eff, b_eff)``, rounded once; an operand that no term changes is returned as it is."""
    return TorchPlan(weight.dtype, terms, NOTHING, False).assemble(weight, bias, terms.storages)


def project(weight: Tensor, terms: Terms) -> Tensor | None:
    """V = W0 Ad, (N, r), where A is a low rank of the matmul product."""
    return TorchPlan(weight.dtype, terms, NOTHING, False).project(weight, terms.storages)
