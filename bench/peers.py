"""The peers our speed is held against: the official formula, and PEFT's own packages."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from glora_kernels import Terms, reference


class OfficialLinear(nn.Module):
    """What the official code computes (Arnav0400/ViT-Slim, GLoRA): dense A and B, autograd, any path.

    As there, a kind *none* is a dense tensor of zeros, and W_eff is an ordinary intermediate that
    autograd keeps; the arithmetic is written anew, through the reference formula's steps.
    """

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer  # a GLoRALinear: the same parameters, the same path

    def forward(self, x: Tensor) -> Tensor:
        weight, bias, terms = self.layer.weight, self.layer.bias, self.layer.terms()
        rows, columns = weight.shape
        a = weight.new_zeros(rows, columns) if terms.A is None else reference.dense(terms.A, rows, columns)
        b = weight.new_zeros(rows, columns) if terms.B is None else reference.dense(terms.B, rows, columns)
        w_eff = weight + weight * a + b
        return F.linear(x, w_eff, reference.effective_bias(weight, bias, Terms(C=terms.C, D=terms.D, E=terms.E)))


def peft_model(model: nn.Module, method: str, rank: int, targets: list[str]) -> nn.Module:
    """``model`` with PEFT's ``lora`` or ``glora`` (all low rank) on the linears named in ``targets``."""
    import peft

    if method == "lora":
        config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=targets, lora_dropout=0.0)
    else:
        config = peft.GloraConfig(
            r=rank, config_A_B="lora", config_C="lora", config_D_E="vector", target_modules=targets
        )
    adapted = peft.get_peft_model(model, config)
    with torch.no_grad():  # off the zero initialisation: zeros run faster
        for _name, parameter in adapted.named_parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.01)
    return adapted
