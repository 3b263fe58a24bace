"""An input that is not kept for backward, because autograd keeps what it was made from.

    x = gelu(h)                                  the GELU's node of autograd keeps h
    x = (h - mean) rstd weight + bias            on a CPU: that of a layer norm keeps all of these

Ours then keeps the same tensors in place of x, which takes no memory, and forms x again in backward, with the same
bits: by the GELU itself; for a layer norm, whose node does not keep eps, by these operations, which have been found to
have the bits of the norm (:func:`_forms_norms`). On a GPU they would be several passes in fp32, not measured yet: there
the output of a norm is kept.

x itself is kept where it is not, or no longer, what that node returned (a view, a cast, a change in place); where h has
changed since; within saved-tensor hooks (checkpointing, offloading), here or there; and where it is small.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any
from weakref import ref

import torch
from torch import Tensor
from torch.nn import functional as F

from ..torch_private import hooks_on_top, made_from, version_of

FEWEST_ELEMENTS = 2**17  # of x. The host takes a few microseconds to have it formed, whatever its size.
ON_CPU, ELSEWHERE = ("gelu", "layer norm"), ("gelu",)  # what is run again
_recomputes: ContextVar[bool] = ContextVar("glora_recompute_inputs", default=True)
_forming: dict[tuple, bool] = {}


@contextmanager
def recompute_inputs(enabled: bool) -> Iterator[None]:
    """Say whether layers that are called inside the ``with`` block form inputs again in backward; they do by default.

    A layer whose input is ``x = gelu(h)``, or on a CPU ``x = layer_norm(h)``, then keeps h for backward, which autograd
    keeps anyway, and not x too. Results and gradients have the same bits (on a CPU, with as many threads in both
    passes: the GELU's own bits depend on that). It takes the time of one more GELU or norm.

    What autograd cannot see is not seen: a change of x through ``x.data``. A change of h in place after the layer
    raises autograd's error in the layer's backward, as it does in that of the GELU or the norm. A second derivative
    passes through x, with its hooks, as long as x is alive in Python; after that it goes on to h directly.

    The choice belongs to the thread (or task) that made it; a backward pass keeps that of its forward pass. It does not
    concern compiled graphs, convolutions, and the ``reference`` and ``cuda`` backends.
    """
    token = _recomputes.set(enabled)
    try:
        yield
    finally:
        _recomputes.reset(token)


class FormAgain:
    """Forms x again, ``(..., K)``; where something else keeps x itself, unchanged, that is taken.

    Attributes:
        count: how many tensors were kept in its place.
    """

    __slots__ = ("_function", "_x", "count")

    def __init__(self, x: Tensor, function: Callable[..., Tensor], count: int):
        self._x, self._function, self.count = ref(x), function, count

    def __call__(self, *kept: Tensor) -> Tensor:
        x = self._x()
        return x if x is not None and version_of(x) == 0 else self._function(*kept)


def to_keep(x: Tensor) -> tuple[Sequence[Tensor], FormAgain | None]:
    """What to save for backward in place of x, and what forms x from it; x and None where that is x itself."""
    if x.numel() < FEWEST_ELEMENTS:
        return (x,), None
    made = made_from(x, ON_CPU if x.is_cpu else ELSEWHERE)
    if made is None or hooks_on_top() is not None or version_of(x) != 0 or not _recomputes.get():
        return (x,), None
    operation, tensors, detail = made
    if operation == "gelu":
        return tensors, FormAgain(x, partial(F.gelu, approximate=detail), 1)
    return (tensors, FormAgain(x, _norm, len(tensors))) if _forms_norms(tensors, detail) else ((x,), None)


def x_and_rest(ctx: Any) -> tuple[Any, Sequence[Any]]:
    """x and the other tensors that ``ctx`` saved; what stands for x is first, and ``ctx.form_x`` forms x from it."""
    saved, form = ctx.saved_tensors, ctx.form_x
    return (saved[0], saved[1:]) if form is None else (form(*saved[: form.count]), saved[form.count :])


def _norm(h: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``(h - mean) rstd weight + bias`` in the dtype of the statistics, rounded once to that of h."""
    wide = mean.dtype
    if torch.is_grad_enabled():
        return _differentiable_norm(h, rstd, weight, bias)
    x = torch.sub(h, mean).mul_(rstd)  # in the dtype of mean
    return torch.addcmul(bias.to(wide), x, weight.to(wide), out=x).to(h.dtype)


def _differentiable_norm(h: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The same up to rounding, with derivatives of any order in h, weight and bias."""
    wide = h.to(rstd.dtype)
    centred = wide - wide.mean(-1, keepdim=True)
    variance = centred.square().mean(-1, keepdim=True)
    eps = (rstd.pow(-2) - variance).detach()
    return (centred * (variance + eps).rsqrt() * weight + bias).to(h.dtype)


def _forms_norms(tensors: Sequence[Tensor | None], shape: Sequence[int]) -> bool:
    """Whether :func:`_norm` is to form the output of a layer norm over ``shape`` of tensors like these.

    It has to have the bits of the norm. How that rounds depends on the types and the size, and on nothing else: it is
    tried once for each. Where h and the weight are of a half type the bits differ, since the statistics are too.
    """
    h, _, _, weight, bias = tensors
    assert h is not None
    if len(shape) != 1 or weight is None or bias is None or not h.is_contiguous():
        return False
    key = h.dtype, weight.dtype, bias.dtype, shape[0]
    if key not in _forming:
        _forming[key] = _try_norm(*key)
    return _forming[key]


def _try_norm(dtype: torch.dtype, of_weight: torch.dtype, of_bias: torch.dtype, size: int) -> bool:
    def wave(count: int, period: float, dtype: torch.dtype) -> Tensor:
        steps = torch.arange(count, dtype=torch.float64, device="cpu")
        return steps.mul_(period).sin_().mul_(3).add_(1).to(dtype)

    rows = 1 + 2**14 // size
    h, weight, bias = (
        wave(rows * size, 0.7, dtype).view(rows, size),
        wave(size, 1.1, of_weight),
        wave(size, 1.3, of_bias),
    )
    x, mean, rstd = torch.native_layer_norm(h, (size,), weight, bias, 1e-5)
    return torch.equal(_norm(h, mean, rstd, weight, bias), x)
