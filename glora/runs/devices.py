"""The device of a run, and the processes that share its work."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.distributed as dist

from ..processes import is_first


class Process(NamedTuple):
    """This process: its device, and whether it is the one that prints for all."""

    device: torch.device
    first: bool


def choose_device(name: str) -> torch.device:
    """The device; ``"auto"`` is CUDA if there is a GPU, else the CPU. Raises ValueError for an absent device."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"device: expected one that is here, such as cpu, got {name!r} ({error})") from None
    return device


@contextmanager
def process_group(name: str) -> Iterator[Process]:
    """A ``with`` block that under ``torchrun`` has the group of all its processes (NCCL on CUDA, else gloo)."""
    if not dist.is_available() or not dist.is_torchelastic_launched():
        yield Process(choose_device(name), first=True)
        return
    device = choose_device(name)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield Process(device, is_first())
    finally:
        dist.destroy_process_group()
