"""What was tried on supernets, one thing at a time: scales, shares, rates, sampling of paths. Digits, equal steps.

    python -m bench.quality_variants --seeds 0 1 2
    python -m bench.quality_variants --steps digits text    # one step of each kind, measured and by the closed form

Each variant trains one supernet of each draw in 500 steps, searches it under LoRA's size, and refits the winner in 200
steps at a rate of 0.01. The lines go to ``variants.jsonl``; what is there is not measured again. ``variants.md`` has
the paired differences to LoRA r3 on train+val. Draws that choose a variant do not prove it: ``bench.quality`` takes
others.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import nn

import glora.training.loop as training
from glora import PathConfig, Scales, SearchSpace, balance, evaluate, evaluate_merged, glora_layers, inject, refit
from glora.balancing import set_scales
from glora.paths import sampler_for
from glora.quickstart.digits import DIGITS
from glora.quickstart.domain import Domain
from glora.quickstart.domains import DOMAINS
from glora.quickstart.methods import METHODS, Conditions, Row, lora_parameters, search_supernet

from .quality import Study, accuracies, backbone_of, by_row, cell, conditions_of, size

HALF = {"lora": 0.5}
BASE = "LoRA r3 (train+val)"
REFIT = (1e-2, 200)
RANDOM = 3  # paths, of which the mean is a row
Paths = dict[str, PathConfig]


@dataclass(frozen=True)
class Variant:
    """How a supernet is trained.

    Args:
        lr, warmup: as in :class:`glora.Recipe`.
        balance: as in :class:`glora.Recipe`.
        shares: as in :class:`glora.SearchSpace`.
        scale: sets the scales of a model in another way, which may measure a batch.
        draw: the paths of a step, of the step, the ordinary draw for given shares, and those of the step before.
    """

    lr: float = 2e-2
    warmup: float = 0.02
    balance: float | None = None
    shares: Mapping[str, float] = field(default_factory=dict)
    scale: Callable[[nn.Module, Any], None] | None = None
    draw: Callable[[int, Callable[[Mapping[str, float]], Paths], Paths | None, torch.Generator], Paths] | None = None


def measured(target: float, largest: float | None = None, per_model: bool = False) -> Callable[[nn.Module, Any], None]:
    """As :func:`glora.balance`, with scales up to ``largest``, or one for all layers (``per_model``)."""

    def scale(model: nn.Module, batch: Any) -> None:
        changes = balance(model, batch, target=target).changes
        if per_model:
            kinds = {kind for own in changes.values() for kind in own}
            mean = {kind: fmean(own[kind] for own in changes.values()) for kind in kinds}
            changes = dict.fromkeys(changes, mean)
        set_scales(model, changes, target)
        if largest is not None:
            for layer in glora_layers(model).values():
                kept = layer.scales.to_dict().items()
                layer.scales = Scales(**{slot: {k: min(f, largest) for k, f in kinds.items()} for slot, kinds in kept})

    return scale


def predicted(layer: Any, lr: float = 1e-2) -> dict[tuple[str, str], float]:
    """The closed form of docs/quality.md: the relative change of a layer's output by one step of each kind.

    C is taken to move it by ``1 / 0.35`` as much, since its signs follow the gradient.
    """
    rows, columns, rank = layer.out_features, layer.in_features, layer.rank
    norm = float(layer.matrix.norm()) / math.sqrt(rows)
    product = math.sqrt(2 * rank / (rank + columns))
    changes = {
        ("A", "lora"): product,
        ("A", "vector"): 1.0,
        ("A", "constant"): 1.0,
        ("B", "lora"): math.sqrt(columns) * product / norm,
        ("B", "vector"): math.sqrt(columns) / norm,
        ("B", "constant"): math.sqrt(columns) / norm,
        ("C", "lora"): rank * math.sqrt(6 / (rank + 1)) / 2 / 0.35,
        ("C", "vector"): 1 / 0.35,
        ("E", "vector"): 1 / norm,
        ("E", "constant"): 1 / norm,
    }
    if layer.bias is not None:
        size = float(layer.bias.square().mean().sqrt())
        changes |= {("D", "vector"): size / norm, ("D", "constant"): size / norm}
    return {kind: lr * change for kind, change in changes.items()}


def closed_form(target: float) -> Callable[[nn.Module, Any], None]:
    def scale(model: nn.Module, batch: Any) -> None:
        set_scales(model, {name: predicted(layer) for name, layer in glora_layers(model).items()}, target)

    return scale


def square_root(model: nn.Module, batch: Any) -> None:
    """B as a vector or constant times ``1 / sqrt(K)``, all else as it is."""
    roots = {name: math.sqrt(layer.in_features) for name, layer in glora_layers(model).items()}
    set_scales(model, {name: {("B", "vector"): root, ("B", "constant"): root} for name, root in roots.items()}, 1.0)


def shrinking(step: int, drawn: Callable[[Mapping[str, float]], Paths], before: Any, generator: Any) -> Paths:
    """Low ranks in 0.9 of the draws at first, then in 0.7, and in 0.5 for the last 200 of 500 steps."""
    return drawn({"lora": 0.9 if step < 150 else 0.7 if step < 300 else 0.5})


def partly(step: int, drawn: Callable[..., Paths], before: Paths | None, generator: torch.Generator) -> Paths:
    """Each layer keeps its path with a probability of 0.75."""
    paths = drawn(HALF)
    if before is None:
        return paths
    kept = (torch.rand(len(paths), generator=generator) < 0.75).tolist()
    return {name: before[name] if keep else path for (name, path), keep in zip(paths.items(), kept)}


VARIANTS = {
    "plain, 1e-2": Variant(lr=1e-2),
    "balanced 0.02": Variant(balance=0.02),
    "balanced 0.02, half": Variant(balance=0.02, shares=HALF),
    "balanced 0.01, half": Variant(balance=0.01, shares=HALF),
    "balanced 0.04, half": Variant(balance=0.04, shares=HALF),
    "balanced 0.02, half, one scale for all layers": Variant(shares=HALF, scale=measured(0.02, per_model=True)),
    "closed form 0.02, half": Variant(shares=HALF, scale=closed_form(0.02)),
    "B vector, constant / sqrt(K), half": Variant(shares=HALF, scale=square_root),
    "balanced 0.02, scales up to 1, half": Variant(shares=HALF, scale=measured(0.02, largest=1)),
    "balanced 0.02, scales up to 4, half": Variant(shares=HALF, scale=measured(0.02, largest=4)),
    "balanced 0.02, half, warm-up 0.2": Variant(balance=0.02, shares=HALF, warmup=0.2),
    "balanced 0.01, half, 4e-2, warm-up 0.1": Variant(lr=4e-2, warmup=0.1, balance=0.01, shares=HALF),
    "balanced 0.02, gradual shrinking": Variant(balance=0.02, shares=HALF, draw=shrinking),
    "balanced 0.02, half, layers keep their path in 0.75": Variant(balance=0.02, shares=HALF, draw=partly),
}


@contextmanager
def drawing(draw: Any) -> Iterator[None]:
    """Let ``draw`` choose the paths of training, in a ``with`` block."""

    class Sampler:
        def __init__(self, model: nn.Module, space: SearchSpace, **_: Any):
            self.model, self.space, self.step, self.before = model, space, 0, None

        def sample(self, generator: torch.Generator) -> Paths:
            def drawn(shares: Mapping[str, float]) -> Paths:
                return sampler_for(self.model, replace(self.space, shares=shares), training=True).sample(generator)

            self.before = draw(self.step, drawn, self.before, generator)
            self.step += 1
            return self.before

    if draw is not None:
        training.sampler_for = Sampler  # type: ignore[assignment]
    try:
        yield
    finally:
        training.sampler_for = sampler_for


def steps_table(domain: Domain, backbone: nn.Module) -> str:
    """What one step of each kind does to the layers of a domain's first task, measured and by the closed form."""
    data = domain.few_shot(domain.tasks[0], 16, 0)
    model = inject(Conditions(backbone, data, 0, 1, lambda units: None, domain).model(), domain.rank)
    changes, layers = balance(model, tuple(tensor[:64] for tensor in data.train.tensors)).changes, glora_layers(model)
    head = ["kind", "measured: mean", "smallest to largest", "closed form: mean", "measured / closed form, by layer"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for kind in next(iter(changes.values())):
        found = [own[kind] for own in changes.values()]
        form = [predicted(layer)[kind] for layer in layers.values()]
        ratios = [one / other for one, other in zip(found, form) if other]
        cells = [" ".join(kind), f"{fmean(found):.2%}", f"{min(found):.2%} to {max(found):.2%}", f"{fmean(form):.2%}"]
        lines.append("| " + " | ".join([*cells, f"{min(ratios):.2f} to {max(ratios):.2f}"]) + " |")
    about = f"{domain.model}: {len(layers)} layers, rank {domain.rank}, task {domain.tasks[0]}"
    return f"# One step of each kind, at a rate of 0.01 and scale 1\n\n{about}.\n\n" + "\n".join(lines) + "\n"


def rows_of(variant: Variant, conditions: Conditions) -> list[Row]:
    model = inject(conditions.model(), conditions.domain.rank)
    torch.manual_seed(conditions.seed)
    if variant.scale is not None:
        variant.scale(model, tuple(tensor[:32] for tensor in conditions.data.train.tensors))
    space = replace(conditions.domain.space, shares=variant.shares)
    with drawing(variant.draw):
        recipe = replace(conditions.recipe(variant.lr, balance=variant.balance), warmup=variant.warmup)
        seconds = conditions.train(model, recipe, space)
    result = search_supernet(conditions, model, lora_parameters(conditions, model))
    paths, parameters, test = result.best.paths, result.best.parameters, conditions.data.test
    generator, sampler = torch.Generator().manual_seed(conditions.seed), sampler_for(model, space, result.limit)
    random = [evaluate_merged(model, sampler.sample(generator), test).accuracy for _ in range(RANDOM)]
    searched = evaluate_merged(model, paths, test).accuracy
    lr, steps = REFIT
    both = conditions.with_validation().training_set
    spent = refit(model, paths, both, conditions.recipe(lr, steps), progress=False).seconds
    return [
        Row("random", 0, fmean(random), None, seconds),
        Row("searched", parameters, searched, None, seconds + result.seconds),
        Row("searched and refit", parameters, evaluate(model, test).accuracy, None, seconds + result.seconds + spent),
    ]


def table(study: Study) -> str:
    """What each variant is above LoRA, on the draws that both have."""
    lines = study.lines("variants")
    base = by_row(line for line in lines if line["variant"] == BASE)[BASE]
    head = ["variant", "draws", "random", "searched", "minus LoRA", "searched and refit", "minus LoRA", "parameters"]
    text = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for name in dict.fromkeys(line["variant"] for line in lines if line["variant"] != BASE):
        rows, cells = by_row(line for line in lines if line["variant"] == name), []
        for row in ("searched", "searched and refit"):
            cells += [cell(accuracies(rows[row])), cell(accuracies(rows[row], base), "+")]
        cells = [name, str(len(rows["searched"])), cell(accuracies(rows["random"])), *cells, size(rows["searched"])]
        text.append("| " + " | ".join(cells) + " |")
    told = f"{BASE}: {cell(accuracies(base))} over {len(base)} draws. Accuracies in %, 95% intervals."
    return "\n".join([*text, "", told, ""])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.quality_variants", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="of few-shot draws, heads and supernets")
    parser.add_argument("--steps", nargs="+", choices=list(DOMAINS), default=[], help="only these domains' steps")
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--out", type=Path, default=Path("bench/results/quality"), help="folder for what is written")
    parser.add_argument("--backbone", type=Path, default=Path("runs/quality"), help="where the pre-trained one is kept")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    for name in options.steps:
        domain = DOMAINS[name]
        text = steps_table(domain, backbone_of(domain, options.backbone))
        (Study(domain, options.out).folder / "steps.md").write_text(text)
        print(text)
    if options.steps:
        return
    study, backbone = Study(DIGITS, options.out), backbone_of(DIGITS, options.backbone)
    for seed in options.seeds:
        for task in DIGITS.tasks:
            conditions = conditions_of(DIGITS, backbone, task, seed)
            key = {"task": task, "seed": seed}
            study.measure("variants", {**key, "variant": BASE}, lambda c=conditions: METHODS["lora"].rows(c, 2e-2))
            for name in options.variants:
                variant = VARIANTS[name]
                study.measure("variants", {**key, "variant": name}, lambda v=variant, c=conditions: rows_of(v, c))
    (study.folder / "variants.md").write_text(table(study))
    print(table(study))


if __name__ == "__main__":
    main()
