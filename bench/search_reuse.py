"""What a search saves by reusing merged layers and first children of the candidate before: time and children.

    python -m bench.search_reuse --out FOLDER

One search of a timm model with random weights, on random images, ranked by loss. Every candidate is scored three
times in turn: alone, with merged layers reused, and with the outputs of first children reused too; the three have to
agree to the last bit. Seconds are those that the process was given, at one thread; who goes first changes with every
candidate.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import TensorDataset

from glora import SearchSettings, SearchSpace, evolve, glora_layers, inject
from glora.evolution.scoring import CandidateScorer

from .environment import environment
from .settings import SEED

ALONE, LAYERS, CHILDREN = "each alone", "merged layers reused", "first children too"
CAPACITY = 2 * 2**30


def make_model(name: str, rank: int) -> nn.Module:
    """With random weights, the support tensors too."""
    import timm

    torch.manual_seed(SEED)
    model = inject(timm.create_model(name), rank)
    with torch.no_grad():
        for layer in glora_layers(model).values():
            for parameter in layer.support_parameters():
                parameter.normal_(std=0.02)
    return model


def measure(name: str, images: int, settings: SearchSettings, space: SearchSpace) -> dict[str, Any]:
    """One search, every candidate scored by all three."""
    model = make_model(name, max(space.ranks))
    size = model.patch_embed.img_size  # type: ignore[union-attr]
    data = TensorDataset(torch.randn(images, 3, *size), torch.arange(images) % 1000)

    def scorer(capacity: int) -> CandidateScorer:
        return CandidateScorer(model, data, "loss", images, reuse_bytes=capacity)

    reusing = scorer(CAPACITY)
    kept: dict[str, Callable[..., float]] = {LAYERS: scorer(0), CHILDREN: reusing}
    seconds: dict[str, list[float]] = {entrant: [] for entrant in (ALONE, LAYERS, CHILDREN)}

    def score(paths, start: int, stop: int) -> float:
        calls = {ALONE: scorer(0), **kept}
        turn = len(seconds[ALONE]) % len(calls)
        totals = set()
        for entrant in [*calls][turn:] + [*calls][:turn]:
            started = time.process_time()
            totals.add(calls[entrant](paths, start, stop))
            seconds[entrant].append(time.process_time() - started)
        if len(totals) != 1:
            raise ValueError(f"reuse: expected equal bits, got {totals}")
        return totals.pop()

    layers = {layer_name: layer.shape for layer_name, layer in glora_layers(model).items()}
    result = evolve(layers, space, score, samples=images, settings=settings)
    return {
        "model": name,
        "images": images,
        "settings": settings.to_dict(),
        "candidates": len(result.history),
        "children": {"saved": reusing.reuse.saved, "ran": reusing.reuse.ran},  # type: ignore[union-attr]
        "seconds": seconds,
    }


def row(run: dict[str, Any]) -> str:
    """A line of the table: a share of children, and ratios of summed times."""
    children, total = run["children"], {entrant: sum(seconds) for entrant, seconds in run["seconds"].items()}
    saved = children["saved"] / (children["saved"] + children["ran"])
    sizes = run["settings"]
    shape = f"{sizes['population']}, {sizes['generations']} x {sizes['crossover'] + sizes['mutation']}"
    ratios = " | ".join(f"{total[entrant] / total[ALONE]:.3f}" for entrant in (LAYERS, CHILDREN))
    return (
        f"| {run['model']}, {run['images']} images | {shape} | {sizes['mutation_probability']} | "
        f"{100 * saved:.1f}% | {total[ALONE] / run['candidates']:.2f} | {ratios} |"
    )


def table(runs: list[dict[str, Any]], where: dict[str, Any]) -> str:
    lines = [
        "| searched | candidates | mutation probability | blocks not run | seconds a candidate, alone "
        f"| {LAYERS} / alone | {CHILDREN} / alone |",
        "|---|---|---|---|---|---|---|",
        *map(row, runs),
        "",
        f"{where['device']}, one thread, process time, torch {where['versions']['torch']}, timm "
        f"{where['versions']['timm']}; {where['date'][:10]}, commit {where['commit']}; the load was "
        f"{where['load_average'][0]:.1f} on {where['cores']} cores. Ratios are of sums over all candidates, "
        "interleaved; scores agreed to the last bit.",
    ]
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.search_reuse", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--model", default="vit_base_patch16_224", help="of timm (default: vit_base_patch16_224)")
    parser.add_argument("--images", type=int, default=2, help="a candidate is scored on (default: 2)")
    parser.add_argument("--population", type=int, default=20, help="and as many in each generation (default: 20)")
    parser.add_argument("--generations", type=int, default=4, help="after the first (default: 4)")
    parser.add_argument("--probabilities", type=float, nargs="+", default=[0.2, 0.02], help="of mutation; a run each")
    parser.add_argument("--out", type=Path, help="folder for figures.json and table.md")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    half = options.population // 2
    sizes = {"population": options.population, "crossover": options.population - half, "mutation": half}
    where, runs = environment("cpu"), []
    for probability in options.probabilities:
        settings = SearchSettings(**sizes, generations=options.generations, mutation_probability=probability)
        runs.append(measure(options.model, options.images, settings, SearchSpace((8, 4))))
        print(row(runs[-1]), flush=True)
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "figures.json").write_text(json.dumps({"environment": where, "runs": runs}, indent=1) + "\n")
        (options.out / "table.md").write_text(table(runs, where))


if __name__ == "__main__":
    main()
