"""The pure PyTorch backend: the minimum-GEMM formulation, on any device PyTorch runs on."""

from .assemble import assemble, project
from .gradients import backward
from .linear import forward
from .plans import plan

reads_values = True  # to see which rows of da cannot be solved from the output
whole_layer = None

__all__ = ["assemble", "backward", "forward", "plan", "project", "reads_values", "whole_layer"]
