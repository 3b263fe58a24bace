"""torch's setting for products in fp32, which the kernels follow."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from torch import Tensor

from .torch_private import autocast_is_on

fp32_precision: Callable[[], str] = partial(getattr, torch.backends.cuda.matmul, "fp32_precision")  # torch's setting


def tf32_allowed() -> bool:
    """Whether fp32 products on a GPU may use TF32; follows torch's older settings too, but unlike them never raises."""
    return fp32_precision() == "tf32"


_AS_IT_IS = nullcontext()


def without_autocast(device_type: str) -> AbstractContextManager:
    """A block in which operations keep the dtypes they are given."""
    return torch.autocast(device_type, enabled=False) if _active(device_type) else _AS_IT_IS


def cast_operands(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """The three in the autocast dtype if autocast is active; fp64 is left alone, as everywhere.

    It runs before the checks, so anything that is not a floating tensor passes through to them.
    """
    if not autocast_is_on() or not isinstance(x, Tensor) or not _active(x.device.type):
        return x, weight, bias
    dtype = torch.get_autocast_dtype(x.device.type)
    return _cast(x, dtype), _cast(weight, dtype), _cast(bias, dtype)


def _active(device_type: str) -> bool:
    # autocast does not know meta
    return autocast_is_on() and device_type != "meta" and torch.is_autocast_enabled(device_type)


def _cast(tensor, dtype: torch.dtype):
    castable = isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.dtype != torch.float64
    return tensor.to(dtype) if castable else tensor
