"""Telling tensors of one run from those of another."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def checksum(tensors: Iterable[Tensor]) -> int:
    """CRC-32 of the bytes of all tensors, in order."""
    value = 0
    for tensor in tensors:
        for part in parts(tensor):
            data = part.detach().cpu().contiguous().flatten().view(torch.uint8)
            value = zlib.crc32(data.numpy().tobytes(), value)
    return value


def parts(tensor: Tensor) -> Iterator[Tensor]:
    """The tensors that hold the bytes of ``tensor``: itself, or what a quantised one is made of."""
    if not is_traceable_wrapper_subclass(tensor):
        yield tensor
        state = getattr(tensor, "quant_state", None)  # of bitsandbytes' 4-bit weights: scales, and what they mean
        if state is not None:
            yield from state.as_dict(packed=True).values()
        return
    for name in tensor.__tensor_flatten__()[0]:
        yield from parts(getattr(tensor, name))
