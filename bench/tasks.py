"""What is timed: one layer, and a whole classifier."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True, eq=False)
class LayerTask:
    """Forward, and backward from a given gradient of the output.

    Args:
        x: tokens, ``(M, K)``, a leaf that requires grad.
        dy: ``(M, N)``.
    """

    x: Tensor
    dy: Tensor

    def step(self, model: nn.Module) -> Tensor:
        self.x.grad = None
        model.zero_grad(set_to_none=True)
        y = model(self.x)
        y.backward(self.dy)
        return y

    def input_gradients(self) -> dict[str, Tensor]:
        assert self.x.grad is not None
        return {"x": self.x.grad}

    def double(self) -> LayerTask:
        return LayerTask(self.x.detach().double().requires_grad_(), self.dy.double())


@dataclass(frozen=True, eq=False)
class ClassifierTask:
    """Forward, cross-entropy, backward.

    Args:
        images: a batch that does not require grad.
        labels: ``(batch,)``.
    """

    images: Tensor
    labels: Tensor

    def step(self, model: nn.Module) -> Tensor:
        model.zero_grad(set_to_none=True)
        logits = model(self.images)
        F.cross_entropy(logits, self.labels).backward()
        return logits

    def input_gradients(self) -> dict[str, Tensor]:
        return {}

    def double(self) -> ClassifierTask:
        return ClassifierTask(self.images.double(), self.labels)
