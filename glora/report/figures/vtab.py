"""VTAB-1K by data set as bars, with the averages beside them, ours and the published ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import nan
from typing import Any

from ...protocols import GROUPS, average
from ..datasets import VTAB
from ..drawing import COLOURS, legend_label, new_figure, set_title
from ..published import Published, published
from ..runs import Setting
from ..seeds import OverSeeds, Tasks
from ..tables.table import Entry, mean_entry
from ..tables.vtab import accuracies

_WIDTH = 0.8


def vtab_figure(backbone: str, settings: Mapping[Setting, Tasks]) -> Any | None:
    """One bar per setting in each tested data set; averages if all were tested. None if no run was tested."""
    found = {setting.method: accuracies(tasks) for setting, tasks in settings.items()}
    if not any(found.values()):
        return None
    names = [name for name in VTAB if any(name in tested for tested in found.values())]
    known = published("vtab1k", backbone)
    if known or any(len(tested) == len(VTAB) for tested in found.values()):
        figure = new_figure(14, 5)
        bars, averages = figure.subplots(1, 2, width_ratios=(4, 1))
        _draw_averages(averages, found, known)
    else:
        figure = new_figure(6 + 0.4 * len(names), 5)
        bars = figure.subplots()
    for index, (method, tested) in enumerate(found.items()):
        _draw_bars(bars, names, method, tested, index, len(found))
    _label_bars(bars, names)
    if len(found) > 1:
        columns = int(figure.get_figwidth() // 3)
        bars.legend(fontsize=8, ncols=columns, loc="upper center", bbox_to_anchor=(0.5, -0.25), frameon=False)
    part = "" if len(names) == len(VTAB) else f", {len(names)} of {len(VTAB)} data sets"
    only = "" if len(found) > 1 else f", {next(iter(found))}"
    set_title(figure, f"VTAB-1K{part}{only}, {backbone}")
    return figure


def _draw_bars(
    axes: Any, names: Sequence[str], method: str, tested: Mapping[str, OverSeeds], index: int, count: int
) -> None:
    shift = _WIDTH * ((index + 0.5) / count - 0.5)
    axes.bar(
        [names.index(name) + shift for name in tested],
        [each.mean for each in tested.values()],
        _WIDTH / count,
        yerr=[nan if each.deviation is None else each.deviation for each in tested.values()],
        capsize=3,
        color=COLOURS[index % len(COLOURS)],
        hatch="//" if index >= len(COLOURS) else None,
        label=legend_label(method),
    )


def _label_bars(axes: Any, names: Sequence[str]) -> None:
    start = 0
    for index, group in enumerate(GROUPS):
        width = sum(VTAB[name].group == group for name in names)
        if not width:
            continue
        axes.axvspan(start - 0.5, start + width - 0.5, color="#eeeeee" if index % 2 == 0 else "#ffffff", zorder=0)
        axes.text(start + width / 2 - 0.5, 101, group, ha="center", va="bottom", fontsize=9)
        start += width
    axes.set_xticks(range(len(names)), [VTAB[name].title for name in names], rotation=45, ha="right")
    axes.set_xlim(-0.6, len(names) - 0.4)
    axes.set_ylim(0, 107)
    axes.set_ylabel("test accuracy, %:\nmean ± standard deviation over seeds")
    axes.set_axisbelow(True)
    axes.grid(axis="y", alpha=0.3)


def _draw_averages(axes: Any, found: Mapping[str, Mapping[str, OverSeeds]], known: Sequence[Published]) -> None:
    """One dot per method: ours filled, if all data sets were run; published ones hollow."""
    names: list[str] = []
    rows: list[float] = []
    for index, (method, tested) in enumerate(found.items()):
        part = "" if len(tested) == len(VTAB) else f"\n({len(tested)} of {len(VTAB)} run)"
        _add_row(names, rows, f"{legend_label(method)}{part}")
        if len(tested) == len(VTAB):
            mean = mean_entry(method, "", tested, len(VTAB), average)
            _draw_average(axes, mean, rows[-1], COLOURS[index % len(COLOURS)])
    for each in known:
        _add_row(names, rows, f"{each.method} (published)")
        axes.plot(each.accuracy["average"], rows[-1], "o", markerfacecolor="none", color="#444444")
    axes.set_yticks(rows, names, fontsize=8)
    axes.set_ylim(rows[-1] + 1, rows[0] - 1)
    axes.set_xlabel("average of the groups' means, %")
    axes.grid(alpha=0.3)


def _add_row(names: list[str], rows: list[float], name: str) -> None:
    """Put ``name`` below the others, with room for its lines."""
    before = rows[-1] + names[-1].count("\n") / 2 + 0.5 if rows else 0.0
    rows.append(before + name.count("\n") / 2 + 0.5)
    names.append(name)


def _draw_average(axes: Any, entry: Entry, row: float, colour: str) -> None:
    axes.errorbar(entry.value, row, xerr=entry.deviation, fmt="o", capsize=3, color=colour)
