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
        self._values = [v.to("cpu", non_blocking=True) if isinstance(v, Tensor) else v for v in values]
        device = next((v.device for v in values if isinstance(v, Tensor) and v.is_cuda), None)
        self._arrival = None if device is None else torch.cuda.Event()
        if self._arrival is not None:
            self._arrival.record(torch.cuda.current_stream(device))

    def wait(self) -> list[float]:
        """The values as numbers, as soon as they are here."""
        if self._arrival is not None:
            self._arrival.synchronize()
        return [float(value) for value in self._values]
