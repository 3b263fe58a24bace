"""The pure PyTorch backend: the minimum-GEMM formulation, on any device PyTorch runs on."""

from .assemble import assemble, project
from .gradients import backward
from .linear import forward

reads_values = True  # which rows of da have to be formed anew
takes_token_sums = True  # a vector or constant B reads nothing else of x
whole_layer = None

__all__ = ["assemble", "backward", "forward", "project", "reads_values", "takes_token_sums", "whole_layer"]
