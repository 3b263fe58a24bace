"""What a search saves by reusing the merged layers of the candidate before.

    python -m bench.search_reuse --out FOLDER

One search of a timm model with random weights, on random images, ranked by loss. Every candidate is scored twice:
alone, and with merged layers reused; the two have to agree to the last bit. Seconds are those that the process was
given, at one thread; who goes first changes with every candidate.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import TensorDataset

from glora import SearchSettings, SearchSpace, evolve, glora_layers, inject
from glora.dataset import reading
from glora.evolution.scoring import CandidateScorer
from glora.objective import Objective

from .environment import environment
from .figures import write_figures
from .settings import SEED

ALONE, LAYERS = "each alone", "merged layers reused"


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
    """One search, every candidate scored both ways."""
    model = make_model(name, max(space.ranks))
    size = model.patch_embed.img_size  # type: ignore[union-attr]
    data = TensorDataset(torch.randn(images, 3, *size), torch.arange(images) % 1000)

    def scorer() -> CandidateScorer:
        return CandidateScorer(model, reading("validation", data, images), "loss", Objective(model))

    reusing = scorer()
    seconds: dict[str, list[float]] = {ALONE: [], LAYERS: []}

    def score(paths, start: int, stop: int) -> float:
        calls = {ALONE: scorer(), LAYERS: reusing}
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
        "seconds": seconds,
    }


def row(run: dict[str, Any]) -> str:
    """A line of the table, with the ratio of summed times."""
    total = {entrant: sum(seconds) for entrant, seconds in run["seconds"].items()}
    sizes = run["settings"]
    shape = f"{sizes['population']}, {sizes['generations']} x {sizes['crossover'] + sizes['mutation']}"
    return (
        f"| {run['model']}, {run['images']} images | {shape} | {sizes['mutation_probability']} | "
        f"{total[ALONE] / run['candidates']:.2f} | {total[LAYERS] / total[ALONE]:.3f} |"
    )


def table(runs: list[dict[str, Any]], where: dict[str, Any]) -> str:
    lines = [
        f"| searched | candidates | mutation probability | seconds a candidate, alone | {LAYERS} / alone |",
        "|---|---|---|---|---|",
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
    write_figures(options.out, {"environment": where, "runs": runs}, table(runs, where))


if __name__ == "__main__":
    main()
