"""The paper's search, its variants and random search on the quickstart's task, at equal cost.

    python -m bench.search_variants --seeds 5 --out FOLDER

Inverted digits, 16 images per class, one supernet per seed, all trained as in the paper (neither balanced nor with
shares). A cost of 180 is 180 candidates on all validation images, or as many images in parts. First there is one limit,
the mean of random paths. Then there are four limits: the front is one search at four times the cost, the other variants
are four searches.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from torch import nn

from glora import Candidate, SearchResult, SearchSettings, evaluate_merged, search
from glora.paths import sampler_for
from glora.quickstart.digits import draw_few_shot
from glora.quickstart.domain import FewShot
from glora.quickstart.images import CLASSES
from glora.quickstart.methods import SEARCH, SPACE, Conditions, train_supernet
from glora.quickstart.study import StudySettings, pretrain

from .environment import environment

PAPER = "the paper's"
COST = SEARCH.population + SEARCH.generations * (SEARCH.crossover + SEARCH.mutation)
HALVING = replace(SEARCH, halving=(0.25, 0.5, 1), generations=17)
VARIANTS = {
    PAPER: SEARCH,
    "front": replace(SEARCH, objective="front"),
    "halving": HALVING,
    "front and halving": replace(HALVING, objective="front"),
    "random": replace(SEARCH, population=COST, generations=0),
}
LIMITS = (0.5, 0.75, 1.0, 1.25)  # times the mean of random paths
# One search for all limits costs as much as one search for each: generations of 20, or of 10 with halving.
WIDE = {
    "front": replace(VARIANTS["front"], generations=len(LIMITS) * COST // SEARCH.population - 1),
    "front and halving": replace(VARIANTS["front and halving"], generations=len(LIMITS) * COST // 10 - 1),
}
QUANTITIES = {"validation": "validation loss", "test": "test accuracy, %", "parameters": "parameters"}
GUESS = math.log(CLASSES)  # the loss of a guess


class Trial:
    """A trained supernet, searched with several seeds."""

    def __init__(self, model: nn.Module, data: FewShot, seed: int):
        self.model, self.data, self.seed = model, data, seed
        self.mean = sampler_for(model, SPACE).mean

    def search(self, settings: SearchSettings, share: float) -> SearchResult:
        """Search under a limit of ``share`` times the mean of random paths."""
        options: dict[str, Any] = {"metric": "loss", "settings": settings, "progress": False}
        return search(self.model, SPACE, self.data.validation, limit=round(share * self.mean), **options)

    def tested(self, candidate: Candidate) -> dict[str, float]:
        test = evaluate_merged(self.model, candidate.paths, self.data.test).accuracy
        return {"validation": -candidate.score, "test": 100 * test, "parameters": candidate.parameters}

    def at_one_limit(self, settings: SearchSettings) -> dict[str, float]:
        result = self.search(settings, 1.0)
        return {**self.tested(result.best), "cost": result.cost, "seconds": result.seconds}

    def at_all_limits(self, variant: str, seed: int) -> dict[str, Any]:
        """The best candidate at each limit, whichever search found it, and the hypervolume of all together."""
        wide = variant in WIDE
        settings = replace((WIDE if wide else VARIANTS)[variant], seed=seed)
        results = [self.search(settings, share) for share in (LIMITS[-1:] if wide else LIMITS)]
        found = [candidate for result in results for candidate in result.front]
        best = {share: self._best(found, share) for share in LIMITS}
        return {
            **{f"{quantity} at {share}": value for share, entry in best.items() for quantity, value in entry.items()},
            "hypervolume": self.hypervolume(found),
            "cost": sum(result.cost for result in results),
            "seconds": sum(result.seconds for result in results),
        }

    def _best(self, found: Iterable[Candidate], share: float) -> dict[str, float]:
        fitting = [c for c in found if c.parameters <= round(share * self.mean)]
        return self.tested(max(fitting, key=lambda c: (c.score, -c.parameters)))

    def hypervolume(self, found: Iterable[Candidate]) -> float:
        """The share of the area (loss up to a guess's, size up to the largest limit) that the candidates dominate."""
        largest = round(LIMITS[-1] * self.mean)
        area, lowest, reached = 0.0, GUESS, 0
        for candidate in sorted(found, key=lambda c: c.parameters):
            if -candidate.score < lowest:
                area += (GUESS - lowest) * (candidate.parameters - reached)
                lowest, reached = -candidate.score, candidate.parameters
        area += (GUESS - lowest) * (largest - reached)
        return area / (GUESS * largest)


def trials(seeds: int, out: Path) -> Iterable[Trial]:
    """One trial per seed; the backbone is pre-trained once and kept in ``out``."""
    backbone, _ = pretrain(StudySettings(), out / "backbone-seed0.pt", progress=False)
    for seed in range(seeds):
        data = draw_few_shot("inverted", 16, seed)
        conditions = Conditions(backbone, data, seed, StudySettings().steps, lambda units: None)
        yield Trial(train_supernet(conditions, 1e-2, replace(SPACE, shares={}), balance=None)[0], data, seed)


def run(trial: Trial, searches: int, tell: Callable[[str], object]) -> list[dict[str, Any]]:
    """Run every variant with every search seed, on one supernet."""
    entries = []
    for number in range(searches):
        for variant, settings in VARIANTS.items():
            measured = {
                "one limit": partial(trial.at_one_limit, replace(settings, seed=number)),
                "four limits": partial(trial.at_all_limits, variant, number),
            }
            for part, measure in measured.items():
                entry = {"seed": trial.seed, "search": number, "variant": variant, "part": part, **measure()}
                entries.append(entry)
                tell(json.dumps(entry))
    return entries


def summarise(entries: Sequence[dict[str, Any]]) -> dict[str, dict[str, dict[str, Any]]]:
    """Mean and standard deviation over seeds, by part, variant and quantity; and of paired differences to the paper's.

    The value of a seed is its mean over searches.
    """
    values: dict[tuple, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for entry in entries:
        for quantity in entry.keys() - {"seed", "search", "variant", "part"}:
            values[entry["part"], entry["variant"], quantity][entry["seed"]].append(entry[quantity])
    summary: dict[str, dict[str, dict[str, Any]]] = defaultdict(lambda: defaultdict(dict))
    for (part, variant, quantity), by_seed in values.items():
        own = {seed: fmean(found) for seed, found in by_seed.items()}
        paper = {seed: fmean(found) for seed, found in values[part, PAPER, quantity].items()}
        difference = _spread([own[seed] - paper[seed] for seed in own])
        summary[part][variant][quantity] = {**_spread([*own.values()]), "minus_paper": difference}
    return summary


def _spread(values: Sequence[float]) -> dict[str, float | None]:
    return {"mean": fmean(values), "std": stdev(values) if len(values) > 1 else None}


def tables(study: dict[str, Any]) -> str:
    """The summary as Markdown."""
    summary, where = study["summary"], study["environment"]
    titles = {
        f"{name} at {share}": f"{QUANTITIES[name]}, at {share}" for name in ("validation", "test") for share in LIMITS
    }
    several = [*titles, "hypervolume"]
    return "\n".join(
        [
            "# Search variants at equal cost\n\nInverted digits, 16 images a class, ranked by loss on 40 images. "
            f"{study['seeds']} seeds (draws and supernets), searches of each: {study['searches']}. Mean ± sample "
            "standard deviation over seeds; *minus*: of the paired differences to the paper's search. Lower losses, "
            "higher accuracies and higher hypervolumes are better.\n",
            f"## At one limit: the mean of random paths, a cost of {COST} evaluations\n",
            _table(summary["one limit"], [*QUANTITIES, "cost"], QUANTITIES),
            f"\n## At {', '.join(map(str, LIMITS))} of that limit: a cost of {len(LIMITS) * COST}\n\nOne search for "
            "all limits where there is a front, else one for each. Hypervolume: the part of losses up to a guess's and "
            "of sizes up to the largest limit.\n",
            _table(summary["four limits"], [*several, "cost"], titles),
            f"\n{where['device']}, one thread, {where['date'][:10]}, commit {where['commit']}, "
            f"torch {where['versions']['torch']}, timm {where['versions']['timm']}, Python {where['python']}; load "
            f"{where['load_average'][0]:.1f} on {where['cores']} cores.\n",
        ]
    )


def _table(part: dict[str, dict[str, Any]], quantities: Sequence[str], titles: dict[str, str]) -> str:
    """A table with one line per quantity and one column per variant."""
    lines = ["| | " + " | ".join(part) + " |", "|---" * (len(part) + 1) + "|"]
    for quantity in quantities:
        cells = [found[quantity] for found in part.values()]
        lines.append(f"| {titles.get(quantity, quantity)} | " + " | ".join(map(_cell, cells)) + " |")
        if quantity not in ("cost", "parameters"):
            lines.append("| *minus* | " + " | ".join(_cell(cell["minus_paper"], "+") for cell in cells) + " |")
    return "\n".join(lines)


def _cell(spread: dict[str, Any], sign: str = "") -> str:
    digits = 0 if abs(spread["mean"]) >= 1000 else 1 if abs(spread["mean"]) >= 10 else 3
    deviation = "" if not spread["std"] else f" ± {spread['std']:.{digits}f}"
    return f"{spread['mean']:{sign}.{digits}f}{deviation}"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.search_variants", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--seeds", type=int, default=5, help="few-shot draws and supernets (default: 5)")
    parser.add_argument("--searches", type=int, default=1, help="of each variant on each supernet (default: 1)")
    parser.add_argument("--out", type=Path, default=Path("runs/search-variants"), help="folder for what is written")
    parser.add_argument("--backbone", type=Path, default=Path("runs/search-variants"), help="where it is kept")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    for folder in (options.out, options.backbone):
        folder.mkdir(parents=True, exist_ok=True)
    where = environment("cpu")
    entries: list[dict[str, Any]] = []
    for trial in trials(options.seeds, options.backbone):
        entries += run(trial, options.searches, partial(print, flush=True))
    study = {"environment": where, "seeds": options.seeds, "searches": options.searches, "entries": entries}
    study["summary"] = summarise(entries)
    (options.out / "figures.json").write_text(json.dumps(study, indent=1) + "\n")
    (options.out / "table.md").write_text(tables(study))


if __name__ == "__main__":
    main()
