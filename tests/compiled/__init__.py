"""Compiled kernels, run without a GPU."""
