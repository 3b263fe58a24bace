"""What the differentiable layer calls: it makes shapes flat, chooses a strategy and launches kernels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from .. import _torch
from ..backend import BackwardCall, ForwardResult, Plan, PlanOfPasses, SlotGradients
from ..planning.prediction import strategy_for
from ..planning.problem import Problem
from ..terms import Terms
from ..torch_private import unsafe_view
from .backward import backward
from .context import context
from .device import architecture
from .forward import assemble, forward, project


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
        return PlanOfPasses(self, terms, wanted, wants_x)

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None, terms: Terms) -> ForwardResult:
        """y for x of any leading shape."""
        if x.numel() == 0 or weight.numel() == 0:
            return _torch.forward(x, weight, bias, terms)
        flat, weight = plain(x.reshape(-1, x.shape[-1])), plain(weight)
        y, projected, b_eff = forward(flat, weight, bias, terms, self._strategy(flat, weight, terms))
        if x.dim() != 2:  # in place of a view, which a successor such as ReLU(inplace=True) could not overwrite
            y = unsafe_view(y, (*x.shape[:-1], weight.shape[0]))
        return ForwardResult(y, projected, b_eff)

    def backward(self, call: BackwardCall) -> tuple[Tensor | None, SlotGradients]:
        """The gradient of x, if wanted, and the gradients of the storages of every wanted slot."""
        if call.dy.numel() == 0 or call.weight.numel() == 0:
            return _torch.backward(call)
        x = None if call.x is None else plain(call.x)
        call = call._replace(dy=plain(call.dy), x=x, weight=plain(call.weight))
        return backward(call, self._strategy(call.dy, call.weight, call.terms))

    def assemble(self, weight: Tensor, bias: Tensor | None, terms: Terms) -> tuple[Tensor, Tensor | None]:
        """``(W_eff, b_eff)``, rounded once."""
        if weight.numel() == 0:
            return _torch.assemble(weight, bias, terms)
        w_eff, b_eff, _ = assemble(plain(weight), bias, terms, context(0, weight))
        return w_eff, b_eff

    def project(self, weight: Tensor, terms: Terms) -> Tensor | None:
        """V = W0 Ad, (N, r), where A is a low rank of the matmul product."""
        return _torch.project(weight, terms) if weight.numel() == 0 else project(weight, terms, context(0, weight))

    def _strategy(self, tokens: Tensor, weight: Tensor, terms: Terms) -> str:
        if self.strategy is not None:
            return self.strategy
        name = architecture(weight.device)
        return strategy_for(Problem.of(tokens.shape[0], weight, terms, name))


def plain(tensor: Tensor) -> Tensor:
    """The tensor without a pending negation (``z.conj().imag`` has one): only PyTorch's own operations would see it."""
    return tensor.resolve_neg() if tensor.is_neg() else tensor
