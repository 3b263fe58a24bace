"""W_eff and b_eff themselves: merging stores them; layers other than linear ones use them, with gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from .._torch import TorchPlan
from ..backend import Backend
from ..checks import check_layer
from ..dispatch import backend_for, decide
from ..precision import without_autocast
from ..terms import Structure, Terms
from ..torch_private import is_batched
from .autograd import wanted_slots


def glora_assemble(weight: Tensor, bias: Tensor | None, terms: Terms) -> tuple[Tensor, Tensor | None]:
    """``(W_eff, b_eff)`` with gradients: for layers that apply a weight in their own way, as convolutions do.

    ``W_eff = W0 + W0 * A + B`` (hadamard) or ``W0 + W0 @ A + B`` (matmul), ``b_eff = b0 + b0 * D + E + W0 c``: the very
    bits of :func:`glora_kernels.glora_merge`. An operand that no term changes is returned as it is. Source: arXiv
    2306.07967, Eq. 10.

    Args:
        weight: frozen ``W0``, ``(N, K)``.
        bias: frozen ``b0``, ``(N,)``, or None.
        terms: the support tensors.

    Returns:
        ``(N, K)`` and ``(N,)`` or None, in the dtype of ``weight``. Differentiable in every storage, to any order; a
        gradient has the shape and dtype of its storage and is zero where the storage is not read. Only the arguments
        are kept for backward, nothing dense.

    Raises:
        TypeError, ValueError: an argument that does not fit, by name, before anything is computed.
    """
    check_layer(weight, bias, terms)
    with without_autocast(weight.device.type):
        decision = decide(weight, terms)
        if decision.backend == "reference":
            return reference.glora_merge(weight, bias, terms)
        storages, structure = terms.flatten()
        w_eff, b_eff = _Assembled.apply(backend_for(decision), structure, weight, bias, *storages)
    return weight if w_eff is None else w_eff, bias if b_eff is None else b_eff


def form(weight: Tensor, bias: Tensor | None, terms: Terms) -> tuple[Tensor, Tensor | None]:
    """``(W_eff, b_eff)`` without gradients, never an alias of the base or of a support tensor."""
    decision = decide(weight, terms)
    weight, bias = weight.detach(), None if bias is None else bias.detach()
    if decision.backend == "reference":
        w_eff, b_eff = reference.glora_merge(weight, bias, terms)
    else:
        w_eff, b_eff = _assemble(backend_for(decision), weight, bias, terms)
    w_eff = w_eff if terms.adapts_weight else w_eff.clone()
    return w_eff, None if b_eff is None else b_eff.clone(memory_format=torch.contiguous_format)


def _assemble(backend: Backend, weight: Tensor, bias: Tensor | None, terms: Terms) -> tuple[Tensor, Tensor | None]:
    return backend.plan(weight, bias, terms, frozenset(), False).assemble(weight, bias, terms.storages)


class _Assembled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, backend: Backend, structure: Structure, weight: Tensor, bias: Tensor | None, *storages):
        terms = Terms.unflatten(storages, structure)
        ctx.structure = structure
        ctx.wanted = wanted_slots(terms, bias is not None)
        ctx.save_for_backward(weight, bias, *storages)
        ctx.set_materialize_grads(False)
        w_eff, b_eff = _assemble(backend, weight, bias, terms)
        own_bias = (
            None if b_eff is None or not terms.adapts_bias else b_eff.clone(memory_format=torch.contiguous_format)
        )
        return w_eff if terms.adapts_weight else None, own_bias

    @staticmethod
    def backward(ctx, dw: Tensor | None, db: Tensor | None):
        weight, bias, *storages = ctx.saved_tensors
        terms = Terms.unflatten(storages, ctx.structure)
        wanted = ctx.wanted - ({"A", "B"} if dw is None else set()) - ({"C", "D", "E"} if db is None else set())
        like = weight if dw is None else dw
        with without_autocast(weight.device.type):
            if torch.is_grad_enabled() or is_batched(like) or (db is not None and is_batched(db)):
                return None, None, None, None, *_differentiable(ctx, weight, bias, storages, dw, db)
            grads = TorchPlan(weight.dtype, terms, wanted, False).contract(weight, bias, storages, dw, db)
        return None, None, None, None, *(g if needed else None for g, needed in zip(grads, ctx.needs_input_grad[4:]))


def _differentiable(ctx, weight: Tensor, bias: Tensor | None, storages, dw: Tensor | None, db: Tensor | None):
    """The same gradients through the reference formula; differentiable again if grad mode is on."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        outputs = reference.glora_merge(weight, bias, Terms.unflatten(storages, ctx.structure))
    pairs = [(y, dy) for y, dy in zip(outputs, (dw, db)) if dy is not None and y is not None and y.requires_grad]
    needed = ctx.needs_input_grad[4:]
    wanted = [storage for storage, need in zip(storages, needed) if need]
    if not pairs or not wanted:
        return [None] * len(storages)
    ys, dys = zip(*pairs)
    found = iter(torch.autograd.grad(ys, wanted, dys, create_graph=create_graph, allow_unused=True))
    return [next(found) if need else None for need in needed]
