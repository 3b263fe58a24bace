"""The adapted convolution: its weight, seen as a matrix, is adapted as a linear layer's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Union

from torch import Tensor
from torch.nn import functional as F

from ..checks import check_layer, check_operands, check_tensor
from ..path_encoding import pack
from ..precision import cast_operands, without_autocast
from ..terms import Terms
from .assembly import glora_assemble
from .assembly_operators import configured_assemble
from .operators import takes_operator

Size = Union[int, Sequence[int]]


def glora_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    terms: Terms,
    stride: Size = 1,
    padding: Size | str = 0,
    dilation: Size = 1,
    groups: int = 1,
) -> Tensor:
    """The adapted convolution ``y = conv2d(x, W_eff) + b_eff``.

    With W0 seen as ``(N, K)``, ``K = I * kh * kw``: ``W_eff = W0 + W0 * A + B`` (hadamard) or ``W0 + W0 @ A + B``
    (matmul), and ``b_eff = b0 + b0 * D + E + W0 c`` as for :func:`glora_kernels.glora_linear`. The prompt c has an
    entry for each weight of a kernel, and ``W0 c`` is one number per output channel: the same at every position, at
    the padded border too, so that a merged bias can hold it. With groups, A of the matmul product and c act on the
    inputs of a group, and are the same for all. Source: arXiv 2306.07967, Eq. 10, which it extends to convolutions.

    Args:
        x: ``(M, groups * I, height, width)`` or without M, as :func:`torch.nn.functional.conv2d` takes it.
        weight: frozen ``W0``, ``(N, I, kh, kw)``, of the dtype and on the device of ``x``.
        bias: frozen ``b0``, ``(N,)``, or None.
        terms: support tensors for the ``(N, K)`` matrix, of any floating dtype.
        stride, padding, dilation, groups: as for :func:`torch.nn.functional.conv2d`.

    Returns:
        As :func:`torch.nn.functional.conv2d`; under ``torch.autocast``, in the autocast dtype. W_eff is formed in fp32
        (fp64 for fp64) and rounded once: the bits of :func:`glora_kernels.glora_merge`. x is not unfolded. Kept for
        backward are x and W_eff; where A or B wants a gradient, backward forms dW as if the weight were trained.
        Differentiable in ``x`` and in every storage, to any order.

    Raises:
        TypeError, ValueError: an argument that does not fit, by name, before anything is computed.
    """
    x, weight, bias = cast_operands(x, weight, bias)
    _check(x, weight, bias, terms, groups)
    with without_autocast(x.device.type):
        if takes_operator():
            storages, config = pack(terms)
            w_eff, b_eff = configured_assemble(weight.flatten(1), bias, storages, config, terms.product)
        else:
            w_eff, b_eff = glora_assemble(weight.flatten(1), bias, terms)
        return F.conv2d(x, w_eff.reshape(weight.shape), b_eff, stride, padding, dilation, groups)


def configured_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    storages: Sequence[Tensor | None],
    config: Tensor,
    product: str = "hadamard",
    stride: Size = 1,
    padding: Size | str = 0,
    dilation: Size = 1,
    groups: int = 1,
) -> Tensor:
    """:func:`glora_conv2d` with kinds and ranks as data.

    Args:
        storages, config, product: as for :func:`glora_kernels.configured_linear`; the others as for
            :func:`glora_conv2d`.

    Returns:
        As :func:`glora_conv2d`; the gradient of a storage that is not read is zero.

    Raises:
        TypeError, ValueError: an argument that does not fit, by name, before anything is computed.
    """
    x, weight, bias = cast_operands(x, weight, bias)
    _check(x, weight, bias, Terms(), groups)
    with without_autocast(x.device.type):
        w_eff, b_eff = configured_assemble(weight.flatten(1), bias, storages, config, product)
        return F.conv2d(x, w_eff.reshape(weight.shape), b_eff, stride, padding, dilation, groups)


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, terms: Terms, groups: int) -> None:
    check_tensor("weight", weight)
    if weight.dim() != 4:
        raise ValueError(f"weight: expected shape (N, I, kh, kw), got {tuple(weight.shape)}")
    if isinstance(groups, bool) or not isinstance(groups, int) or groups < 1 or weight.shape[0] % groups:
        raise ValueError(f"groups: expected a divisor of N = {weight.shape[0]}, got {groups!r}")
    check_layer(weight.detach().flatten(1), bias, terms)
    check_tensor("x", x)
    channels = weight.shape[1] * groups
    if x.dim() not in (3, 4) or x.shape[-3] != channels:
        raise ValueError(f"x: expected shape (M, {channels}, height, width) or without M, got {tuple(x.shape)}")
    check_operands(x, weight, bias)
