"""VTAB-1K by data set as bars, with the average beside the published ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .datasets import GROUPS, VTAB, average, group_of
from .drawing import COLOURS, new_figure
from .published import published
from .runs import Setting, Task
from .seeds import OverSeeds, Tasks, combined, over_seeds, test_accuracy

_AVERAGE = len(VTAB) + 0.5
_WIDTH = 0.8


def vtab_figure(backbone: str, settings: Mapping[Setting, Tasks]) -> Any | None:
    """A bar a setting in each data set, and the averages where all data sets were run; None if no run was tested."""
    found = {setting.method: _accuracies(tasks) for setting, tasks in settings.items()}
    if not any(found.values()):
        return None
    figure = new_figure(12, 5)
    axes = figure.subplots()
    for index, (method, accuracies) in enumerate(found.items()):
        _draw_method(axes, method, accuracies, index, len(found))
    _draw_published(axes, backbone, len(found))
    not_run = [name for name in VTAB if not any(name in accuracies for accuracies in found.values())]
    for name in not_run:
        axes.text(list(VTAB).index(name), 1, "not run", rotation=90, ha="center", va="bottom", color="#777777")
    _label(axes)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    axes.set_title(f"VTAB-1K, {backbone} (mean ± standard deviation over seeds)", fontsize=11)
    return figure


def _accuracies(tasks: Tasks) -> dict[str, OverSeeds]:
    found = {name: over_seeds(tasks.get(Task(name, None), ()), test_accuracy) for name in VTAB}
    return {name: each for name, each in found.items() if each is not None}


def _draw_method(axes: Any, method: str, accuracies: Mapping[str, OverSeeds], index: int, count: int) -> None:
    shift = _WIDTH * ((index + 0.5) / count - 0.5)
    bars = {list(VTAB).index(name) + shift: each for name, each in accuracies.items()}
    if len(accuracies) == len(VTAB):
        overall = combined(accuracies, average) or OverSeeds(
            {0: average({name: each.mean for name, each in accuracies.items()})}
        )
        bars[_AVERAGE + shift] = overall
    spread = [each.deviation or 0.0 for each in bars.values()]
    axes.bar(
        list(bars),
        [each.mean for each in bars.values()],
        _WIDTH / count,
        yerr=spread if any(spread) else None,
        capsize=3,
        color=COLOURS[index % len(COLOURS)],
        hatch="//" if index >= len(COLOURS) else None,
        label=method,
    )


def _draw_published(axes: Any, backbone: str, taken: int) -> None:
    """Averages alone: those of single data sets were not found."""
    for index, known in enumerate(published("vtab1k", backbone), taken):
        axes.hlines(
            known.accuracy["average"],
            _AVERAGE - 0.6,
            _AVERAGE + 0.6,
            color=COLOURS[index % len(COLOURS)],
            linestyle=("--", ":")[index // len(COLOURS) % 2],
            label=f"{known.method} (published average)",
        )


def _label(axes: Any) -> None:
    start = 0
    for index, group in enumerate(GROUPS):
        width = len(group_of(group))
        axes.axvspan(start - 0.5, start + width - 0.5, color="#eeeeee" if index % 2 == 0 else "#ffffff", zorder=0)
        axes.text(start + width / 2 - 0.5, 101, group, ha="center", va="bottom", fontsize=9)
        start += width
    titles = [about.title for about in VTAB.values()]
    axes.set_xticks([*range(len(VTAB)), _AVERAGE], [*titles, "average"], rotation=45, ha="right")
    axes.set_xlim(-0.6, _AVERAGE + 0.8)
    axes.set_ylim(0, 107)
    axes.set_ylabel("test accuracy, %")
    axes.set_axisbelow(True)
    axes.grid(axis="y", alpha=0.3)
