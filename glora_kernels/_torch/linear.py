"""The forward pass of the torch backend: W_eff in one pass, then one dense product."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from ..backend import ForwardResult
from ..terms import Terms
from ..torch_private import unsafe_view
from .assemble import assemble, project


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, terms: Terms) -> ForwardResult:
    """y for x of any leading shape."""
    projected = project(weight, terms)
    w_eff, b_eff = assemble(weight, bias, terms, projected)
    y = F.linear(x, w_eff, b_eff)
    if x.dim() != 2:  # in place of a view, which a successor such as ReLU(inplace=True) could not overwrite
        y = unsafe_view(y, y.shape)
    return ForwardResult(y, projected, b_eff)
