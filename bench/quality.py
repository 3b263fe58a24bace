"""Does the method earn its place? Every method at its own rate, on equal data, over fresh few-shot draws.

    python -m bench.quality rates digits --seeds 100 101      # which rate suits each method
    python -m bench.quality rows digits --seeds 20 21 22 23 24 25
    python -m bench.quality curve digits --seeds 20 21 22 23 24 25
    python -m bench.quality table digits                      # table.md and curve.png of what has been measured

Each line that is measured is appended to ``FOLDER/DOMAIN/<part>.jsonl`` at once; what is there is not measured again. A
rate is chosen on draws of other seeds, of which a quarter of the training samples is held out; all methods that train
adapters choose from the same rates. (Digits are few: what is held out of one draw may be tested in another.) A draw is
a task and a seed; its methods share the samples, the backbone and the schedule, so differences are paired.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import nn
from torch.utils.data import TensorDataset

from glora import count_parameters, evaluate, evaluate_merged, inject
from glora.presets import apply_preset
from glora.quickstart.domain import Domain, FewShot
from glora.quickstart.domains import DOMAINS
from glora.quickstart.methods import (
    ALWAYS,
    BOTH,
    METHODS,
    Conditions,
    Row,
    lora_parameters,
    refit_path,
    search_supernet,
    train_supernet,
)
from glora.quickstart.study import StudySettings, backbone_file, pretrain

from .environment import environment

RATES = (5e-3, 1e-2, 2e-2, 4e-2)
FULL_RATES = (3e-4, 1e-3, 2e-3, 4e-3)  # of all weights
RANKS = (1, 2, 4, 8)  # of LoRA, and of the limits that GLoRA is searched under, on a curve
PARTS = ("rates", "rows", "curve")
Draw = tuple[str, int]  # task and seed
Lines = dict[Draw, dict[str, Any]]  # of one row, by draw
Draws = Iterable[tuple[dict[str, Any], Conditions]]
BASE = f"LoRA r{{rank}} {BOTH}"


class Study:
    """The lines that have been measured of one domain, in a folder."""

    def __init__(self, domain: Domain, folder: Path):
        self.domain, self.folder = domain, folder / domain.name
        self.folder.mkdir(parents=True, exist_ok=True)

    def lines(self, part: str) -> list[dict[str, Any]]:
        file = self.folder / f"{part}.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def measure(self, part: str, key: dict[str, Any], make: Callable[[], Iterable[Row]]) -> None:
        """Append the rows that ``make`` returns, unless there are some of this ``key``."""
        if any(all(line.get(name) == value for name, value in key.items()) for line in self.lines(part)):
            return
        started = time.process_time()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "lr: expected steps that move")  # the rates are tried out
            rows = list(make())
        cpu, where = time.process_time() - started, environment("cpu")
        lines = []
        for row in rows:
            figures = {"parameters": row.parameters, "test": row.test, "generalisation": row.generalisation}
            details = {k: v for k, v in row.details.items() if k in ("validation_loss", "paths")}
            about = {"row": row.method, **figures, "seconds": row.seconds, "cpu": cpu, **details}
            lines.append(json.dumps({**key, **about, "date": where["date"], "commit": where["commit"]}) + "\n")
            print(json.dumps({**key, **about, "paths": None}), flush=True)
        with open(self.folder / f"{part}.jsonl", "a", encoding="utf-8") as stream:
            stream.write("".join(lines))

    def rates(self) -> dict[str, float]:
        """The rate of each method: the best mean accuracy on held-out samples; the domain's where none was tried.

        Of a method with several rows, that which was trained on train+val counts, by which methods are compared. LoRA
        at equal compute takes LoRA's.
        """
        found: dict[str, dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
        lines = self.lines("rates")
        with_both = {line["method"] for line in lines if line["row"].endswith(BOTH)}
        for line in lines:
            if line["method"] not in with_both or line["row"].endswith(BOTH):
                found[line["method"]][line["lr"]].append(line["test"])
        best = {method: max(by_rate, key=lambda lr: fmean(by_rate[lr])) for method, by_rate in found.items()}
        if "lora" in best:
            best.setdefault("lora-longer", best["lora"])
        return {**self.domain.rates, **best}


def backbone_of(domain: Domain, folder: Path) -> nn.Module:
    """The pre-trained backbone, which is kept in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = StudySettings(tasks=(domain.tasks[0],))
    return pretrain(settings, backbone_file(folder, settings), progress=False)[0]


