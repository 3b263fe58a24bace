"""Which backend a call goes to, and why: a pure function of the call and of an explicit choice."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

import torch

BACKENDS = ("reference", "torch", "triton", "cuda")
CHOICES = ("auto", *BACKENDS)
_NOT_SHIPPED = "this release ships no {} kernels"

_chosen: ContextVar[str | None] = ContextVar("glora_backend", default=None)


class Decision(NamedTuple):
    backend: str
    reason: str


def available_backends() -> dict[str, str | None]:
    """Every backend, with None if it can be used here and otherwise the reason why it cannot."""
    return {
        "reference": None,
        "torch": None,
        "triton": _NOT_SHIPPED.format("Triton"),
        "cuda": _NOT_SHIPPED.format("CUDA"),
    }


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Send the calls inside the ``with`` block to one backend (``"auto"``: as if not chosen).

    The environment variable ``GLORA_BACKEND`` does the same for a whole process; the innermost
    ``use_backend`` wins. The choice belongs to the thread (or task) that made it. ``torch.compile``
    traces the reference formula, whatever was chosen.

    Raises:
        ValueError: an unknown name.
        RuntimeError: a backend that is not available here.
    """
    _check_choice(name, "use_backend")
    token = _chosen.set(name)
    try:
        yield
    finally:
        _chosen.reset(token)


def decide() -> Decision:
    """The backend for a call made now.

    Raises:
        ValueError, RuntimeError: the choice in force is unknown, not available, or cannot be
            honoured for this call.
    """
    tracing = _tracing_reason()
    if torch.compiler.is_compiling():  # the choice lives outside what a compiler can trace
        return Decision("reference", "torch.compile traces the reference formula")
    choice = _chosen.get()
    source = "use_backend"
    if choice is None:
        choice, source = os.environ.get("GLORA_BACKEND", "auto"), "GLORA_BACKEND"
        _check_choice(choice, source)
    if choice == "auto":
        if tracing is not None:
            return Decision("reference", tracing)
        return Decision("torch", "the fastest backend that this release ships")
    if tracing is not None and choice != "reference":
        raise RuntimeError(f"{source}: backend {choice!r} cannot be used here ({tracing}); use 'reference' or 'auto'")
    return Decision(choice, f"chosen by {source}")


def _tracing_reason() -> str | None:
    """Why only plainly composed operations will do, if that is so."""
    if torch._C._are_functorch_transforms_active():
        return "a torch.func transform is active, which the composed formula supports to any order"
    if torch.autograd.forward_ad._current_level >= 0:
        return "forward-mode AD is active, which the composed formula supports"
    return None


def _check_choice(name: str, source: str) -> None:
    if name not in CHOICES:
        raise ValueError(f"{source}: expected one of {CHOICES}, got {name!r}")
    reason = available_backends().get(name)
    if reason is not None:
        usable = [backend for backend, why_not in available_backends().items() if why_not is None]
        raise RuntimeError(f"{source}: backend {name!r} is not available ({reason}); available: {usable}")
