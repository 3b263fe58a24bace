"""The Triton backend: it makes plans, and leaves weights without elements to the torch backend."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from .. import _torch
from ..backend import BackwardCall, ForwardResult, Plan, SlotGradients, by_slot
from ..terms import LowRank, Terms
from . import plan as plans


@dataclass(frozen=True)
class TritonBackend:
    """See :class:`glora_kernels.backend.Backend`.

    Attributes:
        strategy: ``"assemble"`` or ``"fused"``; None lets the cost model choose.
    """

    strategy: str | None = None

    whole_layer: ClassVar[None] = None

    @property
    def reads_values(self) -> bool:
        """No: the device decides which rows of da are lost."""
        return False

    def plan(self, weight: Tensor, bias: Tensor | None, terms: Terms, wanted: frozenset[str], wants_x: bool) -> Plan:
        """The plan of calls with these operands."""
        if weight.numel() == 0:
            return _torch.plan(weight, bias, terms, wanted, wants_x)
        return plans.plan(weight, bias, terms, wanted, wants_x, self.strategy)

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None, terms: Terms) -> ForwardResult:
        """y for x of any leading shape."""
        return self.plan(weight, bias, terms, frozenset(), False).forward(x, weight, bias, terms.storages)

    def backward(self, call: BackwardCall) -> tuple[Tensor | None, SlotGradients]:
        """The gradient of x, if wanted, and the gradients of the storages of every wanted slot."""
        plan = self.plan(call.weight, call.bias, call.terms, call.wanted, call.wants_x)
        operands = call.dy, call.x, call.weight, call.bias, call.terms.storages
        dx, grads = plan.backward(*operands, call.output, call.b_eff, call.projected, None)
        return dx, by_slot(call.terms, grads)

    def assemble(self, weight: Tensor, bias: Tensor | None, terms: Terms) -> tuple[Tensor, Tensor | None]:
        """``(W_eff, b_eff)``, rounded once."""
        return _torch.assemble(weight, bias, terms) if weight.numel() == 0 else plans.assemble(weight, bias, terms)

    def project(self, weight: Tensor, terms: Terms) -> Tensor | None:
        """V = W0 Ad, (N, r), where A is a low rank of the matmul product."""
        if weight.numel() == 0 or terms.product != "matmul" or not isinstance(terms.A, LowRank):
            return _torch.project(weight, terms)
        return plans.project(weight, terms)
