"""An input that is not kept for backward, because autograd keeps what it was made from.

Where ``x = gelu(h)``, the GELU's node of autograd keeps h for its own backward pass. Then ours keeps h too, which takes
no memory, in place of x. Backward forms x again, by the same operation on the same tensor: the same bits.

x itself is kept where it is not, or no longer, what the GELU returned (a view, a cast, a change in place); where h has
changed since; within saved-tensor hooks (checkpointing, offloading), here or at the GELU; and for subclasses of tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from weakref import ref

from torch import Tensor
from torch.nn import functional as F

from ..torch_private import gelu_input, hooks_on_top, version_of

_recomputes: ContextVar[bool] = ContextVar("glora_recompute_inputs", default=True)


@contextmanager
def recompute_inputs(enabled: bool) -> Iterator[None]:
    """Say whether layers that are called inside the ``with`` block form inputs again in backward; they do by default.

    A layer whose input is ``x = gelu(h)`` then keeps h for backward, which autograd keeps anyway, and not x too. Results
    and gradients have the same bits. It costs the time of one GELU. What autograd cannot see is not seen: a change of x
    through ``x.data``. Changing h in place after the layer raises autograd's error in the layer's backward, as in the
    GELU's. A second derivative, and a hook on x added after the layer was called, is passed by x as long as x is alive
    in Python, and from then on by h.

    The choice belongs to the thread (or task) that made it; a backward pass keeps that of its forward pass. The
    ``reference`` and ``cuda`` backends and compiled graphs decide for themselves.
    """
    token = _recomputes.set(enabled)
    try:
        yield
    finally:
        _recomputes.reset(token)


class FormAgain:
    """Forms ``x = gelu(h)`` from h again, ``(..., K)``; x itself is taken where something else keeps it, unchanged."""

    __slots__ = ("_approximate", "_x")

    def __init__(self, x: Tensor, approximate: str):
        self._x, self._approximate = ref(x), approximate

    def __call__(self, h: Tensor) -> Tensor:
        x = self._x()
        return x if x is not None and version_of(x) == 0 else F.gelu(h, approximate=self._approximate)


def to_keep(x: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor] | None]:
    """What to save for backward in place of x, and the function that forms x from it; x and None where that is x."""
    made = gelu_input(x)
    if made is None or hooks_on_top() is not None or version_of(x) != 0 or not _recomputes.get():
        return x, None
    h, approximate = made
    return h, FormAgain(x, approximate)
