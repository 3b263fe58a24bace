"""The Triton backend: it makes plans, and leaves weights without elements to the torch backend."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from .. import _torch
from ..backend import Plan
from ..terms import Terms
from . import plan as plans


@dataclass(frozen=True)
class TritonBackend:
    """See :class:`glora_kernels.backend.Backend`.

    Attributes:
        strategy: ``"assemble"`` or ``"fused"``; None lets the cost model choose.
        reads_values: never; the device decides which rows of da are lost.
    """

    strategy: str | None = None

    whole_layer: ClassVar[None] = None
    reads_values: ClassVar[bool] = False

    def plan(self, weight: Tensor, bias: Tensor | None, terms: Terms, wanted: frozenset[str], wants_x: bool) -> Plan:
        """The plan of calls with these operands."""
        if weight.numel() == 0:
            return _torch.plan(weight, bias, terms, wanted, wants_x)
        return plans.plan(weight, bias, terms, wanted, wants_x, self.strategy)
