"""The name that the settings give to the GPU of a tensor."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

import torch

from ..planning.settings import INTERPRETER

_pretended: str | None = None


def architecture(device: torch.device) -> str:
    """``sm_90``, ``gfx942`` and the like; ``interpreter`` for the CPU under TRITON_INTERPRET=1."""
    if device.type == "meta":
        assert _pretended is not None, "meta tensors are for `pretended` only"
        return _pretended
    return INTERPRETER if device.type == "cpu" else _gpu(device.index or 0)


@contextmanager
def pretended(name: str) -> Iterator[None]:
    """Treat meta tensors as tensors on a GPU of this architecture, to see what would be launched there."""
    global _pretended
    before, _pretended = _pretended, name
    try:
        yield
    finally:
        _pretended = before


@lru_cache
def _gpu(index: int) -> str:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        return properties.gcnArchName.split(":")[0]
    return f"sm_{properties.major}{properties.minor}"
