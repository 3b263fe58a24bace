"""The linear layers of timm's models that adapters take, and how many tokens each is called with."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..planning.cases import Layer


def calls_of(name: str, batch: int) -> dict[tuple[Layer, int], int]:
    """How often a model calls linear layers of each kind, by layer and number of tokens; it takes no memory.

    The layers are those that ``glora.inject`` adapts, every ``nn.Linear`` outside of the heads, as far as they are
    called: some models read the weight of a layer and never call it.

    Raises:
        ValueError: timm has no such model, it cannot be run without memory, or it has no such layer.
    """
    import timm

    if not timm.is_model(name):
        raise ValueError(f"model: expected the name of one of timm's models, got {name!r}")
    with torch.device("meta"):
        model = timm.create_model(name).eval()
    found: dict[tuple[Layer, int], int] = {}

    def note(linear: nn.Linear, inputs: tuple[torch.Tensor, ...]) -> None:
        layer = Layer(linear.out_features, linear.in_features, linear.bias is not None)
        call = layer, inputs[0].numel() // linear.in_features
        found[call] = found.get(call, 0) + 1

    heads = _heads(model)
    for part in model.modules():
        if type(part) is nn.Linear and part not in heads:
            part.register_forward_pre_hook(note)
    images = torch.empty(batch, *model.pretrained_cfg["input_size"], device="meta")
    try:
        with torch.no_grad():
            model(images)
    except (RuntimeError, NotImplementedError) as error:
        raise ValueError(f"model: {name} cannot be run without memory ({error}); name shapes instead") from error
    if not found:
        raise ValueError(f"model: expected linear layers outside of the heads, {name} has none")
    return found


def _heads(model: Any) -> set[nn.Module]:
    """All modules of the children that classify: ``head``, in models with two heads ``head_dist`` too, and the like."""
    classifiers = model.get_classifier()
    several = classifiers if isinstance(classifiers, (tuple, list)) else [classifiers]
    outer = [set(child.modules()) for child in model.children()]
    return set().union(*(parts for parts in outer if any(classifier in parts for classifier in several)))
