"""Adapted layers: what all of them have in common, one file for each plain layer, and which adapts which."""

from .base import GLoRALayer
from .conv1d import GLoRAConv1D
from .conv2d import GLoRAConv2d
from .linear import GLoRALinear
from .quantised import GLoRAQuantisedLinear

__all__ = ["GLoRAConv1D", "GLoRAConv2d", "GLoRALayer", "GLoRALinear", "GLoRAQuantisedLinear"]
