"""What a backend offers: a layer call planned once and run many times, W_eff, and the passes themselves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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


class Plan(Protocol):
    """One layer call, planned once and run many times.

    Kinds, ranks, shapes, dtypes and what wants a gradient are fixed; values and the number of tokens are not. Strides
    are those of the planned call, unless saved-tensor hooks put other tensors in place of the saved ones. A plan holds
    no tensor: it lives as long as a graph of autograd.

    Attributes:
        reads_token_sums: whether backward takes ``sum_k x_mk``, (M,), in place of x.
    """

    @property
    def reads_token_sums(self) -> bool: ...

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None, storages: Sequence[Tensor]) -> ForwardResult:
        """y for x of any leading shape; ``storages`` in the order of ``terms.storages``."""

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
            x: (M, K), or None if no gradient reads it, or only its ``token_sums``.
            output: y, (M, N), if it is at hand and unchanged.
            b_eff, projected: of the forward pass; b_eff only together with ``output``.
            token_sums: ``sum_k x_mk``, (M,), if the plan reads them.
        """


class PlanOfPasses:
    """The :class:`Plan` of a backend whose passes decide at every call."""

    reads_token_sums = False

    def __init__(self, backend: Backend, terms: Terms, wanted: frozenset[str], wants_x: bool):
        self._backend, self._structure, self._wanted, self._wants_x = backend, terms.structure, wanted, wants_x

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None, storages: Sequence[Tensor]) -> ForwardResult:
        return self._backend.forward(x, weight, bias, Terms.unflatten(storages, self._structure))

    def backward(self, dy, x, weight, bias, storages, output, b_eff, projected, token_sums):
        terms = Terms.unflatten(storages, self._structure)
        call = BackwardCall(
            dy, x, weight, bias, terms, output, b_eff, projected, self._wanted, self._wants_x, token_sums
        )
        dx, grads = self._backend.backward(call)
        return dx, by_storage(terms, grads)


def by_storage(terms: Terms, grads: SlotGradients) -> list[Tensor | None]:
    """Gradients by slot in the order of ``terms.storages``, None where there is none."""
    return [grad for slot, term in terms.active for grad in grads.get(slot, (None,) * len(term.storages))]


def by_slot(terms: Terms, grads: Sequence[Tensor | None]) -> SlotGradients:
    """The inverse of :func:`by_storage`, without the slots that have no gradient."""
    rest = iter(grads)
    found = {slot: tuple(next(rest) for _ in term.storages) for slot, term in terms.active}
    return {slot: grads for slot, grads in found.items() if grads[0] is not None}  # type: ignore[misc]


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

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None, terms: Terms) -> ForwardResult:
        """y for x of any leading shape."""

    def backward(self, call: BackwardCall) -> tuple[Tensor | None, SlotGradients]:
        """The gradient of x, if wanted, and those of the storages of every wanted slot."""

    def assemble(self, weight: Tensor, bias: Tensor | None, terms: Terms) -> tuple[Tensor, Tensor | None]:
        """``(W_eff, b_eff)``, formed in the compute dtype and rounded once; what no term changes is not copied."""

    def project(self, weight: Tensor, terms: Terms) -> Tensor | None:
        """V = W0 Ad, (N, r), where A is a low rank of the matmul product."""
