"""Figure 2: accuracy against images per class, on each data set and on average."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import nan
from typing import Any

from ...protocols import FewShot
from ..datasets import FEW_SHOT
from ..drawing import COLOURS, MARKERS, legend_label, new_figure, set_title
from ..published import published
from ..runs import Setting
from ..seeds import Tasks
from ..tables.fewshot import AVERAGE, our_entries, published_entries, row_of
from ..tables.table import Entry


def few_shot_figure(backbone: str, settings: Mapping[Setting, Tasks]) -> Any | None:
    """A panel for the average (if all data sets were run), then one per data set; None if no run was tested."""
    ours = {setting.method: list(our_entries(setting.method, tasks)) for setting, tasks in settings.items()}
    if not any(entry.value is not None for entries in ours.values() for entry in entries):
        return None
    figure = new_figure(11, 6.4)
    known = published("fewshot", backbone)
    titles = {"Average": AVERAGE, **{about.title: about.title for about in FEW_SHOT.values()}}
    panels = figure.subplots(2, 3, sharex=True)
    for axes, (title, row) in zip(panels.flat, titles.items()):
        lines = [
            _draw_ours(axes, _points(entries, row), method, index)
            for index, (method, entries) in enumerate(ours.items())
        ]
        for index, each in enumerate(known, len(ours)):
            lines.append(_draw_published(axes, _points(published_entries(each), row), each.method, index))
        _label(axes, title)
    for axes in panels[1]:
        axes.set_xlabel("training images a class")
    for axes in panels[:, 0]:
        axes.set_ylabel("test accuracy, %")
    figure.legend(handles=lines, loc="outside lower center", ncols=4, frameon=False)
    set_title(figure, f"Few-shot learning, {backbone} (mean ± standard deviation over seeds)")
    return figure


def _points(entries: Iterable[Entry], row: str) -> dict[int, Entry]:
    """Points by shots, without shots that were not run, or not on all data sets."""
    found = {entry.row: entry for entry in entries if entry.value is not None and entry.part is None}
    return {shots: found[row_of(row, shots)] for shots in FewShot.shots if row_of(row, shots) in found}


def _draw_ours(axes: Any, points: Mapping[int, Entry], method: str, index: int) -> Any:
    return axes.errorbar(
        list(points),
        [entry.value for entry in points.values()],
        yerr=[nan if entry.deviation is None else entry.deviation for entry in points.values()],
        capsize=3,
        linewidth=2,
        marker=MARKERS[index % len(MARKERS)],
        color=COLOURS[index % len(COLOURS)],
        label=legend_label(method),
    )


def _draw_published(axes: Any, points: Mapping[int, Entry], method: str, index: int) -> Any:
    return axes.plot(
        list(points),
        [entry.value for entry in points.values()],
        linestyle="--",
        marker=".",
        linewidth=1.2,
        color=COLOURS[index % len(COLOURS)],
        label=f"{method} (published)",
    )[0]


def _label(axes: Any, title: str) -> None:
    axes.set_title(title, fontsize=10)
    axes.set_xscale("log", base=2)
    axes.set_xticks(FewShot.shots, [str(shots) for shots in FewShot.shots])
    axes.grid(alpha=0.3)
