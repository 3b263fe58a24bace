"""What a backward pass works from, and what it returns."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

from torch import Tensor

from .terms import Terms

SlotGradients = dict[str, tuple[Tensor, ...]]  # by wanted slot, in the order of the slot's storages


class BackwardCall(NamedTuple):
    """One backward pass.

    Attributes:
        dy: the gradient of y, (M, N).
        x: (M, K), or None if neither A nor B wants a gradient, or the gradient reads only ``token_sums``.
        weight, bias, terms: as in the forward pass.
        output, b_eff: y, (M, N), if it is at hand and unchanged, and the bias (N,) that was added to it.
        projected: V = W0 Ad, (N, r), where A is a low rank of the matmul product.
        wanted: the slots that want a gradient.
        wants_x: whether x does.
        token_sums: ``sum_k x_mk``, (M,), if they were kept in place of x.
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
        projected: V = W0 Ad, (N, r), if A is a low rank of the matmul product: backward reads it too.
        b_eff: the bias (N,) that was added, or None.
    """

    y: Tensor
    projected: Tensor | None
    b_eff: Tensor | None


class Backend(Protocol):
    """A backend with gradients in closed form; its arguments have been checked, and autocast is off.

    Attributes:
        reads_values: whether the host looks at values in backward, so that it cannot be captured in a CUDA graph.
        takes_token_sums: whether backward takes ``sum_k x_mk`` in place of x if it reads nothing else of x.
    """

    @property
    def reads_values(self) -> bool: ...

    @property
    def takes_token_sums(self) -> bool: ...

    @property
    def whole_layer(self) -> Callable[[Tensor, Tensor, Tensor | None, Terms], Tensor] | None:
        """Forward and backward as one call with its own autograd node; None: :mod:`.ops.autograd` makes the node."""

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None, terms: Terms) -> ForwardResult:
        """y for x of any leading shape."""

    def backward(self, call: BackwardCall) -> tuple[Tensor | None, SlotGradients]:
        """The gradient of x, if wanted, and those of the storages of every wanted slot."""

    def assemble(self, weight: Tensor, bias: Tensor | None, terms: Terms) -> tuple[Tensor, Tensor | None]:
        """``(W_eff, b_eff)``, formed in the compute dtype and rounded once; what no term changes is not copied."""

    def project(self, weight: Tensor, terms: Terms) -> Tensor | None:
        """V = W0 Ad, (N, r), where A is a low rank of the matmul product."""
