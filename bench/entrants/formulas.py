"""Layers that compute what others do, on any path: the official formula, and W_eff assembled in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import glora
from glora import GLoRALinear
from glora.models.modules import replace_modules
from glora_kernels import LowRank, Vector, reference
from glora_kernels.terms import Constant, Term

from .copies import sharing


class OfficialLinear(GLoRALinear):
    """The computation of the official code (Arnav0400/ViT-Slim, GLoRA/layer.py), step by step, for any path.

    As in the official code, a kind *none* is a tensor of zeros that takes part in the arithmetic, W_eff
    is an ordinary intermediate, and autograd differentiates everything. Unlike there, the path is drawn
    outside of forward. No line is copied.
    """

    def forward(self, x: Tensor) -> Tensor:
        terms, weight = self.terms().map(lambda storage: storage.to(self.weight.dtype)), self.weight
        w_eff = weight + weight * _matrix(terms.A, weight) + _matrix(terms.B, weight)
        b_eff = _row_values(terms.E, weight)
        if self.bias is not None:
            b_eff = self.bias + self.bias * _row_values(terms.D, weight) + b_eff
        prompt = torch.matmul(weight, _matrix(terms.C, weight.T[:, :1])).squeeze()
        return F.linear(x, w_eff, b_eff + prompt)


def _matrix(term: Term | None, like: Tensor) -> Tensor:
    """The term as a tensor that broadcasts to the shape of ``like``."""
    if term is None:
        return torch.zeros_like(like)
    if isinstance(term, LowRank):
        return torch.matmul(*term.factors)
    return term.entries[:, None] if isinstance(term, Vector) else term.entry


def _row_values(term: Vector | Constant | None, like: Tensor) -> Tensor:
    """The term as a tensor that broadcasts to ``(rows,)``."""
    if term is None:
        return like.new_zeros(1)
    return term.entries if isinstance(term, Vector) else term.entry


class AssembledLinear(GLoRALinear):
    """Forms W_eff and b_eff from the terms that are not none, then calls ``F.linear``; autograd does the rest."""

    def forward(self, x: Tensor) -> Tensor:
        return reference.glora_linear(x, self.weight, self.bias, self.terms())


def with_layers(backbone: nn.Module, ours: nn.Module, kind: type[GLoRALinear]) -> nn.Module:
    """A model like ``ours`` with layers of another kind in place of its own, and the same values."""
    model = sharing(backbone).requires_grad_(False)
    replacements: dict[nn.Module, nn.Module] = {}
    for name, layer in glora.glora_layers(ours).items():
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        replacements[linear] = kind.from_linear(linear, layer.rank, layer.product)
    replace_modules(model, replacements)
    model.load_state_dict(ours.state_dict())
    return model
