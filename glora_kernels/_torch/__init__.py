"""The pure PyTorch backend: the minimum-GEMM formulation, on any device PyTorch runs on."""

from .plans import TorchPlan, plan

reads_values = True  # to see which rows of da cannot be solved from the output
whole_layer = None

__all__ = ["TorchPlan", "plan", "reads_values", "whole_layer"]
