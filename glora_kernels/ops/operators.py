"""The layer as operators of ``torch.library``: for ``torch.compile``, ``torch.export`` and direct calls.

    glora::linear(x, weight, bias, ad, au, bd, bu, cd, cu, d, e, config, product) -> y
    glora::linear_backward(dy, x, weight, ..., config, product, needs) -> [dx, d ad, ..., d e]

Kinds and ranks are data (``path_encoding.py``): one graph serves every path. A compiler cannot know what will
be sampled, so here the gradient of a tensor that is not read is zero rather than None, and the output is not kept
for backward: da of a row scale is formed from dW.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _torch, reference
from ..checks import check_call
from ..dispatch import backend_for, decide, tracing_reason
from ..path_encoding import PLACES, STORAGES, check_devices, decode, places_of
from ..precision import cast_operands, without_autocast
from ..terms import SLOTS, Terms
from ..torch_private import forward_mode_is_on, repeated_node
from .autograd import flat

OPERAND_STORAGES = ", ".join(f"Tensor? {name}" for name in STORAGES)
_OPERANDS = f"Tensor x, Tensor weight, Tensor? bias, {OPERAND_STORAGES}, Tensor config, str product"
_FIRST_STORAGE, _LAST_STORAGE = 3, 3 + len(STORAGES)
_NEEDS = 1 + len(STORAGES)  # x and the storages

library = torch.library.Library("glora", "DEF")
# The configuration is read on the host: a captured CUDA graph would replay the path of its capture for ever.
TAGS = (torch.Tag.cudagraph_unsafe,)
library.define(f"linear({_OPERANDS}) -> Tensor", tags=TAGS)
library.define(f"linear_backward(Tensor dy, {_OPERANDS}, bool[{_NEEDS}] needs) -> Tensor[]", tags=TAGS)


def configured_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    storages: Sequence[Tensor | None],
    config: Tensor,
    product: str = "hadamard",
) -> Tensor:
    """:func:`glora_kernels.glora_linear` with kinds and ranks as data.

    Args:
        x, weight, bias: as there.
        storages: Ad, Au, Bd, Bu, Cd, Cu, D, E; None for what no configuration reads.
        config: what :func:`glora_kernels.encode` made, on the CPU.
        product: ``"hadamard"`` or ``"matmul"``.

    Returns:
        ``(..., N)``. Differentiable in x and the storages; the gradient of a storage that is not read is zero.

    Raises:
        TypeError, ValueError: an argument that does not fit, by name, before anything is computed.
    """
    x, weight, bias = cast_operands(x, weight, bias)
    with without_autocast(x.device.type):
        return torch.ops.glora.linear(x, weight, bias, *storages, config, product)


def takes_operator() -> bool:
    """Whether a compiler traces a plain call; transforms and forward-mode AD need the composed formula."""
    return torch.compiler.is_compiling() and tracing_reason() is None


@torch.library.impl(library, "linear", "CompositeExplicitAutograd")
def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, *rest) -> Tensor:
    *storages, config, product = rest
    check_devices(weight, storages, config)
    terms = decode(storages, config, product)
    check_call(x, weight, bias, terms)
    check_current(config)
    _refuse_forward_mode()
    decision = decide(weight, terms)
    with torch.no_grad():
        if decision.backend == "reference":
            return reference.glora_linear(x, weight, bias, terms)
        plan = backend_for(decision).plan(weight, bias, terms, frozenset(), False)
        return plan.forward(x, weight, bias, terms.storages).y


def _refuse_forward_mode() -> None:
    if forward_mode_is_on():
        raise NotImplementedError("glora::linear has no forward-mode derivative; call glora_kernels.glora_linear")


@torch.library.register_fake("glora::linear", lib=library)
def _linear_fake(x: Tensor, weight: Tensor, bias: Tensor | None, *rest) -> Tensor:
    # Meta tensors among real ones come here too: without the checks the answer would be unwritten memory.
    *storages, config, _ = rest
    check_call(x, weight, bias, Terms())
    check_devices(weight, storages, config)
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@torch.library.impl(library, "linear_backward", "CompositeExplicitAutograd")
def _linear_backward(dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, *rest) -> list[Tensor]:
    *storages, config, product, needs = rest
    terms = decode(storages, config, product)
    wanted, decision = slots_of(needs[1:], terms, bias), decide(weight, terms)
    # No graph of autograd is recorded within an operator, so there is none through the reference formula.
    backend = _torch if decision.backend == "reference" else backend_for(decision)
    plan = backend.plan(weight, bias, terms, wanted, needs[0])
    with torch.no_grad():
        dx, found = plan.backward(flat(dy), flat(x), weight, bias, terms.storages, None, None, None, None)
    dx = dy.new_empty(0) if dx is None else dx.reshape(x.shape).contiguous()
    return [dx, *by_place(found, dy, terms, storages, needs[1:])]


def slots_of(needs: Sequence[bool], terms: Terms, bias: Tensor | None) -> frozenset[str]:
    """The slots with a storage that needs a gradient (by place); D has none where there is no bias to scale."""
    active = (slot for slot, _ in terms.active if slot != "D" or bias is not None)
    return frozenset(slot for slot in active if any(needs[place] for place in PLACES[slot]))


def by_place(
    grads: Sequence[Tensor | None], dy: Tensor, terms: Terms, storages: Sequence[Tensor | None], needs: Sequence[bool]
) -> list[Tensor]:
    """The gradients of all storages, from those of ``terms.storages``: zero where nothing was read.

    Each is contiguous and in memory of its own, as the fake kernel promises; one that is not needed is empty.
    """
    found = dict(zip(places_of(terms), grads))
    return [
        _owned(found.get(place), like) if need else dy.new_empty(0)
        for place, (like, need) in enumerate(zip(storages, needs))
    ]


def _owned(grad: Tensor | None, like: Tensor | None) -> Tensor:
    assert like is not None
    if grad is None:
        return torch.zeros(like.shape, dtype=like.dtype, device=like.device)
    return grad.reshape(like.shape).clone(memory_format=torch.contiguous_format)


@torch.library.register_fake("glora::linear_backward", lib=library)
def _linear_backward_fake(dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, *rest) -> list[Tensor]:
    *storages, _, _, needs = rest
    return [
        torch.empty(like.shape, dtype=like.dtype, device=like.device) if need else dy.new_empty(0)
        for like, need in zip((x, *storages), needs)
    ]


def _save(ctx, inputs, output) -> None:
    *tensors, ctx.product = inputs
    ctx.save_for_backward(*tensors)


def _autograd(ctx, dy: Tensor):
    x, weight, bias, *rest = ctx.saved_tensors
    storages, config = rest[:-1], rest[-1]
    needs = [ctx.needs_input_grad[0], *ctx.needs_input_grad[_FIRST_STORAGE:_LAST_STORAGE]]
    grads = torch.ops.glora.linear_backward(dy, x, weight, bias, *storages, config, ctx.product, needs)
    dx, *others = (grad if need else None for grad, need in zip(grads, needs))
    return dx, None, None, *others, None, None


def refuse_second_order(operator: str, function: str) -> None:
    """Have ``operator`` raise where its derivative is asked for, and name the ``function`` that has second ones."""

    def refuse(ctx, *grads):
        raise NotImplementedError(f"{operator} has no derivative; call glora_kernels.{function} for second ones")

    torch.library.register_autograd(operator, refuse, setup_context=lambda ctx, inputs, output: None, lib=library)


torch.library.register_autograd("glora::linear", _autograd, setup_context=_save, lib=library)
refuse_second_order("glora::linear_backward", "glora_linear")


def check_current(config: Tensor) -> None:
    """Raise RuntimeError if this call repeats one that was made before ``config`` was.

    A checkpoint around a compiled function runs it again during backward, with the current configuration. A checkpoint
    that was compiled itself keeps the first configuration, which is right.
    """
    node = repeated_node()
    if node is not None and len(config) > len(SLOTS) and node < config[-1, 0].item():
        raise RuntimeError(
            "config: expected that of the forward pass which this backward pass runs again, got a later one; put the "
            "checkpoint inside of what is compiled, or keep the paths until backward is done"
        )
