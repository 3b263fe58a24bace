"""Other methods of fine-tuning, each from its own paper's equation in plain PyTorch; where GLoRA's tensors hold it."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from glora import GLoRALinear

Tensors = dict[str, Tensor]


class Method(NamedTuple):
    """One layer of a method.

    Attributes:
        shapes: ``(N, K, r)`` to the shape of each of its parameters, by the name its paper uses.
        output: ``(x, W0, b0, parameters)`` to y; b0 may be None.
        support: ``(parameters, b0)`` to what GLoRA's tensors read, if they hold that method.
    """

    shapes: Callable[[int, int, int], dict[str, tuple[int, ...]]]
    output: Callable[[Tensor, Tensor, Tensor | None, Tensors], Tensor]
    support: Callable[[Tensors, Tensor | None], Tensors]


def _repadapter(x: Tensor, W: Tensor, b: Tensor | None, p: Tensors) -> Tensor:
    adapted = x + F.linear(F.linear(x, p["Wd"], p["bd"]), p["Wu"], p["bu"])
    return F.linear(adapted, W, b)


METHODS = {
    "lora": Method(
        lambda N, K, r: {"A": (r, K), "B": (N, r)},
        lambda x, W, b, p: F.linear(x, W, b) + x @ p["A"].T @ p["B"].T,
        lambda p, b: {"Bd": p["B"], "Bu": p["A"]},
    ),
    "hira": Method(
        lambda N, K, r: {"A": (r, K), "B": (N, r)},
        lambda x, W, b, p: F.linear(x, W + W * (p["B"] @ p["A"]), b),
        lambda p, b: {"Ad": p["B"], "Au": p["A"]},
    ),
    "bitfit": Method(
        lambda N, K, r: {"b": (N,)}, lambda x, W, b, p: F.linear(x, W, p["b"]), lambda p, b: {"E": p["b"] - b}
    ),
    "ssf": Method(
        lambda N, K, r: {"scale": (N,), "shift": (N,)},
        lambda x, W, b, p: F.linear(x, W, b) * p["scale"] + p["shift"],
        lambda p, b: {"Ad": p["scale"] - 1, "D": p["scale"] - 1, "E": p["shift"]},
    ),
    "prompt": Method(
        lambda N, K, r: {"prompt": (K,)},
        lambda x, W, b, p: F.linear(x + p["prompt"], W, b),
        lambda p, b: {"Cd": p["prompt"]},
    ),
    "ia3": Method(
        lambda N, K, r: {"l": (N,)},
        lambda x, W, b, p: F.linear(x, W, b) * p["l"],
        lambda p, b: {"Ad": p["l"] - 1, "D": p["l"] - 1},
    ),
    "ia3-input": Method(
        lambda N, K, r: {"l": (K,)}, lambda x, W, b, p: F.linear(x * p["l"], W, b), lambda p, b: {"Ad": p["l"] - 1}
    ),
    "repadapter": Method(
        lambda N, K, r: {"Wd": (r, K), "bd": (r,), "Wu": (K, r), "bu": (K,)},
        _repadapter,
        lambda p, b: {"Ad": p["Wu"], "Au": p["Wd"], "Cd": p["Wu"] @ p["bd"] + p["bu"]},
    ),
    "linear-probe": Method(lambda N, K, r: {}, lambda x, W, b, p: F.linear(x, W, b), lambda p, b: {}),
}


def stored(layer: GLoRALinear, values: Tensors) -> Tensors:
    """Storages of ``layer`` that hold ``values`` in what is read, differentiably, and NaN in all else."""
    storages = {name: torch.full_like(p, torch.nan) for name, p in layer.named_parameters() if p.requires_grad}
    for name, value in values.items():
        block = value if name in "DE" else value.reshape(len(value), -1)
        lacking = [end - have for end, have in zip(storages[name].shape, block.shape)]
        padding = [amount for lack in reversed(lacking) for amount in (0, lack)]
        storages[name] = F.pad(block, padding, value=torch.nan)
    return storages


class Independent(nn.Module):
    """One layer of a method as its authors would write it, around frozen ``linear``."""

    def __init__(self, method: str, linear: nn.Linear, parameters: Tensors):
        super().__init__()
        self.method = METHODS[method]
        self.linear = linear.requires_grad_(False)
        self.trained = nn.ParameterDict({name: nn.Parameter(p.detach().clone()) for name, p in parameters.items()})

    def forward(self, x: Tensor) -> Tensor:
        return self.method.output(x, self.linear.weight, self.linear.bias, dict(self.trained.items()))
