"""When the gradient of a row scale may be solved from the output, and how much loss of digits is accepted.

``da_n = sum_m dy_mn z_mn`` with ``z = x W0^T`` would be a dense GEMM to form. But the output holds z:
``y = (1 + a) z + x B^T + b_eff``. Every backend solves for da, guards the result in the same way, and forms the rows
that would lose digits from z (docs/numerics.md).
"""

from __future__ import annotations

import torch

from .routes import scales_rows
from .terms import Terms

# Solving pays off, and its rounding errors average out, from this size on.
MIN_TOKENS_TO_REUSE = 64
MIN_INPUTS_TO_REUSE = 64
# Tokens on which the loss of digits is estimated, and how much of it is accepted. The contract allows an error of
# 3 u S in half types and 8 u S in others; part of it is left to the sums.
PROBED_TOKENS = 16
ACCEPTED_LOSS = {torch.float16: 2.0, torch.bfloat16: 2.0, torch.float32: 3.0, torch.float64: 3.0}


def reuses_output(tokens: int, inputs: int, terms: Terms) -> bool:
    """Whether ``da`` can be solved from the output, so that it is worth keeping for backward."""
    return scales_rows(terms) and tokens >= MIN_TOKENS_TO_REUSE and inputs >= MIN_INPUTS_TO_REUSE
