"""The pure PyTorch backend: the minimum-GEMM formulation, on any device PyTorch runs on."""

from .assemble import assemble
from .linear import glora_linear

__all__ = ["assemble", "glora_linear"]
