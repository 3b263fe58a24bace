"""Which backend a call goes to, and why: a pure function of the call and of an explicit choice."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor

from . import _torch
from .backend import Backend
from .planning.machines import nearest
from .planning.prediction import STRATEGIES
from .terms import Terms, rank_of
from .torch_private import forward_mode_is_on, is_fake, transforms_are_active, watched

BACKENDS = ("reference", "torch", "triton", "cuda")
ASKABLE = ("auto", *BACKENDS)
MAX_TRITON_RANK = 64


class BackendChoice(NamedTuple):
    """What was asked for: a backend, and for Triton a strategy (None: the cost model picks)."""

    backend: str
    strategy: str | None


_OPEN = BackendChoice("auto", None)
_chosen: ContextVar[BackendChoice | None] = ContextVar("glora_backend", default=None)
_VARIABLE = "GLORA_BACKEND"
# What a prepared layer asks at every call: whether anything was chosen, so that :func:`automatic` does not decide.
chosen_backend, variable_is_set = _chosen.get, watched(_VARIABLE)


class Decision(NamedTuple):
    backend: str
    reason: str
    strategy: str | None = None


def available_backends() -> dict[str, str | None]:
    """Every backend, with None if it can be used here, or else the reason why not."""
    return {"reference": None, "torch": None, "triton": _triton_reason(), "cuda": _extension_fault()}


def _triton_reason() -> str | None:
    if find_spec("triton") is None:
        return "Triton is not installed"
    if _interpreted() or torch.cuda.is_available():
        return None
    return "no GPU, and TRITON_INTERPRET=1 is not set"


@cache
def _triton_fault() -> str | None:
    """Why Triton cannot launch anything on this machine's GPU: not installed, or no C compiler, say. Tried once."""
    reason = _triton_reason()
    if reason is not None:
        return reason
    try:
        import triton

        triton.runtime.driver.active.get_current_target()
    except Exception as error:  # the start of the driver may raise anything
        return f"Triton cannot be used: {type(error).__name__}: {error}"
    return None


def _extension_fault() -> str | None:
    from ._cuda import fault

    return fault()


