"""What a backend offers, and how one is found."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from . import _torch
from .dispatch import Decision
from .step import Forward, SlotGradients, Step
from .terms import Terms


class Backend(Protocol):
    """Gradients in closed form; arguments have been checked, and autocast is off.

    Attributes:
        reads_values: whether the host looks at values in backward, so that it cannot be captured in a CUDA graph.
        takes_token_sums: whether ``sum_k x_mk`` serves in backward in place of x, where nothing else of x is read.
    """

    @property
    def reads_values(self) -> bool: ...

    @property
    def takes_token_sums(self) -> bool: ...

    @property
    def whole_layer(self) -> Callable[[Tensor, Tensor, Tensor | None, Terms], Tensor] | None:
        """Forward and backward as one call, with an autograd node of its own; None: :mod:`.autograd` has the node."""

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None, terms: Terms) -> Forward:
        """y for x of any leading shape."""

    def backward(self, step: Step) -> tuple[Tensor | None, SlotGradients]:
        """The gradient of x, if wanted, and those of the storages of every wanted slot."""

    def assemble(self, weight: Tensor, bias: Tensor | None, terms: Terms) -> tuple[Tensor, Tensor | None]:
        """``(W_eff, b_eff)``, formed in the compute dtype and rounded once; what no term changes is not copied."""

    def project(self, weight: Tensor, terms: Terms) -> Tensor | None:
        """V = W0 Ad, (N, r), where A is a low rank of the matmul product."""


def backend_for(decision: Decision) -> Backend:
    """The backend that was decided for (not the reference); Triton is loaded at its first use."""
    if decision.backend == "torch":
        return _torch
    if decision.backend == "cuda":
        from ._cuda import ExtensionBackend

        return ExtensionBackend()
    from ._triton import TritonBackend

    return TritonBackend(decision.strategy)
