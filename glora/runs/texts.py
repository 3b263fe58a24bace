"""What the commands print."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ..evolution.texts import describe_score
from .spec import RunSpec


def describe_plan(
    specs: Sequence[RunSpec], out: Path, problems: Sequence[str], split: Mapping[str, int] = MappingProxyType({})
) -> str:
    """One line per run, then everything that is missing; ``split`` are the sizes of the parts of own data."""
    first = specs[0]
    data = first.own.source if first.own else first.data
    training, size = first.recipe.training, first.recipe.sizes[first.size]
    what = f"preset {first.preset}" if first.preset else f"ranks {list(size.ranks)}, limit {size.limit or 'none'}"
    lines = [
        f"{first.recipe.protocol}: {len(specs)} runs of {first.recipe.model.name}, size {first.size} ({what})",
        f"{training.epochs} epochs, batches of {training.batch_size}; data in {data}, weights {first.weights}",
        *([f"split: {', '.join(f'{part} {size:,}' for part, size in split.items())}"] if split else []),
        "",
        f"{'run':<34} {'group':<12} {'classes':>7} {'lr':>8}  folder",
    ]
    lines += [
        f"{spec.name:<34} {spec.protocol.group(spec.dataset):<12} {spec.protocol.classes(spec.dataset):>7} "
        f"{training.lr_of.get(spec.dataset, training.lr):>8g}  {out / spec.name}"
        for spec in specs
    ]
    if not problems:
        return "\n".join([*lines, "", "nothing is missing"])
    return "\n".join([*lines, "", "missing or malformed:", *problems])


def describe_training(summaries: Sequence[Mapping[str, Any]], out: Path) -> str:
    noun = "texts" if "texts_per_second" in summaries[0] else "images"
    validated = "validation" in summaries[0]
    heading = f" {'validation':>11} {'accuracy':>9}" if validated else ""
    lines = [f"{'run':<34} {'steps':>7} {'loss':>8} {f'{noun}/s':>9} {'hours':>7}{heading}"]
    for s in summaries:
        speed, hours = s[f"{noun}_per_second"], s["seconds"] / 3600
        scored = f" {s['validation']['loss']:>11.4f} {s['validation']['accuracy']:>9.2%}" if validated else ""
        lines.append(f"{s['run']:<34} {s['steps']:>7} {s['loss']:>8.4f} {speed:>9.0f} {hours:>7.2f}{scored}")
    return "\n".join([*lines, "", f"Written: {out}"])


def describe_searches(found: Sequence[Mapping[str, Any]]) -> str:
    lines = [f"{'run':<34} {'validation':>11} {'parameters':>11} {'limit':>11} {'evaluations':>11} {'hours':>7}"]
    for result in found:
        best, limit = result["best"], result["limit"]
        lines.append(
            f"{result['run']:<34} {_score(result, best):>11} {best['parameters']:>11,} "
            f"{'none' if limit is None else format(limit, ','):>11} {result['evaluations']:>11} {result['hours']:>7.2f}"
        )
        lines += [f"{'':<34} {_score(result, c):>11} {c['parameters']:>11,}  on the front" for c in _front(result)]
    return "\n".join(lines)


def _score(result: Mapping[str, Any], candidate: Mapping[str, Any]) -> str:
    return describe_score(result["metric"], candidate["score"])


def _front(result: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    """The front, if the search was for one."""
    return result["front"] if result["settings"]["objective"] == "front" else ()


def describe_merges(merged: Sequence[Mapping[str, Any]]) -> str:
    """One line for each winner; those of refits say so."""
    lines = [f"{'run':<34} {'parameters':>11} {'difference':>11} {'test':>8}  targets"]
    for summary in merged:
        test = summary.get("test")
        accuracy = "-" if test is None else f"{test['accuracy']:.2%}"
        targets = {} if test is None else test["targets"]
        told = ", ".join(f"{name} {metrics['accuracy']:.2%}" for name, metrics in targets.items())
        figures = f"{summary['parameters']:>11,} {summary['model_difference']:>11.2e} {accuracy:>8}"
        name = f"{summary['run']}, refit" if summary.get("refit") else summary["run"]
        lines.append(f"{name:<34} {figures}  {told}")
    return "\n".join(lines)
