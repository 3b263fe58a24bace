"""The adapted linear layer and its merge: check once, decide, call."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from ..checks import check_call, check_layer
from ..dispatch import backend_for, decide
from ..path_encoding import pack
from ..precision import cast_operands, without_autocast
from ..terms import Terms
from . import autograd
from .assembly import form
from .operators import configured_linear, takes_operator


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
        ``(..., N)`` in the dtype of ``x``; under ``torch.autocast``, in the autocast dtype. W_eff and b_eff are formed
        in fp32 (fp64 for fp64) and rounded once (the reference backend computes in the dtype it is given).
        Differentiable in ``x`` and in every storage in ``terms``, to any order; a gradient has the shape and dtype of
        its storage and is zero where the storage is not read. ``x`` may be empty.

    Raises:
        TypeError, ValueError: an argument that does not fit, by name, before anything is computed.
        RuntimeError: a backend was chosen that cannot be used here.
    """
    if takes_operator():
        storages, config = pack(terms)
        return configured_linear(x, weight, bias, storages, config, terms.product)
    x, weight, bias = cast_operands(x, weight, bias)
    check_call(x, weight, bias, terms)
    with without_autocast(x.device.type):
        return compute(x, weight, bias, terms)


def compute(x: Tensor, weight: Tensor, bias: Tensor | None, terms: Terms) -> Tensor:
    """:func:`glora_linear` of operands that have been checked, without autocast."""
    decision = decide(weight, terms)
    if decision.backend == "reference":
        return reference.glora_linear(x, weight, bias, terms)
    return autograd.glora_linear(backend_for(decision), x, weight, bias, terms)


def glora_merge(weight: Tensor, bias: Tensor | None, terms: Terms, safe: bool = True) -> tuple[Tensor, Tensor | None]:
    """``(W_eff, b_eff)`` as new tensors: one plain linear layer that does what the adapted one did.

    They are formed in fp32 (fp64 for fp64) and rounded once to the dtype of ``weight``; these are the very
    bits that :func:`glora_linear` multiplies by (the reference backend: every operation in the dtype
    of ``weight``). The arguments are left as they are.

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
    with torch.no_grad(), without_autocast(weight.device.type):
        w_eff, b_eff = form(weight, bias, terms)
    if safe:
        for name, tensor in (("weight", w_eff), ("bias", b_eff)):
            if tensor is not None and not bool(torch.isfinite(tensor).all()):
                count = int((~torch.isfinite(tensor)).sum())
                raise ValueError(f"merged {name}: expected finite values, got {count} that are NaN or infinite")
    return w_eff, b_eff
