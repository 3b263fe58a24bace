"""The Triton backend: fused kernels for CUDA and ROCm, and for the CPU in Triton's interpreter (for tests).

Import it lazily: it loads Triton.
"""

from .backend import TritonBackend

__all__ = ["TritonBackend"]
