"""What a graphed step refuses, before anything is run."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn
from torch.optim import Optimizer

from ..arguments import listed
from ..distributed import averages_itself
from ..layers.base import GLoRALayer
from ..models.wrappers import is_compiled
from ..processes import world_size


def check_model(model: nn.Module, layers: Mapping[str, GLoRALayer]) -> None:
    """Raise ValueError for a model that cannot be graphed."""
    if world_size() > 1 or averages_itself(model):
        raise ValueError("model: expected one process and a model without wrappers, got several processes or a wrapper")
    if is_compiled(model):
        raise ValueError("model: expected one that is not compiled, got torch.compile around it or a part of it")
    patched = [name for name, layer in layers.items() if "forward" in vars(layer)]
    if patched:
        raise ValueError(
            f"model: expected layers that run the forward of their class, got another put on {listed(patched)}"
        )
    quantised = [name for name, layer in layers.items() if not layer.merges_exactly]
    if quantised:
        raise ValueError(
            f"model: expected no quantised base, whose weight is decoded block by block, got {listed(quantised)}"
        )


def check_optimizer(model: nn.Module, optimizer: Optimizer, whole: bool) -> None:
    """Raise ValueError for an optimiser that does not hold the model's parameters, or cannot be captured."""
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    missing = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in held]
    if missing:
        raise ValueError(f"optimizer: expected every parameter of the model that requires grad, it lacks {missing}")
    on_gpu = any(parameter.is_cuda for group in optimizer.param_groups for parameter in group["params"])
    if whole and on_gpu and any(group.get("capturable") is False for group in optimizer.param_groups):
        raise ValueError(
            f"optimizer: expected {type(optimizer).__name__}(..., capturable=True), whose step counts are on the GPU, "
            "for a step in a CUDA graph; got capturable=False"
        )


def check_amp(amp: str | None) -> torch.dtype | None:
    """The dtype of autocast. Raises ValueError for float16, whose loss scaling reads values on the host."""
    if amp not in (None, "bfloat16"):
        raise ValueError(f"amp: expected 'bfloat16' or None, got {amp!r}")
    return None if amp is None else torch.bfloat16
