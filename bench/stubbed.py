"""The Triton route on CPU tensors, launcher included, with kernels that do nothing: what is left is the host's time.

    with stubbed():
        layer = glora.GLoRALinear(32, 32)
        layer(x)  # every step of a call on a GPU, up to that of the compiled kernel, which is a C function

Results are whatever was in memory. A layer may keep to the route and to the kernels of its first call: one that is
called in such blocks is of no use elsewhere, and the other way round.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch

ARCHITECTURE = "sm_90"
does_nothing = "".format  # a function of C that takes any arguments
COMPILED = SimpleNamespace(run=does_nothing, function=0, packed_metadata=())
_DRIVER = SimpleNamespace(active=SimpleNamespace(get_current_stream={}.get))  # of C too


def fault() -> str | None:
    """Why there is no such route here, if that is so."""
    if find_spec("triton") is None:
        return "Triton is not installed"
    from triton.runtime.interpreter import InterpretedFunction

    from glora_kernels._triton.kernels.assemble import assemble_kernel

    if isinstance(assemble_kernel, InterpretedFunction):
        return "kernels are interpreted in this process: TRITON_INTERPRET is set"
    return None


@contextmanager
def stubbed(strategy: str | None = None) -> Iterator[None]:
    """Send the calls inside the ``with`` block to the Triton backend, as on a GPU where no backend was chosen.

    Args:
        strategy: ``"assemble"`` or ``"fused"``; None lets the cost model choose.

    Raises:
        RuntimeError: :func:`fault` says why.
    """
    reason = fault()
    if reason is not None:
        raise RuntimeError(f"stubbed: {reason}")
    import triton

    from glora_kernels._triton import launch

    with (
        routed(ARCHITECTURE, strategy),
        patch.object(launch, "compile_for", lambda *_: COMPILED),
        patch.object(triton.runtime, "driver", _DRIVER),
    ):
        yield


@contextmanager
def routed(architecture: str, strategy: str | None = None) -> Iterator[None]:
    """Send calls on CPU tensors to the Triton backend, as on a GPU of this architecture; something has to launch there.

    ``use_backend("triton")`` works too.
    """
    from glora_kernels import dispatch
    from glora_kernels._triton import backend, device  # noqa: F401  (backend loads what names architecture)

    to_triton, to_torch = dispatch.Decision("triton", "stubbed", strategy), dispatch.Decision("torch", "stubbed")

    def unfit(weight: torch.Tensor, terms: Any) -> str | None:
        return (
            "fp64 on a GPU is served by the torch backend"
            if weight.dtype == torch.float64
            else dispatch.rank_unfit(terms)
        )

    with (
        _everywhere(dispatch.automatic, lambda *operands: to_torch if unfit(*operands) else to_triton),
        _everywhere(dispatch.triton_unfit, unfit),
        patch.object(dispatch, "_triton_reason", lambda: None),
        _everywhere(device.architecture, lambda *_: architecture),
        patch.object(torch.cuda, "current_device", lambda: None),  # the index of the device of a CPU tensor
    ):
        yield


@contextmanager
def _everywhere(function: Callable, other: Callable) -> Iterator[None]:
    """Put ``other`` in the place of a function of ``glora_kernels``, in every module that has it by name."""
    _exchange(function, other)
    try:
        yield
    finally:
        _exchange(other, function)


def _exchange(old: Any, new: Any) -> None:
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == "glora_kernels":
            for known, value in list(vars(module).items()):
                if value is old:
                    setattr(module, known, new)
