"""What a layer forms from W0 and from dy: on a CPU each in one pass, where csrc/cpu.cpp is built.

Elsewhere they are several operations of PyTorch. The operators of ``glora_kernels._cpu`` take fp32 and fp64 and run in
torch's threads. W_eff has the same bits for any number of threads; sums for the same number.
"""

from __future__ import annotations

import math
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..terms import compute_dtype

BUILD = "GLORA_BUILD_CPU=1 pip install --no-build-isolation -e ."
NAME = "glora_kernels._cpu"


@cache
def fault() -> str | None:
    """Why the torch backend computes on CPUs without the passes of csrc/cpu.cpp; None if it has them."""
    if find_spec(NAME) is None:
        return f"not built; `{BUILD}` in the source tree builds them where GCC is"
    try:
        can_run = import_module(NAME).can_run()
    except ImportError as error:
        return f"they do not load and may have been built for another PyTorch ({error}); `{BUILD}`"
    if not can_run:
        return "this processor does not have their AVX2 instructions"
    _count_operations()
    return None


@cache
def _count_operations() -> None:
    """Tell torch's ``FlopCounterMode`` of the multiplications and additions of the operators' products."""
    from torch.utils.flop_counter import register_flop_formula

    def read(dy, output, tokens, rows, *_: object, **__: object) -> int:
        return 2 * math.prod(dy) * sum(factor[0] for factor in (tokens, rows) if factor is not None)

    def weigh(weight, _row, _column, _shift, _down, scale_up, _other, shift_up, *_: object, **__: object) -> int:
        return 2 * math.prod(weight) * sum(factor[0] for factor in (scale_up, shift_up) if factor is not None)

    register_flop_formula(torch.ops.glora_cpu.read_tokens)(read)
    register_flop_formula(torch.ops.glora_cpu.effective_weight)(weigh)


def takes(matrix: Tensor) -> bool:
    """Whether the operators are there and take this matrix: on a CPU, of fp32 or fp64, each row contiguous."""
    plain = type(matrix) is Tensor or type(matrix) is nn.Parameter
    if not plain or matrix.device.type != "cpu" or matrix.stride(1) != 1:
        return False
    return matrix.dtype in (torch.float32, torch.float64) and fault() is None


class TokenSums(NamedTuple):
    """What a backward pass forms from dy, (M, N); None where it is not asked for.

    Attributes:
        sums: of dy over tokens, (N,), in the compute dtype.
        dots: of dy * y over tokens, (N,), in the compute dtype.
        contracted: ``tokens dy``, (r, N).
        through: ``rows dy^T``, (r, M).
    """

    sums: Tensor | None
    dots: Tensor | None
    contracted: Tensor | None
    through: Tensor | None


def read_gradient(
    dy: Tensor, sums: bool, output: Tensor | None, tokens: Tensor | None, rows: Tensor | None
) -> TokenSums:
    """All that is formed from dy.

    Args:
        sums: whether the sums of dy are wanted.
        output: y, (M, N), for the dots.
        tokens: (r, M); rows: (r, N).
    """
    together = sum((sums, output is not None, tokens is not None, rows is not None))
    if together > 1 and takes(dy) and (output is None or takes(output)):
        found = torch.ops.glora_cpu.read_tokens(dy, output, _dense(tokens), _dense(rows), sums)
        asked = sums, output is not None, tokens is not None, rows is not None
        return TokenSums(*(tensor if wanted else None for tensor, wanted in zip(found, asked)))
    return TokenSums(
        dy.sum(0, dtype=compute_dtype(dy.dtype)) if sums else None,
        None if output is None else column_dots(dy, output),
        None if tokens is None else torch.mm(tokens, dy),
        None if rows is None else F.linear(rows, dy),
    )


def column_dots(left: Tensor, right: Tensor) -> Tensor:
    """``sum_m left_mn right_mn`` in the compute dtype, (N,)."""
    wide = compute_dtype(left.dtype)
    return torch.linalg.vecdot(left.to(wide), right.to(wide), dim=0)


def effective_weight(
    weight: Tensor,
    *,
    row_scale: Tensor | None = None,
    column_scale: Tensor | None = None,
    scale: tuple[Tensor, Tensor] | None = None,
    row_shift: Tensor | None = None,
    shift: tuple[Tensor, Tensor] | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """``W_eff = W scale + shift`` in one pass over a weight that is taken (:func:`takes`).

    Args:
        row_scale: (N,); column_scale: (K,), each in place of a scale of 1.
        scale: factors (N, r), (r, K) of what is added to a scale of 1.
        row_shift: (N,); shift: factors of what is added to W.
        out: (N, K), contiguous, to be overwritten.
    """
    factors = (_dense(factor) for pair in (scale or (None, None), shift or (None, None)) for factor in pair)
    vectors = (_dense(vector) for vector in (row_scale, column_scale, row_shift))
    out = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device) if out is None else out
    torch.ops.glora_cpu.effective_weight(weight, *vectors, *factors, out)
    return out


def _dense(tensor: Any) -> Any:
    """``tensor`` with each row contiguous."""
    return tensor if tensor is None or tensor.stride(-1) == 1 or tensor.shape[-1] < 2 else tensor.contiguous()
