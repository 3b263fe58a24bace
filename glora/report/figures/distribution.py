"""Figure 3: which layers and which support tensors a path spends its parameters on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from ...config import SLOTS, count_choice
from ..drawing import COLOURS, ink_on, new_figure, set_title
from ..layer_types import layer_types
from ..runs import Run, Setting, task_title
from ..seeds import Tasks

Shares = dict[str, float]
_LABELLED = 0.07


def shares_by_type(run: Run) -> Shares:
    """The share of each layer type in the path's parameters; empty without a path, or if the path has no parameters."""
    if not run.paths:
        return {}
    types = layer_types(run.layers)
    counts = dict.fromkeys(types.values(), 0)
    for name, path in run.paths.items():
        counts[types[name]] += path.count(run.layers[name])
    return _normalised(counts)


def shares_by_tensor(run: Run) -> Shares:
    """The share of each support tensor, A to E, in the same way."""
    if not run.paths:
        return {}
    counts = Counter(dict.fromkeys(SLOTS, 0))
    for name, path in run.paths.items():
        for slot in SLOTS:
            counts[slot] += count_choice(slot, getattr(path, slot), run.layers[name])
    return _normalised(counts)


def _normalised(counts: Mapping[str, int]) -> Shares:
    total = sum(counts.values())
    return {name: count / total for name, count in counts.items()} if total else {}


def distribution_figure(setting: Setting, tasks: Tasks) -> Any | None:
    """One bar per data set (mean over its seeds) and one for their mean, by type and by tensor; None without paths."""
    panels = {"layer type": shares_by_type, "support tensor": shares_by_tensor}
    found = {
        title: {task_title(setting.protocol, task): mean_shares(list(map(of, runs))) for task, runs in tasks.items()}
        for title, of in panels.items()
    }
    bars = {title: {name: shares for name, shares in each.items() if shares} for title, each in found.items()}
    rows = len(bars["layer type"])
    if not rows:
        return None
    figure = new_figure(11, 1.9 + 0.27 * (rows + 1))
    for axes, (title, shares) in zip(figure.subplots(1, 2, sharey=True), bars.items()):
        _draw(axes, {**shares, f"mean of {rows}": mean_shares(list(shares.values()))} if rows > 1 else shares)
        axes.set_xlabel(f"share of the trained parameters by {title}, %")
    set_title(figure, f"Where {setting.method} spends its parameters ({setting.backbone})")
    return figure


def mean_shares(shares: Sequence[Shares]) -> Shares:
    """The mean of the entries that are not empty."""
    found = [each for each in shares if each]
    names = list(dict.fromkeys(name for each in found for name in each))
    return {name: fmean(each.get(name, 0.0) for each in found) for name in names}


def _draw(axes: Any, bars: Mapping[str, Shares]) -> None:
    names = list(dict.fromkeys(name for shares in bars.values() for name in shares))
    left = [0.0] * len(bars)
    for index, name in enumerate(names):
        widths = [100 * shares.get(name, 0.0) for shares in bars.values()]
        hatch = "//" if index >= len(COLOURS) else None
        colour = COLOURS[index % len(COLOURS)]
        axes.barh(list(bars), widths, left=left, color=colour, edgecolor="white", hatch=hatch, label=name)
        for row, (width, start) in enumerate(zip(widths, left)):
            if width >= 100 * _LABELLED:
                axes.text(
                    start + width / 2, row, f"{width:.0f}", color=ink_on(colour), ha="center", va="center", fontsize=8
                )
        left = [start + width for start, width in zip(left, widths)]
    axes.set_xlim(0, 100)
    axes.set_ylim(len(bars) - 0.4, -0.6)
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=min(len(names), 5), frameon=False)
