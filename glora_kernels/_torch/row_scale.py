"""The gradient of A as a hadamard vector, solved from the output without a dense product.

``da_n = sum_m dy_mn z_mn`` needs ``z = x W0^T``, a dense GEMM. But the output contains z already:
``y = s z + x B^T + b_eff`` with ``s = 1 + a``. So da is solved for, and z is formed only for the rows where that
would lose digits.

Which rows, is estimated on some evenly spaced tokens. The rounding errors of what is taken off the output must not
dwarf the errors that the contract allows for da. The scales of both, with |.| on every factor, are compared:

    lost = sum |dy| (|b_eff| + |x| |Bu|^T |Bd|^T)      allowed = |s| sum |dy| |x| |W0|^T      lost < c allowed

(``|x B^T|`` would not do: after a layer norm it can be 0 where its terms are large.) A row without evidence (dy zero on
all of these tokens, ``s = 0``, NaN) counts as lost.

The product ``|x| |W0|^T`` is formed in two stages. No term of it is negative, so its part over the first 1/8 of the
inputs is at most the whole, and a row that this part keeps would be kept by the whole. Other rows are compared by the
whole. MARGIN makes up for rounding: up to ``(K + 16) 2^-24`` in either comparison, and 2^-7 more where torch is told to
form products in TF32 or bf16; in all below 0.1 for K up to 2^19. The part may miss a NaN or infinity of x or W0. Then
the output has one too, da is not finite, and its row is lost anyway.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..gradient_routes import ACCEPTED_LOSS, PROBED_PART, PROBED_TOKENS
from ..terms import compute_dtype
from .passes import column_dots

# B as rows^T columns, of rank r (1 for a vector or constant), and its contraction with dW: rows (r, N); columns
# (r, K), None stands for ones; columns x^T (r, M); columns dW^T (r, N).
Thin = tuple[Tensor, "Tensor | None", Tensor, Tensor]

MARGIN = 0.9
EVERY = slice(None)


def row_scale_gradient(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    a: Tensor,
    dots: Tensor | None,
    b_eff: Tensor | None,
    db: Tensor | None,
    thin: Thin | None,
) -> Tensor:
    """``da_n = sum_m dy_mn z_mn``, ``z = x W0^T``, of shape (N,).

    ``s da = sum_m dy y - b_eff db - sum_k B dW``; rows where this loses digits are formed from z.

    Args:
        dots: ``sum_m dy y``, (N,), in the compute dtype; None where the output is not at hand.
    """
    if dots is None:
        return column_dots(dy, x @ weight.t())
    assert db is not None
    wide = compute_dtype(dy.dtype)
    scale = a + 1
    b_eff = torch.zeros_like(scale) if b_eff is None else b_eff.to(wide)
    da = dots - b_eff * db
    if thin is not None:
        rows, _, _, contracted = thin
        da -= (rows.to(wide) * contracted.to(wide)).sum(0)
    da /= scale
    lost = _lost_rows(dy, x, weight, scale, b_eff, thin) | ~da.isfinite()
    if lost.any():
        da[lost] = column_dots(dy[:, lost], x @ weight[lost].t())
    return da


def _lost_rows(dy: Tensor, x: Tensor, weight: Tensor, scale: Tensor, b_eff: Tensor, thin: Thin | None) -> Tensor:
    """Rows where solving ``da`` from the output loses digits, as a mask (N,)."""
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
    accepted, sizes_of_scale = ACCEPTED_LOSS[dy.dtype], scale.abs()

    def is_lost(rows: Tensor | slice, columns: slice, accepted: float) -> Tensor:
        sizes = inputs[:, columns] @ weight[rows, columns].to(wide).abs().t()
        allowed = torch.linalg.vecdot(weights[:, rows], sizes, dim=0) * sizes_of_scale[rows]
        return ~(lost[rows] < accepted * allowed)

    doubtful = is_lost(EVERY, slice(weight.shape[1] // PROBED_PART), MARGIN * accepted)
    doubted = int(doubtful.sum())
    if 2 * doubted > len(doubtful):  # a copy of most rows takes longer than their products
        return is_lost(EVERY, EVERY, accepted)
    if doubted:
        rows = doubtful.nonzero().squeeze(1)
        doubtful[rows] = is_lost(rows, EVERY, accepted)
    return doubtful
