"""The pure PyTorch backend: the minimum-GEMM formulation, on any device PyTorch runs on."""

from .assemble import assemble, project
from .gradients import backward
from .linear import forward

__all__ = ["assemble", "backward", "forward", "project"]
