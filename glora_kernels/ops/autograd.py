"""The differentiable layer, for every backend that computes gradients in closed form: save, call, return.

It is an ``autograd.Function`` of the old style around plain functions. A registered operator with its own autograd
formula costs 40 microseconds more per call; ``operators.py`` has one, for compilers.
"""

from __future__ import annotations

import math
from operator import is_
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import reference
from ..backend import Backend, BackwardCall
from ..gradient_routes import reads_token_sums, reuses_output, scales_rows
from ..precision import without_autocast
from ..terms import Structure, Terms
from ..torch_private import autocast_is_on, is_batched, saving_hooks_are_on, version_of

_X, _FIRST_STORAGE = 3, 7  # places among the arguments of _GLoRALinear.forward


class CallPlan(NamedTuple):
    """What is known of a call before it is made; it depends only on the kinds and on which tensors want a gradient.

    Attributes:
        structure: the structure of the terms.
        wanted: see :func:`wanted_slots`.
        reads_x, reads_sums: whether a gradient of a storage depends on x; whether only on ``sum_k x_mk``.
        may_solve: whether the gradient of A can be solved from the output.
        of_leaves: whether all storages are leaves of autograd, which their owner keeps alive anyway.
    """

    structure: Structure
    wanted: frozenset[str]
    reads_x: bool
    reads_sums: bool
    may_solve: bool
    of_leaves: bool


def plan_of(terms: Terms, has_bias: bool) -> CallPlan:
    wanted = wanted_slots(terms, has_bias)
    return CallPlan(
        terms.flatten()[1],
        wanted,
        "A" in wanted or "B" in wanted,
        reads_token_sums(terms, wanted),
        "A" in wanted and scales_rows(terms),
        all(storage.is_leaf for storage in terms.storages),
    )


def glora_linear(backend: Backend, x: Tensor, weight: Tensor, bias: Tensor | None, terms: Terms) -> Tensor:
    """See :func:`glora_kernels.glora_linear`."""
    if not torch.is_grad_enabled():
        return backend.forward(x, weight, bias, terms).y
    return differentiable(backend, plan_of(terms, bias is not None), x, weight, bias, terms)


def differentiable(
    backend: Backend, plan: CallPlan, x: Tensor, weight: Tensor, bias: Tensor | None, terms: Terms
) -> Tensor:
    """:func:`glora_linear` if grad mode is on, with what :func:`plan_of` returns for these terms."""
    if backend.whole_layer is not None:
        return backend.whole_layer(x, weight, bias, terms)
    # Formed by autograd, so that second derivatives reach x through them.
    token_sums = x.sum(-1) if plan.reads_sums and backend.takes_token_sums else None
    return _GLoRALinear.apply(backend, plan, terms, x, token_sums, weight, bias, *terms.storages)


class _GLoRALinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        backend: Backend,
        plan: CallPlan,
        terms: Terms,
        x: Tensor,
        token_sums: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        *storages: Tensor,
    ):
        y, projected, b_eff = backend.forward(x, weight, bias, terms)
        ctx.backend, ctx.plan, ctx.x_shape = backend, plan, x.shape
        ctx.terms = terms if plan.of_leaves else None  # this reference would keep storages that are no leaves alive
        keep = plan.may_solve and reuses_output(_tokens(x.shape), x.shape[-1], terms) and _can_be_kept(y, backend)
        ctx.output = y.detach() if keep else None  # shares y's version counter; detached, so in no cycle with ctx
        ctx.output_version = version_of(y) if keep else None
        kept_x = x if plan.reads_x and token_sums is None else None
        ctx.save_for_backward(kept_x, token_sums, projected, b_eff if keep else None, weight, bias, *storages)
        return y

    @staticmethod
    def backward(ctx, dy: Tensor):
        if not autocast_is_on():
            return _backward(ctx, dy)
        with without_autocast(dy.device.type):  # backward may run inside the block that forward ran in
            return _backward(ctx, dy)


def _tokens(shape: torch.Size) -> int:
    return shape[0] if len(shape) == 2 else math.prod(shape[:-1])


