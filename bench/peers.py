"""The peers our speed is held against: the official formula, and PEFT's own packages.

Every entrant is made from one backbone, with the same base weights and the same factors, so that
each can be checked before it is timed.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import glora
from glora import GLoRALinear, PathConfig
from glora.modules import replace_modules
from glora_kernels import Constant, LowRank, Vector
from glora_kernels.terms import Term

from .agreement import Task, reference_results, require_agreement, results

OURS = "ours, random paths"
OFFICIAL = "official, random paths"
LORA = "PEFT LoRA"
GLORA = "PEFT GLoRA, all low rank"
FROZEN = "frozen"
ADAPTER_STD = 0.02  # of every factor: not zero, for zeros run faster
PEFT_NAMES = {
    LORA: {"Bd": "lora_B.default.weight", "Bu": "lora_A.default.weight"},
    GLORA: {
        "Ad": "glora_A.default.Xd",
        "Au": "glora_A.default.Xu",
        "Bd": "glora_B.default.Xd",
        "Bu": "glora_B.default.Xu",
        "Cd": "glora_C.default.Xd",
        "Cu": "glora_C.default.Xu",
        "D": "glora_D.default.X",
        "E": "glora_E.default.X",
    },
}
Entrants = dict[str, nn.Module]


def all_low_rank(rank: int) -> PathConfig:
    """The path on which ours computes what PEFT GLoRA does."""
    return PathConfig(f"lora_{rank}", f"lora_{rank}", f"lora_{rank}", "vector", "vector")


def lora(rank: int) -> PathConfig:
    """The path on which ours computes what PEFT LoRA does, at alpha = rank."""
    return PathConfig(B=f"lora_{rank}")


class OfficialLinear(GLoRALinear):
    """What the official code computes (Arnav0400/ViT-Slim, GLoRA/layer.py), step by step, any path.

    As there, a kind *none* is a tensor of zeros that takes part in the arithmetic, W_eff is an
    ordinary intermediate, and autograd differentiates it all. Unlike there, the path is drawn outside
    of forward. The lines are written anew.
    """

    def forward(self, x: Tensor) -> Tensor:
        terms, (rows, columns) = self.terms(), self.weight.shape
        w_eff = self.weight + self.weight * _matrix(terms.A, rows, columns) + _matrix(terms.B, rows, columns)
        b_eff = _row_values(terms.E)
        if self.bias is not None:
            b_eff = self.bias + self.bias * _row_values(terms.D) + b_eff
        prompt = torch.matmul(self.weight, _matrix(terms.C, columns, 1)).squeeze()
        return F.linear(x, w_eff, b_eff + prompt)


def _matrix(term: Term | None, rows: int, columns: int) -> Tensor:
    """Of a shape that broadcasts to ``(rows, columns)``."""
    if term is None:
        return torch.zeros(rows, columns)
    if isinstance(term, LowRank):
        return torch.matmul(*term.factors)
    return term.entries[:, None] if isinstance(term, Vector) else term.entry


def _row_values(term: Vector | Constant | None) -> Tensor:
    """Of a shape that broadcasts to ``(rows,)``."""
    if term is None:
        return torch.zeros(1)
    return term.entries if isinstance(term, Vector) else term.entry


def make_entrants(backbone: nn.Module, names: Iterable[str], rank: int) -> Entrants:
    """Ours and every peer, adapted at exactly ``names`` and frozen everywhere else."""
    names = tuple(names)
    ours = _our_model(backbone, names, rank)
    return {
        FROZEN: _frozen_model(backbone, names[0]),
        LORA: _peft_model(backbone, ours, LORA),
        OURS: ours,
        OFFICIAL: _official_model(backbone, ours),
        GLORA: _peft_model(backbone, ours, GLORA),
    }


def _our_model(backbone: nn.Module, names: tuple[str, ...], rank: int) -> nn.Module:
    model = glora.inject(copy.deepcopy(backbone), rank, targets=names, exclude=())
    with torch.no_grad():
        for parameter in glora.trainable_parameters(model):
            parameter.normal_(std=ADAPTER_STD)
    return model


def _official_model(backbone: nn.Module, ours: nn.Module) -> nn.Module:
    model = copy.deepcopy(backbone).requires_grad_(False)
    replacements: dict[nn.Module, nn.Module] = {}
    for name, layer in glora.glora_layers(ours).items():
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        replacements[linear] = OfficialLinear.from_linear(linear, layer.rank)
    replace_modules(model, replacements)
    model.load_state_dict(ours.state_dict())
    return model


def _peft_model(backbone: nn.Module, ours: nn.Module, peer: str) -> nn.Module:
    """LoRA without dropout and at alpha = rank, or GLoRA; without the wrapper that PEFT puts around a model."""
    import peft

    layers = glora.glora_layers(ours)
    rank = next(iter(layers.values())).rank
    config: peft.PeftConfig
    if peer == LORA:
        config = peft.LoraConfig(r=rank, lora_alpha=rank, lora_dropout=0.0, target_modules=list(layers))
    else:
        config = peft.GloraConfig(
            r=rank, config_A_B="lora", config_C="lora", config_D_E="vector", target_modules=list(layers)
        )
    model = peft.get_peft_model(copy.deepcopy(backbone), config).get_base_model()
    with torch.no_grad():
        for own, theirs in _peft_names(ours, peer).items():
            model.get_parameter(theirs).copy_(ours.get_parameter(own))
    return model


def _peft_names(ours: nn.Module, peer: str) -> dict[str, str]:
    """What each parameter of ours is called in PEFT's model."""
    layers = glora.glora_layers(ours)
    return {f"{layer}.{own}": f"{layer}.{theirs}" for layer in layers for own, theirs in PEFT_NAMES[peer].items()}


def _frozen_model(backbone: nn.Module, first: str) -> nn.Module:
    """All frozen, and yet its backward pass goes back to the output of the layer ``first``.

    There it ends in an adapted model too, whose first adapted layer has no input to differentiate by.
    """
    model = copy.deepcopy(backbone).requires_grad_(False)
    model.get_submodule(first).register_forward_hook(lambda _module, _inputs, y: y.requires_grad_())
    return model


def set_paths(entrants: Entrants, paths: glora.paths.Paths) -> None:
    """The same paths for ours and for the official formula."""
    glora.set_paths(entrants[OURS], paths)
    glora.set_paths(entrants[OFFICIAL], paths)


def check_entrants(entrants: Entrants, task: Task, path_sets: Iterable[glora.paths.Paths], tolerance: float) -> float:
    """Hold every entrant's output and gradients against the fp64 reference.

    Args:
        path_sets: paths on which to check ours and the official formula.
        tolerance: the largest relative error allowed, in the 2-norm, for each tensor.

    Returns:
        The largest relative error.

    Raises:
        ValueError: one is wrong.
    """
    ours, errors = entrants[OURS], []
    for paths in path_sets:
        set_paths(entrants, paths)
        want = reference_results(task, ours)
        errors += [require_agreement(who, results(task, entrants[who]), want, tolerance) for who in (OURS, OFFICIAL)]
    layers = glora.glora_layers(ours)
    rank = next(iter(layers.values())).rank
    for peer, path in ((LORA, lora(rank)), (GLORA, all_low_rank(rank))):
        glora.set_paths(ours, dict.fromkeys(layers, path))
        want, got = reference_results(task, ours), results(task, entrants[peer])
        errors.append(require_agreement(peer, got, want, tolerance, _peft_names(ours, peer)))
    want = reference_results(task, entrants[FROZEN])
    errors.append(require_agreement(FROZEN, results(task, entrants[FROZEN]), want, tolerance))
    return max(errors)
