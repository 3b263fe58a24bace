"""The extension as a backend: it packs the terms for C++."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..backend import BackwardCall, ForwardResult, Plan, PlanOfPasses, SlotGradients
from ..path_encoding import CODES, PLACES, STORAGES
from ..terms import SLOTS, Constant, LowRank, Terms, Vector
from .extension import load

_CODES = {Constant: CODES["constant"], Vector: CODES["vector"], LowRank: CODES["lora"]}
Packed = tuple[list[Tensor | None], list[int], bool]


def pack(terms: Terms) -> Packed:
    """What csrc/layer.h takes: the eight storages, kind and rank of each slot, and whether the product is matmul."""
    storages: list[Tensor | None] = [None] * len(STORAGES)
    config = [0] * (2 * len(SLOTS))
    for slot, term in terms.active:
        for place, storage in zip(PLACES[slot], term.storages):
            storages[place] = storage
        index = 2 * SLOTS.index(slot)
        config[index] = _CODES[type(term)]
        if isinstance(term, LowRank):
            config[index + 1] = term.read_rank
    return storages, config, terms.product == "matmul"


class ExtensionBackend:
    """See :class:`glora_kernels.backend.Backend`. A hadamard A of any kind needs dW; the output is not kept."""

    reads_values = False

    def __init__(self) -> None:
        self.extension: Any = load()

    def whole_layer(self, x: Tensor, weight: Tensor, bias: Tensor | None, terms: Terms) -> Tensor:
        """A whole layer: one call of C++, and one node of autograd for its backward."""
        return self.extension.linear(x, weight, bias, *pack(terms))

    def plan(self, weight: Tensor, bias: Tensor | None, terms: Terms, wanted: frozenset[str], wants_x: bool) -> Plan:
        """The plan of calls with these operands."""
        return PlanOfPasses(self, terms, wanted, wants_x)

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None, terms: Terms) -> ForwardResult:
        """y for x of any leading shape."""
        return ForwardResult(*self.extension.forward(x, weight, bias, *pack(terms)))

    def backward(self, call: BackwardCall) -> tuple[Tensor | None, SlotGradients]:
        """The gradient of x, if wanted, and the gradients of the storages of every wanted slot."""
        wanted = [slot in call.wanted for slot in SLOTS]
        dx, *grads = self.extension.backward(
            call.dy, call.x, call.weight, call.bias, *pack(call.terms), call.projected, wanted, call.wants_x
        )
        return dx, {slot: _of(slot, grads, call.terms) for slot in call.wanted}

    def assemble(self, weight: Tensor, bias: Tensor | None, terms: Terms) -> tuple[Tensor, Tensor | None]:
        """``(W_eff, b_eff)``, rounded once."""
        return self.extension.assemble(weight, bias, *pack(terms))

    def project(self, weight: Tensor, terms: Terms) -> Tensor | None:
        """V = W0 Ad, (N, r), where A is a low rank of the matmul product."""
        return self.extension.project(weight, *pack(terms))


def _of(slot: str, grads: Sequence[Tensor], terms: Terms) -> tuple[Tensor, ...]:
    count = len(getattr(terms, slot).storages)
    return tuple(grads[place] for place in PLACES[slot][:count])