def draws_of(
    study: Study, backbone: nn.Module, tasks: Sequence[str], seeds: Sequence[int], fresh: bool = True
) -> Draws:
    """Each task and seed, as the first entries of a line, with its conditions.

    Raises:
        ValueError: ``fresh`` draws that rates were chosen on.
    """
    used = sorted({line["seed"] for line in study.lines("rates")} & set(seeds))
    if fresh and used:
        raise ValueError(f"seeds: expected others than those that rates were chosen on, got {used}")
    for seed in seeds:
        for task in tasks:
            yield {"task": task, "seed": seed}, conditions_of(study.domain, backbone, task, seed)


def conditions_of(domain: Domain, backbone: nn.Module, task: str, seed: int) -> Conditions:
    data = domain.few_shot(task, domain.shots, seed)
    return Conditions(backbone, data, seed, domain.steps, lambda units: None, domain)


def held_out(conditions: Conditions) -> Conditions:
    """The same draw without its test: the last quarter of each class's training samples is tested on instead."""
    x, y = conditions.data.train.tensors
    places = torch.zeros(len(y), dtype=torch.long)
    for label in y.unique():
        members = (y == label).nonzero().squeeze(1)
        places[members] = torch.arange(len(members))
    kept = places < 3 * int(y.bincount().min()) // 4
    train, test = TensorDataset(x[kept], y[kept]), TensorDataset(x[~kept], y[~kept])
    return replace(conditions, data=FewShot(train, conditions.data.validation, test, {}))


def tune(study: Study, draws: Draws, methods: Sequence[str]) -> None:
    for key, conditions in draws:
        held = held_out(conditions)
        for method in methods:
            for lr in FULL_RATES if method == "full" else RATES:
                own = {**key, "method": method, "lr": lr}
                study.measure("rates", own, partial(METHODS[method].rows, held, lr))


def compare(study: Study, draws: Draws, methods: Sequence[str]) -> None:
    rates = study.rates()
    for key, conditions in draws:
        for method in methods:
            own = {**key, "method": method, "lr": rates[method]}
            study.measure("rows", own, partial(METHODS[method].rows, conditions, rates[method]))


def trace(study: Study, draws: Draws) -> None:
    """Accuracy against parameters: LoRA of several ranks; one supernet, searched under the limits of these ranks."""
    rates = study.rates()
    for key, conditions in draws:
        for rank in RANKS:
            own = {**key, "method": "lora", "rank": rank, "lr": rates["lora"]}
            study.measure("curve", own, partial(_lora_of, conditions, rank, rates["lora"]))
        own = {**key, "method": ALWAYS, "lr": rates[ALWAYS]}
        study.measure("curve", own, partial(_glora_of_all_limits, conditions, rates[ALWAYS]))


def _lora_of(conditions: Conditions, rank: int, lr: float) -> list[Row]:
    both = conditions.with_validation()
    model = apply_preset(inject(conditions.model(), rank), "lora", rank)
    return [both.trained(f"LoRA r{rank}", model, count_parameters(model), conditions.recipe(lr))]


