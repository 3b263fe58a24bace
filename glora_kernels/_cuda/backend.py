"""The extension as a backend: it packs the terms for C++."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..backend import ForwardResult
from ..path_encoding import CODES, PLACES, STORAGES, places_of
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

    def plan(
        self, weight: Tensor, bias: Tensor | None, terms: Terms, wanted: frozenset[str], wants_x: bool
    ) -> ExtensionPlan:
        """The plan of calls with these operands."""
        return ExtensionPlan(self.extension, terms, wanted, wants_x)


class ExtensionPlan:
    """See :class:`glora_kernels.backend.Plan`."""

    reads_token_sums = False

    def __init__(self, extension: Any, terms: Terms, wanted: frozenset[str], wants_x: bool):
        self._extension, self._places = extension, places_of(terms)
        _, self._config, self._matmul = pack(terms)
        self._wanted, self._wants_x = [slot in wanted for slot in SLOTS], wants_x

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None, storages: Sequence[Tensor]) -> ForwardResult:
        """y for x of any leading shape."""
        return ForwardResult(*self._extension.forward(x, weight, bias, *self._packed(storages)))

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
    ) -> tuple[Tensor | None, list[Tensor | None]]:
        """The gradient of x, if wanted, and one for each storage."""
        packed = self._packed(storages)
        dx, *grads = self._extension.backward(dy, x, weight, bias, *packed, projected, self._wanted, self._wants_x)
        return dx, [grads[place] for place in self._places]

    def assemble(self, weight: Tensor, bias: Tensor | None, storages: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
        """``(W_eff, b_eff)``, rounded once."""
        return self._extension.assemble(weight, bias, *self._packed(storages))

    def _packed(self, storages: Sequence[Tensor]) -> Packed:
        placed: list[Tensor | None] = [None] * len(STORAGES)
        for place, storage in zip(self._places, storages):
            placed[place] = storage
        return placed, self._config, self._matmul