def _flat(tensor: Tensor) -> Tensor:
    """``(M, ...)``; a reshape costs a microsecond where it changes nothing."""
    return tensor if tensor.dim() == 2 else tensor.reshape(_tokens(tensor.shape), tensor.shape[-1])


def _backward(ctx, dy: Tensor):
    x, token_sums, projected, b_eff, weight, bias, *storages = ctx.saved_tensors
    output, ctx.output = ctx.output, None
    # Second derivatives, and gradients batched by vmap, go through plainly composed operations.
    if torch.is_grad_enabled() or is_batched(dy):
        return _differentiable_backward(ctx, dy, x, token_sums, weight, bias, storages)
    # A successor such as ReLU(inplace=True) may have overwritten y: then z is formed again.
    if output is not None and version_of(output) != ctx.output_version:
        output = None
    terms, needed = _terms_of(ctx, storages), ctx.needs_input_grad
    call = BackwardCall(
        _flat(dy),
        None if x is None else _flat(x),
        weight,
        bias,
        terms,
        None if output is None else _flat(output),
        b_eff,
        projected,
        ctx.plan.wanted,
        needed[_X],
        None if token_sums is None else token_sums.reshape(-1),
    )
    dx, grads = ctx.backend.backward(call)
    if dx is not None and len(ctx.x_shape) != 2:
        dx = dx.reshape(ctx.x_shape)
    found: list[Tensor | None] = []
    for slot, term in terms.active:
        found += grads[slot] if slot in grads else (None,) * len(term.storages)
    if not all(needed[_FIRST_STORAGE:]):
        found = [grad if need else None for grad, need in zip(found, needed[_FIRST_STORAGE:])]
    return None, None, None, dx, None, None, None, *found


def _terms_of(ctx, storages: list[Tensor]) -> Terms:
    """The terms of the saved ``storages``: those of the forward pass, unless hooks have put others in their place."""
    if ctx.terms is not None and all(map(is_, storages, ctx.terms.storages)):
        return ctx.terms
    return Terms.unflatten(storages, ctx.plan.structure)


def wanted_slots(terms: Terms, has_bias: bool) -> frozenset[str]:
    """Slots with a storage that wants a gradient; D has none where there is no bias to scale."""
    wanting = {slot for slot, term in terms.active for storage in term.storages if storage.requires_grad}
    return frozenset(wanting if has_bias else wanting - {"D"})


def _can_be_kept(y: Tensor, backend: Backend) -> bool:
    """Whether y may be kept outside ``save_for_backward`` and reused in backward.

    Under saved-tensor hooks (checkpointing, offloading) keeping it would defeat their purpose, and a
    change in place could not be seen. Reuse depends on values, which meta and fake tensors do not have.
    If the host reads the values, a CUDA graph cannot be captured.
    """
    if type(y) is not Tensor or y.device.type == "meta" or version_of(y) is None:
        return False
    if backend.reads_values and y.is_cuda and torch.cuda.is_current_stream_capturing():
        return False
    return not saving_hooks_are_on()


def _differentiable_backward(ctx, dy, x, token_sums, weight, bias, storages):
    """The same gradients through the reference formula; differentiable again if grad mode is on."""
    create_graph = torch.is_grad_enabled()
    inputs_grad, storages_grad = ctx.needs_input_grad[_X], ctx.needs_input_grad[_FIRST_STORAGE:]
    with torch.enable_grad():
        if token_sums is not None:  # gradients depend on nothing of x but these sums
            x = F.pad(token_sums.unsqueeze(-1), (0, ctx.x_shape[-1] - 1))
        elif x is None:  # neither A nor B: no gradient depends on the values of x
            x = dy.new_zeros(ctx.x_shape).requires_grad_(inputs_grad)
        y = reference.glora_linear(x, weight, bias, Terms.unflatten(storages, ctx.plan.structure))
    inputs, needed = [x, *storages], [inputs_grad, *storages_grad]
    wanted = [tensor for tensor, need in zip(inputs, needed) if need]
    found = iter(torch.autograd.grad(y, wanted, dy, create_graph=create_graph, allow_unused=True))
    dx, *grads = (next(found) if need else None for need in needed)
    return None, None, None, dx, None, None, None, *grads