def _glora_of_all_limits(conditions: Conditions, lr: float) -> list[Row]:
    model, seconds = train_supernet(conditions, lr)
    rows = []
    for rank in RANKS:
        domain = replace(conditions.domain, lora_rank=rank)
        limit = lora_parameters(replace(conditions, domain=domain), model)
        result = search_supernet(conditions, model, limit)
        paths, parameters, spent = result.best.paths, result.best.parameters, seconds + result.seconds
        searched = evaluate_merged(model, paths, conditions.data.test).accuracy
        details = {"validation_loss": -result.best.score}
        rows.append(Row(f"searched, at LoRA r{rank}'s size", parameters, searched, None, spent, details))
        tuned = copy.deepcopy(model)
        spent += refit_path(conditions, tuned, paths, lr)
        refitted = evaluate(tuned, conditions.data.test).accuracy
        rows.append(Row(f"searched and refit, at LoRA r{rank}'s size", parameters, refitted, None, spent))
    return rows


# -- tables ------------------------------------------------------------------------------------------

# The 97.5% quantile of Student's t by degrees of freedom.
_T = (
    *(12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23, 2.20, 2.18, 2.16, 2.14, 2.13),
    *(2.12, 2.11, 2.10, 2.09, 2.09, 2.08, 2.07, 2.07, 2.06, 2.06, 2.06, 2.05, 2.05, 2.05, 2.04),
)


def interval(values: Mapping[Draw, float]) -> float:
    """Half of the 95% interval of the mean over draws; NaN where there is one of each task.

    Tasks are given: only the spread within each counts.
    """
    tasks = Counter(task for task, _ in values)
    degrees = len(values) - len(tasks)
    if degrees < 1:
        return math.nan
    means = {task: fmean(value for (of, _), value in values.items() if of == task) for task in tasks}
    variance = sum((value - means[task]) ** 2 for (task, _), value in values.items()) / degrees
    return _T[min(degrees, len(_T)) - 1] * math.sqrt(variance / len(values))


def by_row(lines: Iterable[dict[str, Any]]) -> dict[str, Lines]:
    found: dict[str, Lines] = defaultdict(dict)
    for line in lines:
        found[line["row"]][line["task"], line["seed"]] = line
    return found


def accuracies(draws: Lines, base: Lines | None = None) -> dict[Draw, float]:
    """In %; above those of ``base``, on the draws that both have."""
    if base is None:
        return {draw: 100 * line["test"] for draw, line in draws.items()}
    return {draw: 100 * (line["test"] - base[draw]["test"]) for draw, line in draws.items() if draw in base}


def cell(values: Mapping[Draw, float], sign: str = "") -> str:
    """The mean and its interval."""
    return f"{fmean(values.values()):{sign}.1f} ± {interval(values):.1f}" if values else ""


def size(draws: Lines) -> str:
    return f"{fmean(line['parameters'] for line in draws.values()):,.0f}"


