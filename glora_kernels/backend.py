"""What a backward pass works from, and what it returns."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

from torch import Tensor

from .terms import Terms

SlotGradients = dict[str, tuple[Tensor, ...]]  # of each wanted slot, in the order of its storages


class BackwardCall(NamedTuple):
    """One backward pass.

    Attributes:
        dy: the gradient of y, (M, N).
        x: (M, K), or None if neither A nor B wants a gradient, or only one that reads ``token_sums``.
        weight, bias, terms: as in the forward pass.
        output, b_eff: y, (M, N), if it is at hand and unchanged, and the bias (N,) that was added to it.
        projected: V = W0 Ad, (N, r), where A is a low rank of the matmul product.
        wanted: the slots that want a gradient.
        wants_x: whether x does.
        token_sums: ``sum_k x_mk``, (M,), where they were kept in place of x.
    """

    dy: Tensor
    x: Tensor | None
    weight: Tensor
    bias: Tensor | None
    terms: Terms
    output: Tensor | None
    b_eff: Tensor | None
    projected: Tensor | None
    wanted: frozenset[str]
    wants_x: bool
    token_sums: Tensor | None = None


class ForwardResult(NamedTuple):
    """What a forward pass returns.

    Attributes:
        y: the output.
        projected: V = W0 Ad, (N, r), where A is a low rank of the matmul product: backward reads it too.
        b_eff: the bias (N,) that was added, or None.
    """

    y: Tensor
    projected: Tensor | None
    b_eff: Tensor | None


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

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None, terms: Terms) -> ForwardResult:
        """y for x of any leading shape."""

    def backward(self, call: BackwardCall) -> tuple[Tensor | None, SlotGradients]:
        """The gradient of x, if wanted, and those of the storages of every wanted slot."""

    def assemble(self, weight: Tensor, bias: Tensor | None, terms: Terms) -> tuple[Tensor, Tensor | None]:
        """``(W_eff, b_eff)``, formed in the compute dtype and rounded once; what no term changes is not copied."""

    def project(self, weight: Tensor, terms: Terms) -> Tensor | None:
        """V = W0 Ad, (N, r), where A is a low rank of the matmul product."""
