"""What a graphed step computes, however it is captured."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .path_data import PathData

Loss = Callable[[Tensor, Tensor], Tensor]  # (output, target) -> scalar
Measure = Callable[[Tensor, Tensor], Tensor | None]  # of output and target
Outcome = tuple[Tensor, Tensor | None]  # the loss, and what was measured


@dataclass(frozen=True, eq=False)
class StepBody:
    """A training step without its path.

    Attributes:
        loss: ``(x, target) -> (loss, measured)`` of the model.
        precision: the dtype of autocast, or None.
        data: the paths on the device.
        clip_norm: the largest norm of the gradients of all parameters of the optimiser, or None.
    """

    model: nn.Module
    optimizer: Optimizer
    loss: Callable[[Any, Tensor], Outcome]
    precision: torch.dtype | None
    data: PathData
    clip_norm: float | None

    @property
    def device(self) -> torch.device:
        return self.data.device

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def forward(self, x: Any, target: Tensor) -> Outcome:
        with self.autocast():
            return self.loss(x, target)

    def clip(self) -> None:
        if self.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.parameters, self.clip_norm)

    def autocast(self) -> torch.autocast:
        """Autocast without a cache of casts, which would keep tensors of one replay for the next."""
        return torch.autocast(self.device.type, self.precision, self.precision is not None, cache_enabled=False)

    @contextmanager
    def rehearsing(self, changing: Iterable[Tensor] = ()) -> Iterator[None]:
        """Restore buffers, random generators and the tensors in ``changing`` at the end of the ``with`` block."""
        devices = [self.device] if self.device.type == "cuda" else []
        with unchanged([*changing, *self.model.buffers()]), torch.random.fork_rng(devices):
            yield


@contextmanager
def unchanged(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Restore the values of ``tensors`` at the end of a ``with`` block."""
    tensors = list(tensors)
    before = [tensor.clone() for tensor in tensors]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, value in zip(tensors, before):
                tensor.copy_(value)
