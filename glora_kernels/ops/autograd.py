"""The differentiable layer, for every backend that computes gradients in closed form: save, call, return.

It is an ``autograd.Function`` of the old style around a plan. A registered operator with its own autograd formula
costs 40 microseconds more per call; ``operators.py`` has one, for compilers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import reference
from ..backend import Backend
from ..gradient_routes import tokens_to_reuse_output
from ..precision import without_autocast
from ..terms import Terms
from ..torch_private import autocast_is_on, hooks_on_top, is_batched, version_of
from .recompute import to_keep, x_and_rest

_X, _FIRST_STORAGE = 2, 5  # places among the arguments of _GLoRALinear.forward


class PlannedCall:
    """A differentiable layer call, planned once and run many times; it holds no tensor.

    Attributes:
        plan: the backend's.
        keeps_x: whether a gradient of a storage reads x itself.
        fewest_kept: from how many elements of x on y is kept, so that the gradient of A can be solved from it.
        reads_values: see :class:`glora_kernels.backend.Backend`.
    """

    __slots__ = ("_structure", "fewest_kept", "keeps_x", "plan", "reads_values")

    def __init__(self, backend: Backend, weight: Tensor, bias: Tensor | None, terms: Terms, wants_x: bool):
        wanted = wanted_slots(terms, bias is not None)
        self._structure = terms.structure
        self.plan = backend.plan(weight, bias, terms, wanted, wants_x)
        self.keeps_x = ("A" in wanted or "B" in wanted) and not self.plan.reads_token_sums
        inputs = weight.shape[1]
        tokens = tokens_to_reuse_output(inputs, terms) if "A" in wanted else None
        self.fewest_kept = math.inf if tokens is None else tokens * inputs
        self.reads_values = backend.reads_values

    def terms(self, storages: Sequence[Tensor]) -> Terms:
        return Terms.unflatten(storages, self._structure)


def glora_linear(backend: Backend, x: Tensor, weight: Tensor, bias: Tensor | None, terms: Terms) -> Tensor:
    """See :func:`glora_kernels.glora_linear`."""
    if not torch.is_grad_enabled():
        return backend.plan(weight, bias, terms, frozenset(), False).forward(x, weight, bias, terms.storages).y
    if backend.whole_layer is not None:
        return backend.whole_layer(x, weight, bias, terms)
    call = PlannedCall(backend, weight, bias, terms, x.requires_grad)
    return differentiable(call)(x, weight, bias, *terms.storages)


def differentiable(call: PlannedCall) -> Callable[..., Tensor]:
    """A function of x, weight, bias and the storages: y, with gradients. Grad mode has to be on where it is called."""
    if call.plan.reads_token_sums:
        return partial(_with_token_sums, call)
    return partial(_GLoRALinear.apply, call, None)


def _with_token_sums(call: PlannedCall, x: Tensor, *operands: Tensor | None) -> Tensor:
    # Formed by autograd, so that second derivatives reach x through them.
    return _GLoRALinear.apply(call, x.sum(-1), x, *operands)


class _GLoRALinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        call: PlannedCall,
        token_sums: Tensor | None,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        *storages: Tensor,
    ):
        y, projected, b_eff = call.plan.forward(x, weight, bias, storages)
        ctx.call, ctx.output = call, None
        if x.numel() >= call.fewest_kept and _can_be_kept(y, call.reads_values):
            ctx.output = y.detach()  # shares y's version counter; detached, so in no cycle with ctx
            ctx.output_version = version_of(y)
        else:
            b_eff = None
        kept, ctx.form_x = to_keep(x) if call.keeps_x else ((None,), None)
        ctx.save_for_backward(*kept, token_sums, projected, b_eff, weight, bias, *storages)
        return y

    @staticmethod
    def backward(ctx, dy: Tensor):
        if not autocast_is_on():
            return _backward(ctx, dy)
        with without_autocast(dy.device.type):  # backward may run inside the block that forward ran in
            return _backward(ctx, dy)


def flat(tensor: Tensor) -> Tensor:
    """``(M, ...)``; a reshape costs a microsecond where it changes nothing."""
    return tensor if tensor.dim() == 2 else tensor.reshape(math.prod(tensor.shape[:-1]), tensor.shape[-1])


def _backward(ctx, dy: Tensor):
    output, ctx.output = ctx.output, None
    # Second derivatives, and gradients batched by vmap, go through plainly composed operations.
    if torch.is_grad_enabled() or is_batched(dy):
        return _differentiable_backward(ctx, dy)
    x, (token_sums, projected, b_eff, weight, bias, *storages) = x_and_rest(ctx)
    # A successor such as ReLU(inplace=True) may have overwritten y: then z is formed again.
    if output is not None and version_of(output) != ctx.output_version:
        output = None
    dx, grads = ctx.call.plan.backward(
        flat(dy),
        None if x is None else flat(x),
        weight,
        bias,
        storages,
        None if output is None else flat(output),
        b_eff,
        projected,
        None if token_sums is None else token_sums.reshape(-1),
    )
    if dx is not None and dy.dim() != 2:
        dx = dx.reshape(*dy.shape[:-1], weight.shape[1])
    needed = ctx.needs_input_grad[_FIRST_STORAGE:]
    if not all(needed):
        grads = [grad if need else None for grad, need in zip(grads, needed)]
    return None, None, dx, None, None, *grads


def wanted_slots(terms: Terms, has_bias: bool) -> frozenset[str]:
    """Slots with a storage that wants a gradient; D has none where there is no bias to scale."""
    wanting = {slot for slot, term in terms.active for storage in term.storages if storage.requires_grad}
    return frozenset(wanting if has_bias else wanting - {"D"})


def _can_be_kept(y: Tensor, reads_values: bool) -> bool:
    """Whether y may be kept outside ``save_for_backward`` and reused in backward.

    Under saved-tensor hooks (checkpointing, offloading) keeping it would defeat their purpose, and a
    change in place could not be seen. Reuse depends on values, which meta and fake tensors do not have.
    If the host reads the values, a CUDA graph cannot be captured.
    """
    if type(y) is not Tensor or y.device.type == "meta" or version_of(y) is None:
        return False
    if reads_values and y.is_cuda and torch.cuda.is_current_stream_capturing():
        return False
    return hooks_on_top() is None


def _differentiable_backward(ctx, dy: Tensor):
    """The same gradients through the reference formula; differentiable again if grad mode is on."""
    create_graph = torch.is_grad_enabled()
    inputs_grad, storages_grad = ctx.needs_input_grad[_X], ctx.needs_input_grad[_FIRST_STORAGE:]
    with torch.enable_grad():
        x, (token_sums, _, _, weight, bias, *storages) = x_and_rest(ctx)
        x_shape = (*dy.shape[:-1], weight.shape[1])
        if token_sums is not None:  # gradients depend on nothing of x but these sums
            x = F.pad(token_sums.unsqueeze(-1), (0, x_shape[-1] - 1))
        elif x is None:  # neither A nor B: no gradient depends on the values of x
            x = dy.new_zeros(x_shape).requires_grad_(inputs_grad)
        y = reference.glora_linear(x, weight, bias, ctx.call.terms(storages))
    inputs, needed = [x, *storages], [inputs_grad, *storages_grad]
    wanted = [tensor for tensor, need in zip(inputs, needed) if need]
    found = iter(torch.autograd.grad(y, wanted, dy, create_graph=create_graph, allow_unused=True))
    dx, *grads = (next(found) if need else None for need in needed)
    return None, None, dx, None, None, *grads
