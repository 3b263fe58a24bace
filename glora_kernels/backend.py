"""What a backend offers: the plan of a layer call, made once and run many times."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

from torch import Tensor

from .terms import Terms


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


class Plan(Protocol):
    """One layer call, planned once and run many times.

    Kinds, ranks, shapes, dtypes and what wants a gradient are fixed; values and the number of tokens are not. Strides
    are those of the planned call, unless saved-tensor hooks put other tensors in place of the saved ones. A plan holds
    no tensor: it lives as long as a graph of autograd. Storages are given in the order of ``terms.storages``.

    Attributes:
        reads_token_sums: whether ``sum_k x_mk``, (M,), is all that backward reads of x.
    """

    @property
    def reads_token_sums(self) -> bool: ...

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None, storages: Sequence[Tensor]) -> ForwardResult:
        """y for x of any leading shape."""

    def backward(
        self,
        dy: Tensor,
        x: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        storages: Sequence[Tensor],
        output: Tensor | None,
        b_eff: Tensor | None,
        projected: Tensor | None,
        token_sums: Tensor | None,
    ) -> tuple[Tensor | None, Sequence[Tensor | None]]:
        """The gradient of x, (M, K), if wanted, and one for each storage: None where its slot is not wanted.

        Args:
            dy: the gradient of y, (M, N).
            x: (M, K), or None if no gradient reads it, or if its ``token_sums`` are given in its place.
            output: y, (M, N), if it is at hand and unchanged.
            b_eff: of the forward pass, only together with ``output``.
            projected: of the forward pass; formed again if it is not at hand.
            token_sums: ``sum_k x_mk``, (M,), if they are at hand.
        """

    def assemble(self, weight: Tensor, bias: Tensor | None, storages: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
        """``(W_eff, b_eff)``, formed in the compute dtype and rounded once; what no term changes is not copied."""


class Backend(Protocol):
    """A backend with gradients in closed form; its arguments have been checked, and autocast is off.

    Attributes:
        reads_values: whether the host looks at values in backward, so that it cannot be captured in a CUDA graph.
    """

    @property
    def reads_values(self) -> bool: ...

    @property
    def whole_layer(self) -> Callable[[Tensor, Tensor, Tensor | None, Terms], Tensor] | None:
        """Forward and backward as one call with its own autograd node; None: :mod:`.ops.autograd` makes the node."""

    def plan(self, weight: Tensor, bias: Tensor | None, terms: Terms, wanted: frozenset[str], wants_x: bool) -> Plan:
        """The plan of calls with these operands; ``wanted`` are the slots that want a gradient."""
