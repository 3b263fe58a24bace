"""W_eff and b_eff as operators of ``torch.library``: convolutions under ``torch.compile`` and ``torch.export``.

    glora::assemble(weight, bias, ad, au, bd, bu, cd, cu, d, e, config, product) -> (W_eff, b_eff)
    glora::assemble_backward(dw, db, weight, ..., config, product, needs) -> [d ad, ..., d e]

As in ``operators.py``, kinds and ranks are data: one graph serves every path. So b_eff is always there, zero if no
term makes one, and the gradient of a storage that is not read is zero.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._torch import TorchPlan
from ..checks import check_layer
from ..path_encoding import STORAGES, check_devices, decode
from ..precision import without_autocast
from ..terms import Terms
from .assembly import form
from .operators import OPERAND_STORAGES, TAGS, by_place, check_current, library, refuse_second_order, slots_of

_OPERANDS = f"Tensor weight, Tensor? bias, {OPERAND_STORAGES}, Tensor config, str product"
_FIRST, _LAST = 2, 2 + len(STORAGES)

library.define(f"assemble({_OPERANDS}) -> (Tensor, Tensor)", tags=TAGS)
library.define(
    f"assemble_backward(Tensor dw, Tensor db, {_OPERANDS}, bool[{len(STORAGES)}] needs) -> Tensor[]", tags=TAGS
)


def configured_assemble(weight: Tensor, bias: Tensor | None, storages, config: Tensor, product: str):
    """:func:`glora_kernels.glora_assemble` with kinds and ranks as data; b_eff is zero if there is none.

    Args:
        weight, bias: as there.
        storages: Ad, Au, Bd, Bu, Cd, Cu, D, E; None for what no configuration reads.
        config: what :func:`glora_kernels.encode` made, on the CPU.
        product: ``"hadamard"`` or ``"matmul"``.

    Returns:
        ``(N, K)`` and ``(N,)``. Differentiable in the storages; the gradient of one that is not read is zero.

    Raises:
        TypeError, ValueError: an argument that does not fit, by name, before anything is computed.
    """
    with without_autocast(weight.device.type):
        return torch.ops.glora.assemble(weight, bias, *storages, config, product)


@torch.library.impl(library, "assemble", "CompositeExplicitAutograd")
def _assemble(weight: Tensor, bias: Tensor | None, *rest) -> tuple[Tensor, Tensor]:
    *storages, config, product = rest
    check_devices(weight, storages, config)
    terms = decode(storages, config, product)
    check_layer(weight, bias, terms)
    check_current(config)
    with torch.no_grad():
        w_eff, b_eff = form(weight, bias, terms)
    b_eff = weight.new_zeros(weight.shape[0]) if b_eff is None else b_eff
    return w_eff.contiguous(), b_eff


@torch.library.register_fake("glora::assemble", lib=library)
def _assemble_fake(weight: Tensor, bias: Tensor | None, *rest) -> tuple[Tensor, Tensor]:
    *storages, config, _ = rest
    check_layer(weight, bias, Terms())
    check_devices(weight, storages, config)
    return weight.new_empty(weight.shape), weight.new_empty(weight.shape[0])


@torch.library.impl(library, "assemble_backward", "CompositeExplicitAutograd")
def _assemble_backward(dw: Tensor, db: Tensor, weight: Tensor, bias: Tensor | None, *rest) -> list[Tensor]:
    *storages, config, product, needs = rest
    terms = decode(storages, config, product)
    plan = TorchPlan(weight.dtype, terms, slots_of(needs, terms, bias), False)
    with torch.no_grad():
        grads = plan.contract(weight, bias, terms.storages, dw, db)
    return by_place(grads, dw, terms, storages, needs)


@torch.library.register_fake("glora::assemble_backward", lib=library)
def _assemble_backward_fake(dw: Tensor, db: Tensor, weight: Tensor, bias: Tensor | None, *rest) -> list[Tensor]:
    *storages, _, _, needs = rest
    return [
        torch.empty(like.shape, dtype=like.dtype, device=like.device) if need else dw.new_empty(0)
        for like, need in zip(storages, needs)
    ]


def _save(ctx, inputs, output) -> None:
    *tensors, ctx.product = inputs
    ctx.save_for_backward(*tensors)


def _autograd(ctx, dw: Tensor, db: Tensor):
    weight, bias, *rest = ctx.saved_tensors
    storages, config = rest[:-1], rest[-1]
    needs = list(ctx.needs_input_grad[_FIRST:_LAST])
    grads = torch.ops.glora.assemble_backward(dw, db, weight, bias, *storages, config, ctx.product, needs)
    return None, None, *(grad if need else None for grad, need in zip(grads, needs)), None, None


torch.library.register_autograd("glora::assemble", _autograd, setup_context=_save, lib=library)
refuse_second_order("glora::assemble_backward", "glora_assemble")
