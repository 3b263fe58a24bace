"""Training steps in CUDA graphs: the step as a whole or in pieces, and what they read from the device."""

from .graphed_step import GraphedStep

__all__ = ["GraphedStep"]
