"""torch's setting for products in fp32, which the kernels follow."""

from __future__ import annotations

import torch


def tf32_allowed() -> bool:
    """Whether fp32 products on a GPU may use TF32; follows the older settings too, and never raises as they can."""
    return torch.backends.cuda.matmul.fp32_precision == "tf32"
