"""The gradient of A as a hadamard vector, solved from the output without a dense product.

``da_n = sum_m dy_mn z_mn`` needs ``z = x W0^T``, a dense GEMM. But the output contains z already:
``y = (1 + a) z + x B^T + b_eff``. So da is solved for, and z is formed only for the rows where that
would lose digits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..gradient_routes import ACCEPTED_LOSS, PROBED_TOKENS
from ..terms import compute_dtype

# B as rows^T columns, of rank r (1 for a vector or constant), and its contraction with dW: rows (r, N); columns
# (r, K), None stands for ones; columns x^T (r, M); columns dW^T (r, N).
Thin = tuple[Tensor, "Tensor | None", Tensor, Tensor]


def row_scale_gradient(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    a: Tensor,
    output: Tensor | None,
    b_eff: Tensor | None,
    db: Tensor | None,
    thin: Thin | None,
) -> Tensor:
    """``da_n = sum_m dy_mn z_mn``, ``z = x W0^T``, of shape (N,).

    From ``y = s z + x B^T + b_eff`` with ``s = 1 + a``:
    ``s da = sum_m dy y - b_eff db - sum_k B dW``; rows where this loses digits are formed from z.
    """
    if output is None:
        return _column_dots(dy, x @ weight.t())
    assert db is not None
    wide = compute_dtype(dy.dtype)
    scale = a + 1
    b_eff = torch.zeros_like(scale) if b_eff is None else b_eff.to(wide)
    da = _column_dots(dy, output) - b_eff * db
    if thin is not None:
        rows, _, _, contracted = thin
        da -= (rows.to(wide) * contracted.to(wide)).sum(0)
    da /= scale
    lost = _unreliable_rows(dy, x, weight, scale, b_eff, thin) | ~da.isfinite()
    if lost.any():
        da[lost] = _column_dots(dy[:, lost], x @ weight[lost].t())
    return da


def _unreliable_rows(dy: Tensor, x: Tensor, weight: Tensor, scale: Tensor, b_eff: Tensor, thin: Thin | None) -> Tensor:
    """Rows where solving ``da`` from the output loses digits, as a mask (N,).

    The rounding errors of what is taken off the output must not dwarf the errors that the contract
    allows for ``da``. The scales of both, with |.| on every factor, are compared over some evenly
    spaced tokens: ``sum |dy| (|b_eff| + |x| |B|^T)`` and ``|s| sum |dy| |x| |W0|^T``.
    (``|x B^T|`` would not do: after a layer norm it can be 0 where its terms are large.)
    A row without evidence (dy zero on all of these tokens, ``s = 0``, NaN) counts as unreliable.
    """
    tokens, wide = dy.shape[0], scale.dtype
    count = min(tokens, PROBED_TOKENS)
    probe = torch.arange(count, device=dy.device) * tokens // count
    weights, inputs = dy[probe].to(wide).abs_(), x[probe].to(wide).abs_()
    taken = b_eff.abs().expand(count, -1)
    if thin is not None:
        rows, columns, _, _ = thin
        through = inputs.sum(1, keepdim=True) if columns is None else inputs @ columns.to(wide).abs().t()
        taken = torch.addmm(taken, through, rows.to(wide).abs())
    lost = torch.linalg.vecdot(weights, taken, dim=0)
    allowed = torch.linalg.vecdot(weights, inputs @ weight.to(wide).abs().t(), dim=0) * scale.abs()
    return ~(lost < ACCEPTED_LOSS[dy.dtype] * allowed)


def _column_dots(left: Tensor, right: Tensor) -> Tensor:
    """``sum_m left_mn right_mn`` in the compute dtype, (N,)."""
    wide = compute_dtype(left.dtype)
    return torch.linalg.vecdot(left.to(wide), right.to(wide), dim=0)
