"""What a backward pass works from."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ..terms import Terms


class Step(NamedTuple):
    """One backward pass.

    Attributes:
        dy: the gradient of y, (M, N).
        x: (M, K), or None if neither A nor B wants a gradient.
        weight, bias, terms: as in the forward pass.
        output, b_eff: y, (M, N), if it is at hand and unchanged, and the bias (N,) that was added to it.
        projected: what ``assemble.project`` returned.
        wanted: the slots that want a gradient.
        wants_x: whether x does.
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
