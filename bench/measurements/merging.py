"""Merging: how long it takes, how far it is from the formula, and that it can be undone without a trace."""

from __future__ import annotations

import copy
import functools
from collections import OrderedDict

import torch
from torch import Tensor, nn

import glora
from glora import GLoRALinear, SearchSpace
from glora_kernels import glora_merge, reference

from ..agreement import Truth, require_agreement, results
from ..entrants.names import OURS
from ..oracle import oracle_model
from ..section import Comparison, Section, per_run
from ..settings import SEED, Settings
from ..shapes import Layer
from ..timing import interleave, plain
from ..workloads import InferenceWorkload, LayerWorkload
from .layer import NAME, make_layer, spread_paths

COPY, DENSE, MERGE = "copy of W0", "formula in plain PyTorch", "ours"
PROBE_TOKENS = 64


def measure(shape_set: str, layer: Layer, settings: Settings) -> Section:
    """Time merging one layer on random paths, copying its weight, and the plain formula."""
    field, workload = make_layer(layer, settings, (OURS,))
    model = field.models[OURS]
    ours = model.get_submodule(NAME)
    assert isinstance(ours, GLoRALinear)
    drawn = spread_paths(layer.rank, torch.Generator().manual_seed(SEED))
    for path in drawn:
        glora.set_paths(model, {NAME: path})
        try:
            field.errors[MERGE] = max(field.errors.get(MERGE, 0.0), hold_merged(model, workload, settings))
        except ValueError as error:
            field.refused[MERGE] = str(error)

    @torch.no_grad()
    def each(function) -> None:
        for path in drawn:
            function(ours.weight, ours.bias, ours.terms(path))

    functions = {
        COPY: plain(lambda: [ours.weight.detach().clone() for _ in drawn]),
        MERGE: plain(functools.partial(each, glora_merge)),
        DENSE: plain(functools.partial(each, reference.glora_merge)),
    }
    if MERGE in field.refused:
        del functions[MERGE]
    phases = interleave(functions, settings.rounds, watch=settings.watch())
    return Section(
        "merge",
        f"{shape_set} {layer.name}",
        f"merging {layer.inputs} -> {layer.outputs}, rank {layer.rank}, random paths",
        settings.layer_tolerance,
        field.errors,
        field.refused,
        field.missing,
        {phase: per_run(times, dict.fromkeys(times, len(drawn))) for phase, times in phases.items()},
        tuple(Comparison(MERGE, other) for other in (COPY, DENSE)),
    )


def hold_merged(model: nn.Module, workload: LayerWorkload, settings: Settings) -> float:
    """Check the merged layer against the numerical contract, and against the unmerged layer within both their errors.

    Raises:
        ValueError: an element is too far off.
    """
    tokens = InferenceWorkload(workload.x.detach()[:PROBE_TOKENS])
    merged = copy.deepcopy(model)
    glora.merge(merged)
    scale = results(InferenceWorkload(tokens.images.float().abs()), oracle_model(model, magnitudes=True))
    held = Truth(results(tokens.double(), oracle_model(model)), scale)
    unmerged = results(tokens, model)
    apart = {"output": unmerged["output"].double()}
    require_agreement("unmerged", unmerged, held, settings.layer_tolerance)
    got = results(tokens, merged)
    require_agreement("merged against unmerged", got, Truth(apart, scale), 2 * settings.layer_tolerance)
    return require_agreement("merged", got, held, settings.layer_tolerance)


def changed_bits(cycles: int, settings: Settings) -> int:
    """How many bytes of a small model differ after ``merge(keep=True)`` and ``unmerge``, so many times."""
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