def _interpreted() -> bool:
    """Whether Triton would run kernels in its interpreter, asked without loading Triton."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


@contextmanager
def use_backend(name: str, strategy: str | None = None) -> Iterator[None]:
    """Send the calls inside the ``with`` block to one backend (``"auto"``: as if not chosen).

    With ``"triton"`` a strategy can be chosen too: ``"assemble"`` writes W_eff and multiplies by it, ``"fused"``
    forms it in registers and needs no (N, K) buffer, forward or backward. The default is what
    :func:`glora_kernels.explain` predicts to be faster.

    The environment variable ``GLORA_BACKEND`` does the same for a whole process; the innermost
    ``use_backend`` wins. The choice belongs to the thread (or task) that made it; a backward pass keeps the
    choice of its forward pass. But a compiled graph reads the choice when it runs, in forward and in backward:
    set the variable there, since PyTorch runs backward on a GPU in a thread of its own.

    Raises:
        ValueError: an unknown name, or a strategy of another backend.
        RuntimeError: a backend that is not available here.
    """
    _check_name(name, "use_backend")
    if strategy is not None and (name != "triton" or strategy not in STRATEGIES):
        raise ValueError(
            f"strategy: expected None, or one of {STRATEGIES} with backend 'triton', got {strategy!r} with {name!r}"
        )
    token = _chosen.set(BackendChoice(name, strategy))
    try:
        yield
    finally:
        _chosen.reset(token)


def decide(weight: Tensor, terms: Terms) -> Decision:
    """The backend for a call made now, with the operands checked before.

    Raises:
        ValueError, RuntimeError: the choice in force is unknown, not available, or cannot be
            honoured for this call.
    """
    tracing = tracing_reason()
    choice, source = _asked()
    if choice.backend == "auto":
        return Decision("reference", tracing) if tracing is not None else automatic(weight, terms)
    unfit = tracing if choice.backend != "reference" else None
    if unfit is None and choice.backend == "triton":
        unfit = triton_unfit(weight, terms)
    if unfit is None and choice.backend == "cuda":
        unfit = _extension_unfit(weight)
    if unfit is not None:
        raise RuntimeError(f"{source}: backend {choice.backend!r} cannot be used here ({unfit}); use 'auto'")
    return Decision(choice.backend, f"chosen by {source}", choice.strategy)


def _asked() -> tuple[BackendChoice, str]:
    """What was asked for, and where."""
    chosen = chosen_backend()
    if chosen is not None:
        return chosen, "use_backend"
    if not variable_is_set():
        return _OPEN, _VARIABLE
    name = os.environ.get(_VARIABLE, "auto")
    if name != "auto":
        _check_name(name, _VARIABLE)
    return BackendChoice(name, None), _VARIABLE


def automatic(weight: Tensor, terms: Terms) -> Decision:
    """Where a call goes automatically: the same for the same devices, dtypes and ranks.

    No transform or forward-mode AD may be active.
    """
    if weight.device.type != "cuda":
        return Decision("torch", f"the fastest for device {weight.device.type}")
    unfit = _triton_fault() or triton_unfit(weight, terms)
    if unfit is not None:
        return Decision("torch", f"Triton kernels do not serve this call: {unfit}")
    return Decision("triton", "fused kernels for this device")


def triton_unfit(weight: Tensor, terms: Terms) -> str | None:
    """Why the Triton kernels cannot serve these operands, if that is so."""
    if is_fake(weight):
        return "fake tensors have no memory to launch on"
    if weight.device.type != "cuda":
        if weight.device.type != "cpu" or not _interpreted():
            return f"the operands are on {weight.device.type}, not on a GPU"
    elif weight.dtype == torch.float64:
        return "fp64 on a GPU is served by the torch backend"
    elif not _has_settings(name := architecture_of(weight.device)):
        return f"no tile settings for {name}"
    return rank_unfit(terms)


def rank_unfit(terms: Terms) -> str | None:
    """Why the ranks of these terms are too large for the Triton kernels, if that is so."""
    rank = max(map(rank_of, (terms.A, terms.B, terms.C)))
    return f"rank {rank} is above {MAX_TRITON_RANK}" if rank > MAX_TRITON_RANK else None


def _extension_unfit(weight: Tensor) -> str | None:
    """Why the extension cannot serve this weight, if that is so. On a CPU it has the kernels' arithmetic, for tests."""
    from ._cuda import load

    if is_fake(weight):
        return "fake tensors have no memory to launch on"
    if weight.device.type == "cpu":
        return None
    if weight.device.type != "cuda" or not load().with_cuda:
        return f"the operands are on {weight.device.type}, for which the extension was not built"
    return "fp64 on a GPU is served by the torch backend" if weight.dtype == torch.float64 else None


def architecture_of(device: torch.device) -> str:
    """``sm_90`` and the like. Loads Triton: to be asked only where Triton could serve."""
    from ._triton.device import architecture

    return architecture(device)


@cache
def _has_settings(architecture: str) -> bool:
    from .planning.settings import load

    return nearest(architecture, tuple(load())) is not None


def tracing_reason() -> str | None:
    """Why only plainly composed operations will do, if that is so."""
    if transforms_are_active():
        return "a torch.func transform is active, which the composed formula supports to any order"
    if forward_mode_is_on():
        return "forward-mode AD is active, which the composed formula supports"
    return None


def _check_name(name: str, source: str) -> None:
    if name not in ASKABLE:
        raise ValueError(f"{source}: expected one of {ASKABLE}, got {name!r}")
    reason = available_backends().get(name)
    if reason is not None:
        usable = [backend for backend, why_not in available_backends().items() if why_not is None]
        raise RuntimeError(f"{source}: backend {name!r} is not available ({reason}); available: {usable}")


def backend_for(decision: Decision) -> Backend:
    """The backend of a decision (not the reference); Triton is loaded at its first use."""
    if decision.backend == "torch":
        return _torch
    if decision.backend == "cuda":
        from ._cuda import ExtensionBackend

        return ExtensionBackend()
    from ._triton import TritonBackend

    return TritonBackend(decision.strategy)
