"""The pictures of a study: accuracy against parameters, and the paths that the search chose."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..config import SLOTS, PathConfig
from .methods import SEARCHED

# Colour-blind safe (Okabe and Ito); one colour a method, the same in every picture.
_COLOURS = ("#999999", "#E69F00", "#56B4E9", "#009E73", "#117733", "#000000", "#CC79A7", "#D55E00", "#882255")
_KINDS = ("none", "constant", "vector", "lora")
_KIND_COLOURS = ("#f0f0f0", "#c6dbef", "#6baed6", "#08519c")


def save_figures(study: dict[str, Any], folder: str | Path) -> list[Path]:
    """Write PNG files for every task and number of shots into ``folder``; returns their names."""
    import matplotlib

    matplotlib.use("Agg")
    files = []
    for summary in study["summary"]:
        stem = f"{summary['task']}-{summary['shots']}shots"
        files.append(_save_accuracy(summary, Path(folder) / f"accuracy-{stem}.png"))
        runs = [r for r in study["runs"] if (r["task"], r["shots"]) == (summary["task"], summary["shots"])]
        files.append(_save_paths(runs, Path(folder) / f"paths-{stem}.png"))
    for task in study["settings"]["tasks"]:
        curve = [summary for summary in study["summary"] if summary["task"] == task]
        if len(curve) > 1:
            files.append(_save_curve(curve, Path(folder) / f"shots-{task}.png"))
    return files


def _save_accuracy(summary: dict[str, Any], file: Path) -> Path:
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for row, colour in zip(summary["rows"], _COLOURS):
        searched = row["method"] == SEARCHED
        axes.errorbar(
            max(row["parameters"], 1),
            100 * row["test"],
            yerr=None if row["test_std"] is None else 100 * row["test_std"],
            fmt="*" if searched else "o",
            markersize=16 if searched else 9,
            capsize=4,
            color=colour,
            label=row["method"],
        )
    axes.set_xscale("symlog", linthresh=1000, linscale=0.5)
    axes.set_xlim(-100, 4e5)
    axes.set_xticks([0, 1e3, 1e4, 1e5], ["0", "1k", "10k", "100k"])
    axes.set_xlabel("trained parameters beside the head")
    axes.set_ylabel("test accuracy, %")
    seeds = summary["rows"][0]["seeds"]
    axes.set_title(f"Digits, {summary['task']}, {summary['shots']} images a class (mean ± std over {seeds} seeds)")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right", fontsize=9)
    return _save(figure, file)


def _save_paths(runs: Sequence[dict[str, Any]], file: Path) -> Path:
    """One panel a seed: layers down, support tensors across, the colour is the kind."""
    from matplotlib import pyplot as plt
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    figure, panels = plt.subplots(
        1, len(runs), figsize=(2.2 + 1.9 * len(runs), 6), layout="constrained", sharey=True, squeeze=False
    )
    for axes, run in zip(panels[0], runs):
        searched = next(row for row in run["rows"] if row["method"] == SEARCHED)
        paths = {name: PathConfig.from_dict(data) for name, data in searched["details"]["paths"].items()}
        codes = [[_KINDS.index(path.choices[slot].kind) for slot in SLOTS] for path in paths.values()]
        axes.imshow(codes, cmap=ListedColormap(_KIND_COLOURS), vmin=0, vmax=len(_KINDS) - 1, aspect="auto")
        for i, path in enumerate(paths.values()):
            for j, slot in enumerate(SLOTS):
                if path.choices[slot].rank:
                    axes.text(j, i, path.choices[slot].rank, ha="center", va="center", color="white", fontsize=8)
        axes.set_xticks(range(len(SLOTS)), SLOTS)
        axes.set_yticks(range(len(paths)), list(paths))
        axes.set_xticks([j - 0.5 for j in range(1, len(SLOTS))], minor=True)
        axes.set_yticks([i - 0.5 for i in range(1, len(paths))], minor=True)
        axes.grid(which="minor", color="white", linewidth=1.5)
        axes.tick_params(which="both", length=0)
        axes.set_title(f"seed {run['seed']}", fontsize=10)
    handles = [
        Patch(facecolor=colour, edgecolor="#888888", label="low rank (its rank)" if kind == "lora" else kind)
        for kind, colour in zip(_KINDS, _KIND_COLOURS)
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False)
    figure.suptitle(f"Paths chosen by the search: {runs[0]['task']}, {runs[0]['shots']} images a class")
    return _save(figure, file)


def _save_curve(curve: Sequence[dict[str, Any]], file: Path) -> Path:
    """Accuracy against the number of training images a class."""
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    shots = [summary["shots"] for summary in curve]
    for index, colour in enumerate(_COLOURS):
        rows = [summary["rows"][index] for summary in curve]
        searched = rows[0]["method"] == SEARCHED
        axes.plot(
            shots,
            [100 * row["test"] for row in rows],
            marker="*" if searched else "o",
            markersize=12 if searched else 6,
            linewidth=2.5 if searched else 1.5,
            color=colour,
            label=rows[0]["method"],
        )
    axes.set_xscale("log", base=2)
    axes.set_xticks(shots, [str(shot) for shot in shots])
    axes.set_xlabel("training images a class")
    axes.set_ylabel("test accuracy, %")
    axes.set_title(f"Digits, {curve[0]['task']} (mean over {curve[0]['rows'][0]['seeds']} seeds)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=9)
    return _save(figure, file)


def _save(figure: Any, file: Path) -> Path:
    from matplotlib import pyplot as plt

    figure.savefig(file, dpi=150)
    plt.close(figure)
    return file
