"""What is timed: one layer, a whole classifier, and its inference."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .agreement import Workload
from .timing import Timed, Watch

FORWARD, BACKWARD = "forward", "backward"


@dataclass(frozen=True, eq=False)
class LayerWorkload:
    """A layer's forward, and its backward from a given gradient of the output.

    Args:
        x: tokens, ``(M, K)``, a leaf that requires grad.
        dy: ``(M, N)``.
    """

    x: Tensor
    dy: Tensor

    def reset(self, model: nn.Module) -> None:
        self.x.grad = None
        model.zero_grad(set_to_none=True)

    def forward(self, model: nn.Module) -> Tensor:
        return model(self.x)

    def backward(self, model: nn.Module, y: Tensor) -> None:
        y.backward(self.dy)

    def input_gradients(self) -> dict[str, Tensor]:
        assert self.x.grad is not None
        return {"x": self.x.grad}

    def double(self) -> LayerWorkload:
        return LayerWorkload(self.x.detach().double().requires_grad_(), self.dy.double())

    def magnitudes(self) -> LayerWorkload:
        return LayerWorkload(self.x.detach().float().abs().requires_grad_(), self.dy.float().abs())


@dataclass(frozen=True, eq=False)
class ClassifierWorkload:
    """A classifier's forward; cross-entropy and backward.

    Args:
        images: a batch that does not require grad.
        labels: ``(batch,)``.
    """

    images: Tensor
    labels: Tensor

    def reset(self, model: nn.Module) -> None:
        model.zero_grad(set_to_none=True)

    def forward(self, model: nn.Module) -> Tensor:
        return model(self.images)

    def backward(self, model: nn.Module, logits: Tensor) -> None:
        cross_entropy(logits, self.labels).backward()

    def input_gradients(self) -> dict[str, Tensor]:
        return {}

    def double(self) -> ClassifierWorkload:
        return ClassifierWorkload(self.images.double(), self.labels)

    def magnitudes(self) -> None:
        return None


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """In fp32 at least."""
    return F.cross_entropy(logits.float() if logits.element_size() < 4 else logits, labels)


@dataclass(frozen=True, eq=False)
class InferenceWorkload:
    """Forward alone, without a graph.

    Args:
        images: a batch.
    """

    images: Tensor

    def reset(self, model: nn.Module) -> None:
        pass

    @torch.inference_mode()
    def forward(self, model: nn.Module) -> Tensor:
        return model(self.images)

    def backward(self, model: nn.Module, output: Tensor) -> None:
        pass

    def input_gradients(self) -> dict[str, Tensor]:
        return {}

    def double(self) -> InferenceWorkload:
        return InferenceWorkload(self.images.double())

    def magnitudes(self) -> None:
        return None


def step(workload: Workload, model: nn.Module) -> Timed:
    """Time both passes separately; resetting the gradients is not timed."""

    def timed(watch: Watch) -> None:
        workload.reset(model)
        with watch(FORWARD):
            output = workload.forward(model)
        with watch(BACKWARD):
            workload.backward(model, output)

    return timed
