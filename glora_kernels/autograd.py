"""The differentiable layer, for every backend that computes gradients in closed form: save, call, return.

An ``autograd.Function`` of the old style around plain functions: a registered operator with its own autograd formula
costs 40 microseconds more a call (guides/reliability.md, 3a). ``registered.py`` has that one, for compilers.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from . import reference
from .autocast import without_autocast
from .backends import Backend
from .reuse import reuses_output
from .routes import reads_token_sums
from .step import Step
from .terms import Structure, Terms

_X, _FIRST_STORAGE = 3, 7  # places among the arguments of _GLoRALinear.forward


def glora_linear(backend: Backend, x: Tensor, weight: Tensor, bias: Tensor | None, terms: Terms) -> Tensor:
    """See :func:`glora_kernels.glora_linear`."""
    if not torch.is_grad_enabled():
        return backend.forward(x, weight, bias, terms).y
    storages, structure = terms.flatten()
    wanted = wanted_slots(terms, bias is not None)
    # Formed by autograd, so that second derivatives reach x through them.
    token_sums = x.sum(-1) if backend.takes_token_sums and reads_token_sums(terms, wanted) else None
    return _GLoRALinear.apply(backend, structure, wanted, x, token_sums, weight, bias, *storages)


class _GLoRALinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        backend: Backend,
        structure: Structure,
        wanted: frozenset[str],
        x: Tensor,
        token_sums: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        *storages: Tensor,
    ):
        terms = Terms.unflatten(storages, structure)
        y, projected, b_eff = backend.forward(x, weight, bias, terms)
        ctx.backend, ctx.structure, ctx.wanted = backend, structure, wanted
        ctx.x_shape = x.shape
        tokens = math.prod(x.shape[:-1])
        keep = "A" in wanted and reuses_output(tokens, x.shape[-1], terms) and _output_can_be_kept(y, backend)
        ctx.output = y.detach() if keep else None  # shares y's version counter, is in no cycle with ctx
        ctx.output_version = y._version if keep else None
        kept_x = x if wanted & {"A", "B"} and token_sums is None else None
        ctx.save_for_backward(kept_x, token_sums, projected, b_eff if keep else None, weight, bias, *storages)
        return y

    @staticmethod
    def backward(ctx, dy: Tensor):
        with without_autocast(dy.device.type):  # backward may run inside the block that forward ran in
            return _backward(ctx, dy)


def _backward(ctx, dy: Tensor):
    x, token_sums, projected, b_eff, weight, bias, *storages = ctx.saved_tensors
    output, ctx.output = ctx.output, None
    # Second derivatives, and gradients batched by vmap, go through plainly composed operations.
    if torch.is_grad_enabled() or batched(dy):
        return _differentiable_backward(ctx, dy, x, token_sums, weight, bias, storages)
    # A successor such as ReLU(inplace=True) may have overwritten y: then z is formed anew.
    if output is not None and output._version != ctx.output_version:
        output = None
    terms = Terms.unflatten(storages, ctx.structure)
    tokens = math.prod(ctx.x_shape[:-1])
    step = Step(
        dy.reshape(tokens, weight.shape[0]),
        None if x is None else x.reshape(tokens, weight.shape[1]),
        weight,
        bias,
        terms,
        None if output is None else output.reshape(tokens, weight.shape[0]),
        b_eff,
        projected,
        ctx.wanted,
        ctx.needs_input_grad[_X],
        None if token_sums is None else token_sums.reshape(tokens),
    )
    dx, grads = ctx.backend.backward(step)
    per_storage = [grad for slot, term in terms.active for grad in grads.get(slot, (None,) * len(term.storages))]
    masked = (g if needed else None for g, needed in zip(per_storage, ctx.needs_input_grad[_FIRST_STORAGE:]))
    return None, None, None, None if dx is None else dx.reshape(ctx.x_shape), None, None, None, *masked


def batched(dy: Tensor) -> bool:
    functorch = torch._C._functorch
    return functorch.is_legacy_batchedtensor(dy) or functorch.is_batchedtensor(dy)


def wanted_slots(terms: Terms, has_bias: bool) -> frozenset[str]:
    """Slots with a storage that wants a gradient; D has none where there is no bias to scale."""
    wanting = {slot for slot, term in terms.active if any(storage.requires_grad for storage in term.storages)}
    return frozenset(wanting if has_bias else wanting - {"D"})


def _output_can_be_kept(y: Tensor, backend: Backend) -> bool:
    """Whether y may be kept outside ``save_for_backward``, and the route of its reuse be taken.

    Under saved-tensor hooks (checkpointing, offloading) keeping it would defeat their purpose, and a
    change in place could not be seen. The route depends on values, which meta and fake tensors do not
    have; and where the host looks at them, a CUDA graph cannot be captured.
    """
    if type(y) is not Tensor or y.device.type == "meta":
        return False
    if backend.reads_values and y.is_cuda and torch.cuda.is_current_stream_capturing():
        return False
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is None


def _differentiable_backward(ctx, dy, x, token_sums, weight, bias, storages):
    """The same gradients through the reference formula; differentiable again if grad mode is on."""
    create_graph = torch.is_grad_enabled()
    inputs_grad, storages_grad = ctx.needs_input_grad[_X], ctx.needs_input_grad[_FIRST_STORAGE:]
    with torch.enable_grad():
        if token_sums is not None:  # gradients depend on these sums, and on nothing else of x
            x = F.pad(token_sums.unsqueeze(-1), (0, ctx.x_shape[-1] - 1))
        elif x is None:  # neither A nor B: no gradient depends on the values of x
            x = dy.new_zeros(ctx.x_shape).requires_grad_(inputs_grad)
        y = reference.glora_linear(x, weight, bias, Terms.unflatten(storages, ctx.structure))
    inputs, needed = [x, *storages], [inputs_grad, *storages_grad]
    wanted = [tensor for tensor, need in zip(inputs, needed) if need]
    found = iter(torch.autograd.grad(y, wanted, dy, create_graph=create_graph, allow_unused=True))
    dx, *grads = (next(found) if need else None for need in needed)
    return None, None, None, dx, None, None, None, *grads
