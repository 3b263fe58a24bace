"""Merging: how long it takes, how far it is from the formula, and that it can be undone without a trace."""

from __future__ import annotations

import functools
from collections import OrderedDict

import torch
from torch import Tensor, nn

import glora
from glora import GLoRALinear, PathConfig, SearchSpace
from glora_kernels import glora_merge, reference
from glora_kernels.contract import PROMISED, largest_constant

from ..entrants import OURS
from ..section import Section
from ..settings import SEED, Settings
from ..shapes import Layer
from ..timing import interleave, plain
from .layer import NAME, make_layer, spread_paths

COPY, DENSE, MERGE = "copy of W0", "formula in plain PyTorch", "ours"
PROBE_TOKENS = 64


def measure(shape_set: str, layer: Layer, settings: Settings) -> Section:
    """The time of merging one layer on random paths, beside that of copying its weight and of the plain formula."""
    field, _ = make_layer(layer, settings)
    ours = field.models[OURS].get_submodule(NAME)
    assert isinstance(ours, GLoRALinear)
    drawn = spread_paths(layer.rank, torch.Generator().manual_seed(SEED))
    constants = [worst_constant(ours, path) for path in drawn]

    @torch.no_grad()
    def each(function) -> None:
        for path in drawn:
            function(ours.weight, ours.bias, ours.terms(path))

    functions = {
        COPY: plain(lambda: [ours.weight.detach().clone() for _ in drawn]),
        MERGE: plain(functools.partial(each, glora_merge)),
        DENSE: plain(functools.partial(each, reference.glora_merge)),
    }
    phases = interleave(functions, settings.rounds, watch=settings.watch())
    per_merge = {name: [one / len(drawn) for one in times] for name, times in phases["whole"].items()}
    return Section(
        "merge",
        f"{shape_set} {layer.name}",
        f"merging {layer.inputs} -> {layer.outputs}, rank {layer.rank}, random paths",
        PROMISED[settings.dtype],
        {MERGE: max(constants)},
        phases={"whole": per_merge},
        comparisons=(),
    )


@torch.no_grad()
def worst_constant(layer: GLoRALinear, path: PathConfig) -> float:
    """The largest ``|err| / (u S)`` of the merged layer on random tokens, see ``glora_kernels.contract``."""
    x = torch.randn(PROBE_TOKENS, layer.in_features, generator=torch.Generator().manual_seed(SEED)).to(layer.weight)
    got = layer.merge(path)(x)
    want, scale = (_formula(layer, path, x, change) for change in (lambda t: t, torch.abs))
    return largest_constant(got, want, scale, x.dtype)


def _formula(layer: GLoRALinear, path: PathConfig, x: Tensor, change) -> Tensor:
    wide = lambda tensor: None if tensor is None else change(tensor.double())  # noqa: E731
    return reference.glora_linear(wide(x), wide(layer.weight), wide(layer.bias), layer.terms(path).map(wide))


def changed_bits(cycles: int, settings: Settings) -> int:
    """How many bytes of a small model differ after so many times ``merge(keep=True)`` and ``unmerge``."""
    torch.manual_seed(SEED)
    layers = OrderedDict(one=nn.Linear(24, 40), act=nn.GELU(), two=nn.Linear(40, 24, bias=False))
    model = glora.inject(nn.Sequential(layers).to(settings.device, settings.dtype), rank=4)
    with torch.no_grad():
        for parameter in glora.trainable_parameters(model):
            parameter.normal_(std=0.3)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    generator = torch.Generator().manual_seed(SEED)
    for _ in range(cycles):
        glora.set_paths(model, glora.sample_paths(model, SearchSpace((4,)), generator))
        report = glora.merge(model, keep=True)
        if glora.glora_layers(model):
            raise ValueError("merge: expected a plain model, got adapted layers")
        glora.unmerge(model, report)
    return sum(int((_bytes(model.state_dict()[name]) != _bytes(tensor)).sum()) for name, tensor in before.items())


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)
