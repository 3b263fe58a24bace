"""The layer with A as a hadamard vector, at 2 dense products and without reading values on the host.

The torch backend solves the gradient of a row scale from the output, and looks on the host for rows where that loses
digits. A CUDA graph cannot do that. Here ``z = x W0^T`` itself is formed and kept for backward in place of the output:

    y = (1 + a) z + (x Bu^T) Bd^T + b_eff,    da_n = sum_m dy_mn z_mn

z takes the one product that forward needs anyway. W_eff is formed only in backward, for dx.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from .._torch import TorchPlan
from ..checks import check_call
from ..precision import cast_operands, without_autocast
from ..terms import LowRank, Structure, Terms, Vector, compute_dtype
from ..torch_private import unsafe_view
from .autograd import flat, wanted_slots
from .recompute import to_keep, x_and_rest


def row_scaled_linear(x: Tensor, weight: Tensor, bias: Tensor | None, terms: Terms) -> Tensor:
    """:func:`glora_kernels.glora_linear` for A as a hadamard vector and B as a low rank or none.

    Args:
        x: tokens, ``(..., K)``.
        weight: frozen ``W0``, ``(N, K)``.
        bias: frozen ``b0``, ``(N,)``, or None.
        terms: as :func:`glora_kernels.row_scaled_terms` makes them.

    Returns:
        ``(..., N)`` in the dtype of ``x``; under ``torch.autocast``, in the autocast dtype. z is rounded to that dtype
        once before it is scaled, so y does not have the bits of a merged layer. x and z are kept for backward.
        Differentiable once.

    Raises:
        TypeError, ValueError: an argument that does not fit, by name, before anything is computed.
    """
    x, weight, bias = cast_operands(x, weight, bias)
    check_call(x, weight, bias, terms)
    if terms.product != "hadamard" or not isinstance(terms.A, Vector) or not isinstance(terms.B, (LowRank, type(None))):
        raise ValueError(f"terms: expected a hadamard A as a vector and B as a low rank or none, got {terms}")
    with without_autocast(x.device.type):
        wanted = wanted_slots(terms, bias is not None)
        plan = TorchPlan(x.dtype, terms, wanted - {"A"}, x.requires_grad)
        return _RowScaled.apply(plan, terms.structure, wanted, x, weight, bias, *terms.storages)


class _RowScaled(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        plan: TorchPlan,
        structure: Structure,
        wanted: frozenset[str],
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        *storages: Tensor,
    ):
        ctx.plan, ctx.x_shape = plan, x.shape
        tokens = x.reshape(-1, x.shape[-1])
        z = F.linear(tokens, weight)
        kept, ctx.form_x = to_keep(x) if "B" in wanted else ((None,), None)
        ctx.save_for_backward(*kept, z if "A" in wanted else None, weight, bias, *storages)
        b_eff = plan.effective_bias(weight, bias, storages)
        y = _forward(tokens, z, b_eff, Terms.unflatten(storages, structure))
        # in place of a view, which a successor such as ReLU(inplace=True) could not overwrite
        return unsafe_view(y, (*x.shape[:-1], weight.shape[0]))

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        with without_autocast(dy.device.type):
            return _backward(ctx, dy)


def _forward(x: Tensor, z: Tensor, b_eff: Tensor | None, terms: Terms) -> Tensor:
    """y, summed in the compute dtype and rounded once."""
    assert isinstance(terms.A, Vector)
    wide = compute_dtype(x.dtype)
    y = z.to(wide) * (terms.A.entries.to(wide) + 1)
    if isinstance(terms.B, LowRank):
        down, up = terms.B.factors
        y.addmm_((x @ up.to(x.dtype).t()).to(wide), down.to(wide).t())
    return (y if b_eff is None else y.add_(b_eff)).to(x.dtype)


def _backward(ctx, dy: Tensor):
    x, (z, weight, bias, *storages) = x_and_rest(ctx)
    dy = dy.reshape(math.prod(ctx.x_shape[:-1]), weight.shape[0])
    dx, grads = ctx.plan.backward(dy, None if x is None else flat(x), weight, bias, storages, None, None, None, None)
    if z is not None:
        wide = compute_dtype(dy.dtype)
        grads[0] = torch.linalg.vecdot(dy.to(wide), z.to(wide), dim=0).to(storages[0].dtype)
    needed = (grad if need else None for grad, need in zip(grads, ctx.needs_input_grad[6:]))
    return None, None, None, None if dx is None else dx.reshape(ctx.x_shape), None, None, *needed
