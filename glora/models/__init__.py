"""What a model is made of: its modules and their names, heads, readers of weights, and what files hold of it."""

from .modules import glora_layers

__all__ = ["glora_layers"]
