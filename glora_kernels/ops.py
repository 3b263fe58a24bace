"""The two operations: check once, decide, call."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from . import _torch, reference
from .checks import check_call, check_layer
from .dispatch import decide
from .terms import Terms

_LINEAR = {"reference": reference.glora_linear, "torch": _torch.glora_linear}


def glora_linear(x: Tensor, weight: Tensor, bias: Tensor | None, terms: Terms) -> Tensor:
    """The adapted linear layer ``y = x W_eff^T + b_eff``.

    ``W_eff = W0 + W0 * A + B`` (hadamard) or ``W0 + W0 @ A + B`` (matmul);
    ``b_eff = b0 + b0 * D + E + W0 c``, and without b0 ``E + W0 c`` (D has nothing to scale then,
    and its gradient is None). Source: arXiv 2306.07967, Eq. 10.

    Args:
        x: tokens, ``(..., K)``, fp16, bf16, fp32 or fp64, any strides.
        weight: frozen ``W0``, ``(N, K)``, of the dtype and on the device of ``x``.
        bias: frozen ``b0``, ``(N,)``, or None.
        terms: support tensors, of any floating dtype.

    Returns:
        ``(..., N)`` in the dtype of ``x``; under ``torch.autocast``, in the autocast dtype. W_eff and
        b_eff are formed in fp32 (fp64 for fp64) and rounded once. Differentiable in ``x`` and in
        every storage in ``terms``, to any order; a gradient has the shape and dtype of its storage
        and is zero where the storage is not read. ``x`` may be empty.

    Raises:
        TypeError, ValueError: an argument that does not fit, by name, before anything is computed.
        RuntimeError: a backend was chosen that cannot be used here.
    """
    if isinstance(x, Tensor) and _under_autocast(x.device.type):
        return _autocast_linear(x, weight, bias, terms)
    check_call(x, weight, bias, terms)
    return _LINEAR[decide().backend](x, weight, bias, terms)


def _under_autocast(device_type: str) -> bool:
    return device_type != "meta" and torch.is_autocast_enabled(device_type)  # autocast does not know meta


def _without_autocast(device_type: str) -> AbstractContextManager:
    return torch.autocast(device_type, enabled=False) if _under_autocast(device_type) else nullcontext()


def _autocast_linear(x: Tensor, weight: Tensor, bias: Tensor | None, terms: Terms) -> Tensor:
    """As ``F.linear`` under autocast: x, W0 and b0 in the autocast dtype; the terms stay as they are."""
    device_type = x.device.type
    dtype = torch.get_autocast_dtype(device_type)

    def cast(tensor: Tensor) -> Tensor:  # fp64 is left alone by autocast everywhere
        return tensor.to(dtype) if tensor.is_floating_point() and tensor.dtype != torch.float64 else tensor

    with _without_autocast(device_type):
        return glora_linear(cast(x), cast(weight), None if bias is None else cast(bias), terms)


def glora_merge(weight: Tensor, bias: Tensor | None, terms: Terms, safe: bool = True) -> tuple[Tensor, Tensor | None]:
    """``(W_eff, b_eff)`` as new tensors: one plain linear layer that does what the adapted one did.

    Formed in fp32 (fp64 for fp64) and rounded once to the dtype of ``weight``; these are the very
    bits that :func:`glora_linear` multiplies by. The arguments are left as they are.

    Args:
        weight: ``W0``, ``(N, K)``.
        bias: ``b0``, ``(N,)``, or None. ``b_eff`` is None if there is no b0, no C and no E.
        terms: the support tensors.
        safe: refuse a result that is not finite.

    Raises:
        TypeError, ValueError: an argument that does not fit; with ``safe``, a NaN or infinity in
            ``W_eff`` or ``b_eff``.
    """
    check_layer(weight, bias, terms)
    with torch.no_grad(), _without_autocast(weight.device.type):
        w_eff, b_eff = _merge(weight, bias, terms)
    if safe:
        for name, tensor in (("weight", w_eff), ("bias", b_eff)):
            if tensor is not None and not bool(torch.isfinite(tensor).all()):
                count = int((~torch.isfinite(tensor)).sum())
                raise ValueError(f"merged {name}: expected finite values, got {count} that are NaN or infinite")
    return w_eff, b_eff


def _merge(weight: Tensor, bias: Tensor | None, terms: Terms) -> tuple[Tensor, Tensor | None]:
    merge = reference.glora_merge if decide().backend == "reference" else _torch.assemble
    w_eff, b_eff = merge(weight.detach(), None if bias is None else bias.detach(), terms)
    # Never hand out an alias of the base or of a support tensor.
    w_eff = w_eff if terms.adapts_weight else w_eff.clone()
    return w_eff, None if b_eff is None else b_eff.clone(memory_format=torch.contiguous_format)
