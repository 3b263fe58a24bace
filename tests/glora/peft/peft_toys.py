"""Small models that PEFT has adapted, with random adapters."""

from __future__ import annotations

import itertools

import peft
import torch
from torch import Tensor, nn

from tests.glora.toys import IN_FEATURES, generator, mlp, seeded

# Every (config_A_B, config_C, config_D_E) that PEFT's GLoRA has.
KINDS = list(
    itertools.product(
        ("lora", "vector", "constant", "none"), ("lora", "vector", "none"), ("vector", "constant", "none")
    )
)
TARGETS = ["fc1", "fc2"]


def glora_config(kinds: tuple[str, str, str] = ("lora", "lora", "vector"), **options) -> peft.GloraConfig:
    options = {"r": 2, "target_modules": TARGETS, **options}
    return peft.GloraConfig(**dict(zip(("config_A_B", "config_C", "config_D_E"), kinds)), **options)


def hira_config(**options) -> peft.HiraConfig:
    return peft.HiraConfig(**{"r": 2, "target_modules": TARGETS, **options})


def adapted(config: peft.PeftConfig, model: nn.Module | None = None) -> peft.PeftModel:
    """PEFT's model of :func:`mlp` (or ``model``), every adapter tensor random."""
    with seeded():
        made = peft.get_peft_model(mlp() if model is None else model, config)
    randomize_adapters(made)
    return made


def randomize_adapters(model: nn.Module, seed: int = 0) -> None:
    """Of every adapter, active or not."""
    gen = generator(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part.startswith(("glora_", "hira_")) for part in name.split(".")):
                parameter.copy_(torch.randn(parameter.shape, generator=gen) * 0.3)


def tokens(count: int = 7) -> Tensor:
    return torch.randn(count, IN_FEATURES, generator=generator(1))
