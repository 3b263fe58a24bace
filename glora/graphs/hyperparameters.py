"""The hyperparameters of an optimiser whose step is in a graph: what may change, and what would be overlooked."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class Hyperparameters:
    """Keeps the learning rates in tensors that a graph reads; at every call, numbers in ``param_groups`` set them.

    So any scheduler works: one that writes into a tensor, and one that puts a number in its place. An optimiser that
    reads a learning rate on the host (neither ``capturable`` nor ``fused``) keeps its numbers; these may not change
    then. No other hyperparameter may change either.
    """

    def __init__(self, optimizer: Optimizer, device: torch.device):
        self._groups = optimizer.param_groups
        self._rates = [torch.tensor(float(g["lr"]), device=device) if _reads_tensor(g) else None for g in self._groups]
        for group, rate in zip(self._groups, self._rates):
            if rate is not None:
                group["lr"] = rate
        self._fixed = [self._numbers(group, rate) for group, rate in zip(self._groups, self._rates)]

    def update(self) -> None:
        """Take over changed learning rates.

        Raises:
            ValueError: another hyperparameter than a learning rate has changed, or one that is a number in the graph.
        """
        for group, rate, fixed in zip(self._groups, self._rates, self._fixed):
            changed = {key: value for key, value in self._numbers(group, rate).items() if value != fixed[key]}
            if changed:
                was = {key: fixed[key] for key in changed}
                raise ValueError(
                    f"optimizer: expected {was} as when the step was captured, got {changed}; of an optimiser with "
                    "capturable=True or fused=True the learning rate may change, and nothing else"
                )
            if rate is not None and group["lr"] is not rate:
                rate.copy_(group["lr"]) if isinstance(group["lr"], Tensor) else rate.fill_(group["lr"])

    @staticmethod
    def _numbers(group: dict[str, Any], rate: Tensor | None) -> dict[str, Any]:
        left_out = {"params"} if rate is None else {"params", "lr"}
        return {key: v for key, v in group.items() if key not in left_out and isinstance(v, (int, float, tuple))}


def _reads_tensor(group: dict[str, Any]) -> bool:
    return bool(group.get("capturable") or group.get("fused"))
