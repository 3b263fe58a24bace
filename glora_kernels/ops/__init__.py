"""Operations on tensors, one file for each: checked, sent to a backend, and differentiable."""

from .linear import compute, glora_linear, glora_merge

__all__ = ["compute", "glora_linear", "glora_merge"]
