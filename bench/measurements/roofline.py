"""How close each operation comes to this machine's measured ceilings, in operations and bytes per second."""

from __future__ import annotations

import functools
import math
import statistics

import torch
from torch import Tensor

from glora import GLoRALinear, PathConfig
from glora_kernels import explain, glora_merge

from ..entrants.names import OURS, lora
from ..section import Section
from ..settings import Settings
from ..shapes import Layer
from ..timing import WHOLE, Times, interleave, plain
from ..workloads import BACKWARD, FORWARD, LayerWorkload, step
from .layer import NAME, make_layer

COPY, PRODUCT, MERGE = "copy", "dense product", "merge"
COPIED = {"cpu": 2**28, "cuda": 2**30}  # bytes: more than the caches hold
EDGE = {"cpu": 1024, "cuda": 8192}  # rows and columns of the square matrices


def ceilings(settings: Settings) -> Section:
    """Bytes per second of a large copy, read and written; operations per second of a large dense product."""
    source = settings.randn(COPIED[settings.device] // settings.dtype.itemsize)
    target = torch.empty_like(source)
    edge = EDGE[settings.device]
    a, b = settings.randn(edge, edge), settings.randn(edge, edge)
    product = torch.empty_like(a)
    functions = {COPY: plain(lambda: target.copy_(source)), PRODUCT: plain(lambda: torch.mm(a, b, out=product))}
    phases = interleave(functions, settings.rounds, warmup=2, watch=settings.watch())
    seconds = {name: statistics.median(times) for name, times in phases[WHOLE].items()}
    return Section(
        "roofline",
        "ceilings",
        "ceilings of this machine",
        phases=phases,
        facts={
            COPY: {"bytes_per_second": 2 * source.nbytes / seconds[COPY]},
            PRODUCT: {"flops_per_second": 2 * edge**3 / seconds[PRODUCT]},
        },
    )


def paths(rank: int) -> dict[str, PathConfig]:
    return {
        "A and B low rank": PathConfig(f"lora_{rank}", f"lora_{rank}", "vector", "vector", "vector"),
        "A vector, B low rank": PathConfig("vector", f"lora_{rank}", "vector", "vector", "vector"),
        "B low rank": lora(rank),
    }


def measure(shape_set: str, layer: Layer, settings: Settings) -> Section:
    """Time our forward, backward and merge on three paths, with the operations and bytes that they cannot avoid."""
    field, workload = make_layer(layer, settings, (OURS,))
    field.check(workload, [{NAME: path} for path in paths(layer.rank).values()], settings.layer_tolerance)
    seconds: dict[str, Times] = {}
    facts: dict[str, dict[str, float]] = {}
    for name, path in paths(layer.rank).items() if OURS in field.models else ():
        field.set_path(path)
        ours = field.models[OURS].get_submodule(NAME)
        assert isinstance(ours, GLoRALinear)
        merge = functools.partial(glora_merge, ours.weight.detach(), ours.bias, ours.terms().map(Tensor.detach))
        passes = interleave({name: step(workload, field.models[OURS])}, settings.rounds, watch=settings.watch())
        merges = interleave({name: plain(merge)}, settings.rounds, watch=settings.watch())
        found = {FORWARD: passes[FORWARD][name], BACKWARD: passes[BACKWARD][name], MERGE: merges[WHOLE][name]}
        for operation, cost in _costs(ours, workload).items():
            seconds.setdefault(WHOLE, {})[f"{operation}, {name}"] = found[operation]
            time = statistics.median(found[operation])
            rates = {"flops_per_second": cost["flops"] / time, "bytes_per_second": cost["bytes"] / time}
            facts[f"{operation}, {name}"] = cost | rates
    return Section(
        "roofline",
        f"{shape_set} {layer.name}",
        f"{layer.name}: {layer.tokens_on(settings.device)} x {layer.inputs} -> {layer.outputs}, rank {layer.rank}",
        settings.layer_tolerance,
        field.errors,
        field.refused,
        field.missing,
        seconds,
        facts=facts,
    )


def _costs(layer: GLoRALinear, workload: LayerWorkload) -> dict[str, dict[str, float]]:
    """Planned operations, and the bytes that are read and written once if all else stays in caches."""
    plan = explain(workload.x, layer.weight, layer.bias, layer.terms())
    factors = sum(p.nbytes for p in layer.support_parameters(layer.path))
    x, y, weight = workload.x.nbytes, workload.dy.nbytes, layer.weight.nbytes
    return {
        FORWARD: {"flops": plan.forward_flops, "bytes": x + weight + factors + y},
        BACKWARD: {"flops": plan.backward_flops, "bytes": y + x + weight + factors + x + factors},
        MERGE: {"flops": _merge_flops(layer), "bytes": 2 * weight + factors},
    }


def _merge_flops(layer: GLoRALinear) -> float:
    """Operations of the products of factors, and one multiplication and addition per element for each of A and B."""
    ranks = {slot: choice.rank for slot, choice in layer.path.choices.items() if slot in "AB" and choice.kind != "none"}
    return math.prod(layer.weight.shape) * sum(2 * rank + 2 for rank in ranks.values())
