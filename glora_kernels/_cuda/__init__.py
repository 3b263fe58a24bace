"""The optional extension ``glora_kernels._C``, built from ``csrc/``: loading it, and the backend that calls it."""

from .backend import ExtensionBackend
from .extension import BUILD, fault, load

__all__ = ["BUILD", "ExtensionBackend", "fault", "load"]
