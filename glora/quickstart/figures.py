"""The pictures of a study: accuracy against parameters, and the paths that the search chose."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..config import PathConfig
from ..report.figures.path_map import add_kind_legend, draw_paths
from .domain import Domain
from .domains import domain_of
from .methods import SEARCHED

# Colour-blind safe (Okabe and Ito); one colour and marker per row, the same in every picture of a study.
_COLOURS = ("#999999", "#E69F00", "#56B4E9", "#009E73", "#117733", "#000000", "#CC79A7", "#D55E00", "#882255")
_MARKERS = "os^"


def save_figures(study: dict[str, Any], folder: str | Path) -> list[Path]:
    """Write PNG files for every task and number of shots into ``folder``; return their names."""
    import matplotlib

    matplotlib.use("Agg")
    domain = domain_of(study["settings"]["tasks"])
    files = []
    for summary in study["summary"]:
        stem = f"{summary['task']}-{summary['shots']}shots"
        title = f"{domain.title}, {summary['task']}, {summary['shots']} {domain.samples} a class"
        files.append(_save_accuracy(summary, title, Path(folder) / f"accuracy-{stem}.png"))
        runs = [r for r in study["runs"] if (r["task"], r["shots"]) == (summary["task"], summary["shots"])]
        files.append(_save_paths(runs, title, Path(folder) / f"paths-{stem}.png"))
    for task in study["settings"]["tasks"]:
        curve = [summary for summary in study["summary"] if summary["task"] == task]
        if len(curve) > 1:
            files.append(_save_curve(curve, domain, Path(folder) / f"shots-{task}.png"))
    return files


def _save_accuracy(summary: dict[str, Any], title: str, file: Path) -> Path:
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for index, row in enumerate(summary["rows"]):
        searched, (colour, marker) = row["method"] == SEARCHED, _look(index)
        axes.errorbar(
            max(row["parameters"], 1),
            100 * row["test"],
            yerr=None if row["test_std"] is None else 100 * row["test_std"],
            fmt="*" if searched else marker,
            markersize=16 if searched else 9,
            capsize=4,
            color=colour,
            label=row["method"],
        )
    axes.set_xscale("symlog", linthresh=1000, linscale=0.5)
    axes.set_xticks([0, 1e3, 1e4, 1e5, 1e6], ["0", "1k", "10k", "100k", "1M"])
    axes.set_xlim(-100, 2 * max(row["parameters"] for row in summary["rows"]))
    axes.set_xlabel("trained parameters beside the head")
    axes.set_ylabel("test accuracy, %")
    seeds = summary["rows"][0]["seeds"]
    axes.set_title(f"{title} (mean ± std over {seeds} seeds)")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right", fontsize=9)
    return _save(figure, file)


def _save_paths(runs: Sequence[dict[str, Any]], title: str, file: Path) -> Path:
    """One panel per seed: layers down, support tensors across, the colour is the kind."""
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(
        1, len(runs), figsize=(2.2 + 1.9 * len(runs), 6), layout="constrained", sharey=True, squeeze=False
    )
    for axes, run in zip(panels[0], runs):
        searched = next(row for row in run["rows"] if row["method"] == SEARCHED)
        paths = {name: PathConfig.from_dict(data) for name, data in searched["details"]["paths"].items()}
        draw_paths(axes, paths)
        axes.set_title(f"seed {run['seed']}", fontsize=10)
    add_kind_legend(figure)
    figure.suptitle(f"Paths chosen by the search: {title}")
    return _save(figure, file)


def _save_curve(curve: Sequence[dict[str, Any]], domain: Domain, file: Path) -> Path:
    """Accuracy against the number of training samples per class."""
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    shots = [summary["shots"] for summary in curve]
    for index, rows in enumerate(zip(*(summary["rows"] for summary in curve))):
        searched, (colour, marker) = rows[0]["method"] == SEARCHED, _look(index)
        axes.plot(
            shots,
            [100 * row["test"] for row in rows],
            marker="*" if searched else marker,
            markersize=12 if searched else 6,
            linewidth=2.5 if searched else 1.5,
            color=colour,
            label=rows[0]["method"],
        )
    axes.set_xscale("log", base=2)
    axes.set_xticks(shots, [str(shot) for shot in shots])
    axes.set_xlabel(f"training {domain.samples} a class")
    axes.set_ylabel("test accuracy, %")
    axes.set_title(f"{domain.title}, {curve[0]['task']} (mean over {curve[0]['rows'][0]['seeds']} seeds)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=9)
    return _save(figure, file)


def _look(index: int) -> tuple[str, str]:
    """Colour and marker of a row."""
    return _COLOURS[index % len(_COLOURS)], _MARKERS[index // len(_COLOURS)]


def _save(figure: Any, file: Path) -> Path:
    from matplotlib import pyplot as plt

    figure.savefig(file, dpi=150)
    plt.close(figure)
    return file
