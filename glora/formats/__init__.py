"""Adapter files: our own, those of LyCORIS, and those of the official code."""

from .adapter_file import load_adapter, save_adapter
from .lycoris import load_lycoris, save_lycoris
from .official import load_official, official_paths, save_official

__all__ = [
    "load_adapter",
    "load_lycoris",
    "load_official",
    "official_paths",
    "save_adapter",
    "save_lycoris",
    "save_official",
]
