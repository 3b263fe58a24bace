"""The numerical contract as code (docs/numerics.md): ``|err| <= c u S + tiny`` for every element of every result.

u is the unit roundoff of the dtype and S the same formula on the absolute values of all inputs, in fp64.
"""

from __future__ import annotations

import torch
from torch import Tensor

UNIT_ROUNDOFF = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float32: 2.0**-24, torch.float64: 2.0**-53}
# c of each dtype. fp64 is for tests and has no promise of its own; the bound of fp32 holds there too.
PROMISED = {torch.float16: 3.0, torch.bfloat16: 3.0, torch.float32: 8.0, torch.float64: 8.0}


def largest_constant(actual: Tensor, expected: Tensor, scale: Tensor, dtype: torch.dtype) -> float:
    """``max (|actual - expected| - tiny) / (u S)``; infinite where S is 0 and the error is not, NaN for a NaN.

    Args:
        actual: computed in ``dtype``.
        expected, scale: the truth and S, in fp64.
        dtype: its u and tiny are used; tiny is its smallest subnormal number.
    """
    tiny = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    error = (actual.double() - expected).abs()
    # A value beyond the dtype's range rounds to infinity: fp16's is small.
    overflow = expected.to(actual.dtype).isinf() & (actual == expected.to(actual.dtype))
    excess = torch.where(overflow, 0.0, error - tiny).clamp_min(0)
    ratio = torch.where(excess > 0, excess / (UNIT_ROUNDOFF[dtype] * scale), excess)
    return float(ratio.max()) if ratio.numel() else 0.0
