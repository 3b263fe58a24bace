"""Copies between the host and a GPU for which the host does not wait."""

from __future__ import annotations

import torch
from torch import Tensor


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """``tensor``, of the host, on ``device``; a GPU's stream has it in time for what is queued there next."""
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)


class Download:
    """Values of a step on their way to the host.

    Args:
        values: numbers, and tensors of one element on any device.
    """

    def __init__(self, *values: Tensor | float):
        self._values = [v.to("cpu", non_blocking=v.is_cuda) if isinstance(v, Tensor) else v for v in values]
        devices = {v.device for v in values if isinstance(v, Tensor) and v.is_cuda}
        self._arrivals = [torch.cuda.current_stream(device).record_event() for device in devices]

    def wait(self) -> list[float]:
        """The values as numbers, as soon as they are here."""
        for arrival in self._arrivals:
            arrival.synchronize()
        return [float(value) for value in self._values]
