"""The truth that everything is compared with before it is timed: the formula in fp64, from stored tensors and path.

It shares no line with what it checks: neither ``glora_kernels`` nor the layer's own reading of its path.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import glora
from glora import GLoRALinear
from glora.models.modules import replace_modules


class OracleLinear(nn.Module):
    """``y = (W0 + W0*A + B) x + W0 c + D*b0 + E + b0`` with dense A and B; ``W0 @ A`` for the matmul product.

    Holds copies of a layer's parameters under their names.
    """

    def __init__(self, layer: GLoRALinear):
        super().__init__()
        for name, parameter in layer.named_parameters():
            self.register_parameter(name, nn.Parameter(parameter.detach().clone(), parameter.requires_grad))
        self.path, self.product, self.has_bias = layer.path.to_dict(), layer.product, layer.bias is not None

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        if self.product == "hadamard":
            change = weight * self.matrix("A", torch.ones_like(weight))
        else:
            eye = torch.eye(weight.shape[1], device=weight.device, dtype=weight.dtype)
            full = self.path["A"].startswith("lora")
            change = weight @ (self.matrix("A", eye) if full else self.matrix("A", torch.ones_like(eye)) * eye)
        bias = self.row("E") + (weight @ self.matrix("C", torch.ones_like(weight[0])[:, None]))[:, 0]
        if self.has_bias:
            bias = bias + self.bias + self.bias * self.row("D")
        return F.linear(x, weight + change + self.matrix("B", torch.ones_like(weight)), bias)

    def matrix(self, slot: str, ones: Tensor) -> Tensor:
        """A, B or C, as large as ``ones``."""
        kind, down, up = self.path[slot], self.get_parameter(f"{slot}d"), self.get_parameter(f"{slot}u")
        if kind.startswith("lora"):
            rank = int(kind.split("_")[1])
            return down[:, :rank] @ up[:rank]
        values = {"vector": lambda: down[:, :1], "constant": lambda: down[0, 0], "none": lambda: 0.0}[kind]()
        return ones * values

    def row(self, slot: str) -> Tensor:
        """D or E, one value per row."""
        values, ones = self.get_parameter(slot), torch.ones_like(self.weight[:, 0])
        return {"vector": lambda: values, "constant": lambda: ones * values[0], "none": lambda: ones * 0.0}[
            self.path[slot]
        ]()


def oracle_model(model: nn.Module, magnitudes: bool = False) -> nn.Module:
    """A copy of ``model`` in fp64 that shares nothing with it, with the formula in place of its adapted layers.

    Args:
        magnitudes: take the absolute value of every parameter, in fp32: for the S of the numerical contract.
    """
    oracle = copy.deepcopy(model).to(torch.float32 if magnitudes else torch.float64)
    layers = glora.glora_layers(oracle).values()
    replacements: dict[nn.Module, nn.Module] = {layer: OracleLinear(layer) for layer in layers}
    replace_modules(oracle, replacements)
    if magnitudes:
        with torch.no_grad():
            for parameter in oracle.parameters():
                parameter.abs_()
    return oracle
