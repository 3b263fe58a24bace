"""One layer: forward, and backward from a given gradient of the output."""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from glora import GLoRALinear, PathConfig, SearchSpace
from glora.config import KINDS
from glora_kernels import explain

from .. import counting
from ..agreement import run
from ..entrants import ENTRANTS, Field, make_field
from ..entrants import names as who
from ..section import Comparison, Section, against, per_run
from ..settings import SEED, Settings
from ..shapes import Layer
from ..timing import Timed, Watch, interleave
from ..workloads import BACKWARD, FORWARD, LayerWorkload, step

NAME = "linear"
TWO_UNITS, THREE_UNITS = "2 dense products", "3 dense products"
RANDOM = ", random paths"
ALL_LOW_RANK = "ours, all low rank"
KIND_NAMES = {"lora": "low rank", "vector": "vector", "constant": "constant", "none": "none"}
KIND_PAIRS = {f"ours, A {a}, B {b}": (i, j) for i, a in KIND_NAMES.items() for j, b in KIND_NAMES.items()}
WITH_RANDOM_PATHS = (who.OURS, who.ASSEMBLED, who.OFFICIAL)
PEERS = (who.LORA, who.HIRA, who.GLORA, who.LYCORIS_BYPASS, who.LYCORIS)
ENTRIES = (
    TWO_UNITS,
    THREE_UNITS,
    *list(KIND_PAIRS)[:10],
    who.FROZEN,
    who.OURS + RANDOM,
    who.LORA,
    *list(KIND_PAIRS)[10:],
    who.HIRA,
    who.OURS_MATMUL,
    who.LYCORIS_BYPASS,
    who.LYCORIS,
    ALL_LOW_RANK,
    who.GLORA,
    who.ASSEMBLED + RANDOM,
    who.OFFICIAL + RANDOM,
)
COMPARISONS = (
    *against((who.FROZEN, who.LORA), KIND_PAIRS),
    *against((who.FROZEN, who.LORA, who.GLORA, TWO_UNITS, THREE_UNITS), [who.OURS + RANDOM]),
    Comparison(who.OURS + RANDOM, who.OFFICIAL + RANDOM),
    Comparison(who.OURS + RANDOM, who.ASSEMBLED + RANDOM),
    Comparison(ALL_LOW_RANK, who.GLORA),
    Comparison("ours, A low rank, B none", who.HIRA),
    Comparison(who.OURS_MATMUL, who.LYCORIS_BYPASS),
    Comparison(who.OURS_MATMUL, who.LYCORIS),
    *against((who.FROZEN,), (*PEERS, who.OFFICIAL + RANDOM, who.ASSEMBLED + RANDOM)),
    *against((TWO_UNITS,), [who.FROZEN]),
)


def measure(shape_set: str, layer: Layer, settings: Settings) -> Section:
    """Check and time every entrant; "random paths" is the mean over :func:`spread_paths`."""
    tokens = layer.tokens_on(settings.device)
    field, workload = make_layer(layer, settings)
    paths = {name: PathConfig(*(_spell(kind, layer.rank) for kind in pair)) for name, pair in KIND_PAIRS.items()}
    paths[ALL_LOW_RANK] = who.all_low_rank(layer.rank)
    drawn = spread_paths(layer.rank, torch.Generator().manual_seed(SEED))
    field.check(workload, [{NAME: path} for path in (*paths.values(), *drawn)], settings.layer_tolerance)

    functions = _functions(field, workload, paths, drawn)
    phases = interleave(functions, settings.rounds, watch=settings.watch())
    shares = {name + RANDOM: len(drawn) for name in WITH_RANDOM_PATHS}
    return Section(
        "layer",
        f"{shape_set} {layer.name}",
        f"{layer.name}: {tokens} x {layer.inputs} -> {layer.outputs}, rank {layer.rank}",
        settings.layer_tolerance,
        field.errors,
        field.refused,
        field.missing,
        {phase: per_run(times, shares) for phase, times in phases.items()},
        COMPARISONS,
        _facts(field, workload, paths, drawn, settings),
        {"tokens": tokens},
        _strategies(field, workload, paths),
    )


def make_layer(layer: Layer, settings: Settings, entrants: Iterable[str] = ENTRANTS) -> tuple[Field, LayerWorkload]:
    """The ``entrants`` around one linear layer, and tokens for it."""
    torch.manual_seed(SEED)
    linear = nn.Linear(layer.inputs, layer.outputs).to(settings.device, settings.dtype)
    field = make_field(nn.Sequential(OrderedDict([(NAME, linear)])), [NAME], layer.rank, entrants)
    tokens = layer.tokens_on(settings.device)
    x, dy = settings.randn(tokens, layer.inputs), settings.randn(tokens, layer.outputs)
    return field, LayerWorkload(x.requires_grad_(), dy)


