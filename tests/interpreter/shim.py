"""Triton's interpreter made faithful: bf16 as a GPU computes it, int32 arithmetic checked. For tests only.

The interpreter keeps bf16 as uint16 and computes with the bits: dots multiply bit patterns, casts from fp32 truncate,
subnormals are wrong. Here loads, casts, dots and stores of bf16 are right, and any other arithmetic on it raises:
kernels use bf16 to load, to multiply in dots, to cast and to store, and compute in fp32. Dots of fp16, fp32 and
fp64 are right as they are: numpy widens the operands to the type of the accumulator before it multiplies.

Not modelled: TF32, the smallest sizes of a dot, an fma's single rounding before Triton 3.9.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import numpy as np
import torch
import triton.language as tl
from torch.utils import deterministic
from triton.runtime import interpreter
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, ReduceScanOpInterface, TensorHandle

CASTS = {"si_to_fp", "ui_to_fp", "fp_to_si", "fp_to_ui", "fp_ext", "fp_trunc", "fp_to_fp", "int_cast", "bitcast"}
MEMORY = {"load", "store", "masked_load", "masked_store", "descriptor_store"}
MOVEMENT = {"select", "splat", "unsplat", "broadcast", "expand_dims", "reshape", "trans"}
ALLOWED = {f"create_{name}" for name in CASTS | MEMORY | MOVEMENT | {"dot"}}


def install() -> None:
    """Patch the interpreter, once a process."""
    if hasattr(InterpreterBuilder, "faithful"):
        return
    InterpreterBuilder.faithful = True
    for name, method in list(vars(InterpreterBuilder).items()):
        if name.startswith("create_") and name not in ALLOWED:
            setattr(InterpreterBuilder, name, _refusing_bf16(method, name))
    InterpreterBuilder.get_bf16 = _bf16_constant
    InterpreterBuilder.cast_impl = _cast(InterpreterBuilder.cast_impl)
    InterpreterBuilder.create_fp_to_fp = _cast_with_rounding(InterpreterBuilder.create_fp_to_fp)
    InterpreterBuilder.create_dot = _dot(InterpreterBuilder.create_dot)
    ReduceScanOpInterface.check_tensor = _refusing_bf16_tensors(ReduceScanOpInterface.check_tensor)
    GridExecutor.__call__ = _silent(GridExecutor.__call__)
    interpreter._patch_lang_tensor = _with_index(interpreter._patch_lang_tensor)
    _detect_overflow()


def untouched(numel: int, dtype: torch.dtype) -> torch.Tensor:
    """``torch.empty`` that is not poisoned: pages take no memory until used, so offsets beyond 2**31 cost nothing."""
    fill = deterministic.fill_uninitialized_memory
    deterministic.fill_uninitialized_memory = False
    try:
        return torch.empty(numel, dtype=dtype)
    finally:
        deterministic.fill_uninitialized_memory = fill


def bf16_to_float32(bits: np.ndarray) -> np.ndarray:
    """Exact."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def to_bf16(values: np.ndarray) -> np.ndarray:
    """The bits of numbers of any type, rounded once, to nearest even (64-bit integers beyond 2**53: twice)."""
    bits = _round_to_odd(values).view(np.uint32)
    rounded = (bits + (((bits >> 16) & 1) + 0x7FFF)) >> 16
    is_nan = (bits & 0x7FFFFFFF) > 0x7F800000
    return np.where(is_nan, 0x7FC0, rounded).astype(np.uint16)


def _round_to_odd(values: np.ndarray) -> np.ndarray:
    """fp32, truncated, with the last bit set where digits are lost: rounding that is like rounding ``values``."""
    exact = values.astype(np.float64)
    nearest = exact.astype(np.float32)
    back = nearest.astype(np.float64)
    truncated = nearest.view(np.uint32) - (np.abs(back) > np.abs(exact))
    return (truncated | (back != exact)).view(np.float32)


def _is_bf16(handle: object) -> bool:
    return isinstance(handle, TensorHandle) and handle.dtype.scalar == tl.bfloat16


def _widened(handle: TensorHandle) -> TensorHandle:
    return TensorHandle(bf16_to_float32(handle.data), tl.float32) if _is_bf16(handle) else handle


def _refusing_bf16(method: Callable, name: str) -> Callable:
    @functools.wraps(method)
    def checked(self, *args, **kwargs):
        if any(map(_is_bf16, (*args, *kwargs.values()))):
            raise TypeError(f"bf16 in {name}: kernels load, multiply in dots, cast and store bf16; compute in fp32")
        return method(self, *args, **kwargs)

    return checked


def _refusing_bf16_tensors(method: Callable) -> Callable:
    """Reductions and scans do not pass through the builder."""

    @functools.wraps(method)
    def checked(self, tensors):
        if any(tensor.dtype == tl.bfloat16 for tensor in tensors):
            raise TypeError("bf16 in a reduction or scan: compute in fp32")
        return method(self, tensors)

    return checked


def _bf16_constant(_builder: InterpreterBuilder, value: float) -> TensorHandle:
    """Of a scalar that meets bf16, as in ``tl.where(mask, x, 1.0)``; missing before Triton 3.9."""
    return TensorHandle(to_bf16(np.array([value])), tl.bfloat16)


def _cast(method: Callable) -> Callable:
    @functools.wraps(method)
    def cast(self, src, dst_type):
        source, target = src.dtype.scalar, dst_type.scalar
        if tl.bfloat16 in (source, target) and (source.is_fp8() or target.is_fp8()):
            raise NotImplementedError(f"cast from {source} to {target}")
        wide = _widened(src)
        return TensorHandle(to_bf16(wide.data), target) if target == tl.bfloat16 else method(self, wide, dst_type)

    return cast


def _cast_with_rounding(method: Callable) -> Callable:
    @functools.wraps(method)
    def cast(self, src, dst_type, rounding_mode):
        if tl.bfloat16 not in (src.dtype.scalar, dst_type.scalar):
            return method(self, src, dst_type, rounding_mode)
        if rounding_mode not in (None, interpreter._ir.ROUNDING_MODE.RTNE):
            raise NotImplementedError(f"cast of bf16 with {rounding_mode}")
        return self.cast_impl(src, dst_type)

    return cast


def _dot(method: Callable) -> Callable:
    @functools.wraps(method)
    def dot(self, a, b, *args):
        return method(self, _widened(a), _widened(b), *args)

    return dot


def _silent(method: Callable) -> Callable:
    """Overflow and NaN are results, as on a GPU, not numpy's warnings (errors, under pytest)."""

    @functools.wraps(method)
    def launch(self, *args, **kwargs):
        with np.errstate(all="ignore"):
            return method(self, *args, **kwargs)

    return launch


def _with_index(patch_tensor: Callable) -> Callable:
    """``range(0, n)`` of a run-time n: Triton 3.6 does ``int`` of an array of one element, an error in numpy >= 2.4."""

    @functools.wraps(patch_tensor)
    def patch(tensor, scope):
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    return patch


def _detect_overflow() -> None:
    """Integer +, - and * of less than 64 bits assert that they do not overflow; ``tl.device_assert`` works too."""
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, debug=True)
