"""The pure PyTorch backend: the minimum-GEMM formulation, on any device PyTorch runs on."""

from .assemble import assemble, project
from .gradients import backward
from .linear import forward

reads_values = True  # to see which rows of da cannot be solved from the output
takes_token_sums = True  # for a vector or constant B, nothing else of x is read
whole_layer = None

__all__ = ["assemble", "backward", "forward", "project", "reads_values", "takes_token_sums", "whole_layer"]