def _spell(kind: str, rank: int) -> str:
    return f"lora_{rank}" if kind == "lora" else kind


def _functions(
    field: Field, workload: LayerWorkload, paths: dict[str, PathConfig], drawn: list[PathConfig]
) -> dict[str, Timed]:
    """The functions of a round in the order of :data:`ENTRIES`: those to be compared closely are neighbours."""
    weight = field.backbone.get_parameter(f"{NAME}.weight").detach()
    functions: dict[str, Timed] = {
        TWO_UNITS: _products(workload.x.detach(), weight, workload.dy, 2),
        THREE_UNITS: _products(workload.x.detach(), weight, workload.dy, 3),
    }
    for name, model in field.models.items():
        functions[name] = step(workload, model)
        if name in WITH_RANDOM_PATHS:
            functions[name + RANDOM] = _on(field, drawn, functions[name])
    if who.OURS in functions:
        functions |= {name: _on(field, [path], functions[who.OURS]) for name, path in paths.items()}
    return {name: functions[name] for name in ENTRIES if name in functions}


def _on(field: Field, paths: list[PathConfig], timed: Timed) -> Timed:
    """Run ``timed`` on each of ``paths``; setting paths is not timed."""

    def run(watch: Watch) -> None:
        for path in paths:
            field.set_path(path)
            timed(watch)

    return run


def _products(x: Tensor, weight: Tensor, dy: Tensor, units: int) -> Timed:
    """The dense products alone: y, dx and, as the third, dW; into existing buffers."""
    y, dx, dw = torch.empty_like(dy), torch.empty_like(x), torch.empty_like(weight)

    def timed(watch: Watch) -> None:
        with watch(FORWARD):
            torch.mm(x, weight.T, out=y)
        with watch(BACKWARD):
            torch.mm(dy, weight, out=dx)
            if units == 3:
                torch.mm(dy.T, x, out=dw)

    return timed


def spread_paths(rank: int, generator: torch.Generator) -> list[PathConfig]:
    """16 paths: every pair of kinds of A and B once, C, D and E drawn uniformly.

    A and B decide the cost, so that the mean over these estimates the mean over all 432 paths far
    better than 16 free draws would.
    """
    options = {slot: SearchSpace(ranks=(rank,)).options[slot] for slot in KINDS}
    drawn = SearchSpace(ranks=(rank,)).sample_many(16, generator)
    pairs = [(a, b) for a in options["A"] for b in options["B"]]
    return [PathConfig(a, b, path.C, path.D, path.E) for (a, b), path in zip(pairs, drawn, strict=True)]


def _facts(
    field: Field, workload: LayerWorkload, paths: dict[str, PathConfig], drawn: list[PathConfig], settings: Settings
) -> dict[str, dict[str, float]]:
    """Counts, made once for each entrant; for random paths the mean."""
    facts = {}
    for name, model in field.models.items():
        count = functools.partial(_count, model, workload, settings.device)
        if name not in WITH_RANDOM_PATHS:
            facts[name] = count()
        else:
            facts[name + RANDOM] = _mean([_counted_on(field, path, count) for path in drawn])
        if name == who.OURS:
            facts |= {own: _counted_on(field, path, count) for own, path in paths.items()}
    return {name: facts[name] for name in ENTRIES if name in facts}


def _strategies(field: Field, workload: LayerWorkload, paths: dict[str, PathConfig]) -> dict[str, str]:
    """Our backend and strategy on each path."""
    if who.OURS not in field.models:
        return {}
    ours = field.models[who.OURS].get_submodule(NAME)
    assert isinstance(ours, GLoRALinear)
    plans = {name: explain(workload.x, ours.weight, ours.bias, ours.terms(path)) for name, path in paths.items()}
    return {name: f"{plan.backend}: {plan.strategy}" for name, plan in plans.items()}


def _counted_on(field: Field, path: PathConfig, count: Callable[[], dict[str, float]]) -> dict[str, float]:
    field.set_path(path)
    return count()


def _count(model: nn.Module, workload: LayerWorkload, device: str) -> dict[str, float]:
    found = counting.memory(workload, model, (workload.x,), device)
    return found | ({"flops": counting.flops(lambda: run(workload, model))} if device == "cpu" else {})


def _mean(found: list[dict[str, float]]) -> dict[str, float]:
    return {key: sum(one[key] for one in found) / len(found) for key in found[0]}
