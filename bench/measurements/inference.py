"""Images per second of the original model, the merged one and each unmerged peer (the paper's Table 3)."""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass

import torch
from torch import nn

import glora
from glora import SearchSpace
from glora.paths import Paths

from .. import counting
from ..agreement import require_agreement, results, truth
from ..entrants import Field
from ..entrants.names import ASSEMBLED, GLORA, HIRA, LORA, LYCORIS_BYPASS, OFFICIAL, OURS
from ..section import RELATIVE, Comparison, Section
from ..settings import SEED, Settings
from ..shapes import Model
from ..timing import interleave, plain
from ..workloads import InferenceWorkload
from .model import make_backbone, make_model

BATCHES = (1, 4, 16)
ORIGINAL, CONTROL, MERGED = "original", "original, a second copy", "merged"
UNMERGED = (OURS, ASSEMBLED, OFFICIAL, LORA, HIRA, GLORA, LYCORIS_BYPASS)
ENTRIES = (ORIGINAL, MERGED, *UNMERGED)
COMPARISONS = tuple(Comparison(name, ORIGINAL) for name in (MERGED, *UNMERGED))
LATENCY = (CONTROL, ORIGINAL, MERGED)
LATENCY_COMPARISONS = tuple(Comparison(name, ORIGINAL) for name in (MERGED, CONTROL))
MORE_ROUNDS = 3  # times as many for these three, whose ratios have to be told from 1


@dataclass(frozen=True, eq=False)
class Prepared:
    """Models by entrant, ready to be timed, and the field in which they were checked."""

    models: dict[str, nn.Module]
    field: Field
    image_size: tuple[int, ...]


def make(model: Model, settings: Settings) -> Prepared:
    """Every entrant in eval mode, checked; ours on random paths, merged and not merged."""
    field, workload, ours, paths = checked(model, settings)
    if settings.dtype != torch.float32:
        field.refuse(checked(model, settings.in_fp32())[0].refused)
    original = make_backbone(model, settings).eval().requires_grad_(False)
    models: dict[str, nn.Module] = {ORIGINAL: original, CONTROL: copy.deepcopy(original)}
    glora.set_paths(ours, paths)
    models[MERGED] = merged = copy.deepcopy(ours)
    glora.merge(merged)
    allowed = settings.inference_tolerance
    field.errors[MERGED] = require_agreement(MERGED, results(workload, merged), truth(workload, ours), allowed)
    models |= {name: field.models[name] for name in UNMERGED if name in field.models}
    return Prepared(models, field, tuple(workload.images.shape[1:]))


def checked(model: Model, settings: Settings) -> tuple[Field, InferenceWorkload, nn.Module, Paths]:
    """Every entrant in eval mode, the workload of the check, our model (refused or not), and its paths in the check."""
    field, trained = make_model(model, settings)
    workload = InferenceWorkload(trained.images[:1])
    for one in field.models.values():
        one.eval().requires_grad_(False)
    space, generator = SearchSpace((model.rank,)), torch.Generator().manual_seed(SEED)
    ours = field.models[OURS]
    paths = glora.sample_paths(ours, space, generator)
    field.check(workload, [paths], settings.inference_tolerance)
    return field, workload, ours, paths


def measure(shape_set: str, model: Model, batch: int, settings: Settings, prepared: Prepared) -> Section:
    """Time every entrant."""
    models, field = prepared.models, prepared.field
    workload = InferenceWorkload(settings.randn(batch, *prepared.image_size))
    runs = {name: functools.partial(workload.forward, models[name]) for name in ENTRIES if name in models}
    phases = interleave({name: plain(run) for name, run in runs.items()}, settings.rounds, watch=settings.watch())
    facts: dict[str, dict[str, float]] = {}
    for name, run in runs.items():
        facts[name] = {"parameters": sum(p.numel() for p in models[name].parameters())}
        if settings.device == "cpu" or name in (ORIGINAL, MERGED):  # the counter does not see into kernels of Triton's
            facts[name]["flops"] = counting.flops(run)
    return Section(
        "inference",
        f"{shape_set} batch {batch}",
        f"inference with {model.name}, batch {batch}",
        settings.inference_tolerance,
        field.errors,
        field.refused,
        field.missing,
        phases,
        COMPARISONS,
        facts,
        {"images": batch},
        unit=RELATIVE,
    )


def measure_latency(shape_set: str, model: Model, batch: int, settings: Settings, prepared: Prepared) -> Section:
    """Time original, merged and a second copy of the original, which shows how much two equal models differ."""
    workload = InferenceWorkload(settings.randn(batch, *prepared.image_size))
    functions = {name: plain(functools.partial(workload.forward, prepared.models[name])) for name in LATENCY}
    return Section(
        "latency",
        f"{shape_set} batch {batch}",
        f"merged and original {model.name}, batch {batch}",
        settings.inference_tolerance,
        {MERGED: prepared.field.errors[MERGED]},
        phases=interleave(functions, MORE_ROUNDS * settings.rounds, watch=settings.watch()),
        comparisons=LATENCY_COMPARISONS,
        units={"images": batch},
        unit=RELATIVE,
    )


def architecture(model: nn.Module) -> list[tuple]:
    """Every module with its type and settings, and every parameter and buffer with its shape and type, by name."""
    modules = [(name, type(module), module.extra_repr()) for name, module in model.named_modules()]
    tensors = [(name, tensor.shape, tensor.dtype) for name, tensor in model.state_dict().items()]
    return [*modules, *tensors]
