"""LyCORIS' glora (package lycoris-lora) at alpha = rank, with the factors of ours."""

from __future__ import annotations

from torch import nn

import glora

from .copies import sharing

NAMES = {"Ad": "lycoris.a1.weight", "Au": "lycoris.a2.weight", "Bd": "lycoris.b1.weight", "Bu": "lycoris.b2.weight"}


def lycoris_model(backbone: nn.Module, ours: nn.Module) -> nn.Module:
    """LyCORIS with its defaults: forms the dense change of the weight, and multiplies by it in a second product."""
    return _adapted(backbone, ours, bypass=False)


def bypass_model(backbone: nn.Module, ours: nn.Module) -> nn.Module:
    """LyCORIS in ``bypass_mode``: thin products beside the frozen layer."""
    return _adapted(backbone, ours, bypass=True)


def _adapted(backbone: nn.Module, ours: nn.Module, bypass: bool) -> nn.Module:
    from lycoris.modules.glora import GLoRAModule

    model = sharing(backbone).requires_grad_(False)
    for name, layer in glora.glora_layers(ours).items():
        linear = model.get_submodule(name)
        adapter = GLoRAModule(name, linear, 1.0, layer.rank, layer.rank, bypass_mode=bypass)
        adapter.apply_to()
        linear.lycoris = adapter.to(layer.weight)
    return model