def table(study: Study) -> str:
    """The rows of all draws, and what each is above LoRA on the same samples."""
    domain, rows = study.domain, by_row(study.lines("rows"))
    base = rows[BASE.format(rank=domain.lora_rank)]
    tasks = sorted({task for draws in rows.values() for task, _ in draws}, key=domain.tasks.index)
    head = ["method", "rate", "parameters", *tasks, "mean", "minus LoRA (train+val), 95% interval", "ahead", "s"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for name, draws in rows.items():
        paired = {} if draws is base else accuracies(draws, base)
        found = [[value for (of, _), value in accuracies(draws).items() if of == task] for task in tasks]
        cells = [
            name,
            ", ".join(sorted({f"{line['lr']:g}" for line in draws.values()})),
            size(draws),
            *(f"{fmean(values):.1f}" if values else "" for values in found),
            cell(accuracies(draws)),
            cell(paired, "+"),
            f"{sum(value > 0 for value in paired.values())}/{len(paired)}" if paired else "",
            f"{fmean(line['seconds'] for line in draws.values()):.0f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


_CURVES = {
    BASE: "LoRA (train+val)",
    "searched, at LoRA r{rank}'s size": "GLoRA, searched (no retraining)",
    "searched and refit, at LoRA r{rank}'s size": "GLoRA, searched and refit (train+val)",
}


def curve_table(study: Study) -> str:
    rows = by_row(study.lines("curve"))
    lines = [
        "| limit | " + " | ".join(f"{title}: parameters, test" for title in _CURVES.values()) + " | refit minus LoRA |"
    ]
    lines.append("|---" * (len(_CURVES) + 2) + "|")
    for rank in RANKS:
        lora, searched, refitted = (rows.get(form.format(rank=rank), {}) for form in _CURVES)
        if lora and refitted:
            cells = [f"{size(draws)}, {cell(accuracies(draws))}" for draws in (lora, searched, refitted)]
            cells = [f"LoRA r{rank}", *cells, cell(accuracies(refitted, lora), "+")]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw_curve(study: Study, file: Path) -> None:
    """Test accuracy against parameters, with 95% intervals of the mean over draws."""
    from matplotlib import pyplot

    rows = by_row(study.lines("curve"))
    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    for form, title in _CURVES.items():
        found = [rows[name] for rank in RANKS if (name := form.format(rank=rank)) in rows]
        sizes = [fmean(line["parameters"] for line in draws.values()) for draws in found]
        means = [fmean(accuracies(draws).values()) for draws in found]
        bars = [interval(accuracies(draws)) for draws in found]
        axes.errorbar(sizes, means, bars, marker="o", capsize=3, label=title)
    draws = len(next(iter(rows.values())))
    axes.set_xscale("log")
    axes.set(xlabel="trained parameters without the head", ylabel=f"test accuracy, %, mean over {draws} draws")
    axes.set_title(f"{study.domain.title}: {', '.join(sorted({line['task'] for line in study.lines('curve')}))}")
    axes.legend()
    figure.savefig(file, dpi=150)
    pyplot.close(figure)


def write_tables(study: Study) -> str:
    """Write ``table.md`` and ``curve.png`` of what there is; return the text."""
    where, domain = environment("cpu"), study.domain
    parts = [
        f"# {domain.title}: methods at their own rates on equal data\n\n{domain.model}; {domain.shots} "
        f"{domain.samples} a class to train, {domain.validation} to validate; {domain.steps} steps, refit "
        f"{domain.refit_steps}. `(train+val)`: trained on both. Rates from {RATES} ({FULL_RATES} for all weights) "
        "by accuracy on held-out training samples of other draws. Seconds: one thread, of training and search."
    ]
    if study.lines("rows"):
        parts.append(table(study))
    if study.lines("curve"):
        parts.append(f"## Accuracy against parameters\n\nBoth trained on train+val at last.\n\n{curve_table(study)}")
        draw_curve(study, study.folder / "curve.png")
    parts.append(
        f"{where['device']}, one thread, torch {where['versions']['torch']}, {where['date'][:10]}. Raw figures: "
        "`rates.jsonl`, `rows.jsonl`, `curve.jsonl`."
    )
    text = "\n\n".join(parts) + "\n"
    (study.folder / "table.md").write_text(text)
    return text


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.quality", description=__doc__.split("\n", 1)[0])
    parser.add_argument("part", choices=(*PARTS, "table"))
    parser.add_argument("domain", choices=list(DOMAINS))
    parser.add_argument("--tasks", nargs="+", help="default: all of the domain")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="of few-shot draws, heads and supernets")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--out", type=Path, default=Path("bench/results/quality"), help="folder for what is written")
    parser.add_argument("--backbone", type=Path, default=Path("runs/quality"), help="where pre-trained ones are kept")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    domain = DOMAINS[options.domain]
    study, tasks = Study(domain, options.out), options.tasks or list(domain.tasks)
    if options.part == "table":
        print(write_tables(study))
        return
    backbone = backbone_of(domain, options.backbone)
    draws = draws_of(study, backbone, tasks, options.seeds, fresh=options.part != "rates")
    if options.part == "curve":
        trace(study, draws)
    else:
        (tune if options.part == "rates" else compare)(study, draws, options.methods)


if __name__ == "__main__":
    main()
