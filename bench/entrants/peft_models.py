"""PEFT's LoRA, HiRA and GLoRA, without dropout, with the factors of ours."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

import glora

from .copies import sharing

LORA_NAMES = {"Bd": "lora_B.default.weight", "Bu": "lora_A.default.weight"}
HIRA_NAMES = {"Ad": "hira_B.default", "Au": "hira_A.default"}
GLORA_NAMES = {
    "Ad": "glora_A.default.Xd",
    "Au": "glora_A.default.Xu",
    "Bd": "glora_B.default.Xd",
    "Bu": "glora_B.default.Xu",
    "Cd": "glora_C.default.Xd",
    "Cu": "glora_C.default.Xu",
    "D": "glora_D.default.X",
    "E": "glora_E.default.X",
}


def lora_model(backbone: nn.Module, ours: nn.Module) -> nn.Module:
    """PEFT's LoRA at alpha = rank."""
    import peft

    return _adapted(backbone, ours, lambda r, names: peft.LoraConfig(r=r, lora_alpha=r, target_modules=names))


def hira_model(backbone: nn.Module, ours: nn.Module) -> nn.Module:
    import peft

    return _adapted(backbone, ours, lambda r, names: peft.HiraConfig(r=r, target_modules=names))


def glora_model(backbone: nn.Module, ours: nn.Module) -> nn.Module:
    """PEFT's GLoRA with A, B and C of low rank, D and E vectors."""
    import peft

    kinds = {"config_A_B": "lora", "config_C": "lora", "config_D_E": "vector"}
    return _adapted(backbone, ours, lambda r, names: peft.GloraConfig(r=r, target_modules=names, **kinds))


def _adapted(backbone: nn.Module, ours: nn.Module, config: Callable) -> nn.Module:
    """The backbone adapted by PEFT at the layers of ``ours``, without the wrapper that PEFT puts around a model.

    The factors have the backbone's dtype. In fp32, PEFT's default, x would be cast, and every thin product (with HiRA
    a dense one too) would run in fp32.
    """
    import peft

    layers = glora.glora_layers(ours)
    rank = next(iter(layers.values())).rank
    model = peft.get_peft_model(sharing(backbone), config(rank, list(layers)), autocast_adapter_dtype=False)
    return model.get_base_model()


def copy_factors(ours: nn.Module, theirs: nn.Module, names: dict[str, str]) -> None:
    """Copy the parameters of ``ours`` into those of ``theirs`` that ``names`` lists for every layer."""
    with torch.no_grad():
        for layer in glora.glora_layers(ours):
            for own, other in names.items():
                theirs.get_parameter(f"{layer}.{other}").copy_(ours.get_parameter(f"{layer}.{own}"))
