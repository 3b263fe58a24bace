"""The progress of a search, and its trade-off: scores by generation, and against parameters."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from math import isfinite
from typing import Any

from ...evolution.selection import front
from ..drawing import COLOURS, new_figure, set_title, thousands
from ..records import Evaluated, Search
from ..runs import Run

_BEST, _MEDIAN, _FRONT, _LIMIT = COLOURS[4], COLOURS[0], COLOURS[2], "#444444"


def search_figure(run: Run) -> Any | None:
    """Both panels, with the candidates scored on the whole split; None without a search or without finite scores."""
    search = run.search
    if search is None:
        return None
    full = [each for each in search.history if each.share == 1]
    finite = [each for each in full if isfinite(each.score)]
    if not finite:
        return None
    scale, unit = _unit(search.metric)
    figure = new_figure(11, 4.9)
    progress, trade = figure.subplots(1, 2, sharey=True)
    _draw_progress(progress, finite, scale)
    progress.set_ylabel(unit)
    _draw_trade(trade, finite, search, scale)
    parts, infinite = len(search.history) - len(full), len(full) - len(finite)
    set_title(
        figure,
        f"Search of {run.title} ({run.setting.method}): {search.evaluations:,} candidates"
        + (f", {parts:,} of them scored on a part of the validation split only and left out" if parts else "")
        + (f", {infinite:,} without a finite score left out" if infinite else ""),
    )
    return figure


def _unit(metric: str | None) -> tuple[float, str]:
    """The factor for scores, and the label of the axis."""
    units = {"accuracy": (100.0, "validation accuracy, %"), "loss": (-1.0, "validation loss")}
    return units.get(metric or "", (1.0, "validation score"))


def _draw_progress(axes: Any, scored: Sequence[Evaluated], scale: float) -> None:
    import numpy as np

    scores = defaultdict(list)
    for each in scored:
        scores[each.generation].append(each.score)
    generations = sorted(scores)
    low, lower, middle, upper, high = np.array(
        [np.percentile(scores[generation], (0, 25, 50, 75, 100)) for generation in generations]
    ).T
    best = np.maximum.accumulate(high)
    low, lower, middle, upper, high, best = (scale * values for values in (low, lower, middle, upper, high, best))
    axes.fill_between(generations, low, high, color=_MEDIAN, alpha=0.15, label="worst to best of a generation")
    axes.fill_between(generations, lower, upper, color=_MEDIAN, alpha=0.35, label="quartiles")
    axes.plot(generations, middle, color=_MEDIAN, marker="o", markersize=4, label="median")
    axes.plot(generations, best, color=_BEST, marker="s", markersize=4, label="best so far")
    axes.set_xlabel("generation")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    _legend(axes)


def _draw_trade(axes: Any, scored: Sequence[Evaluated], search: Search, scale: float) -> None:
    shown = [scale * each.score for each in scored]
    axes.scatter([e.parameters for e in scored], shown, s=12, color="#999999", label="candidates")
    best = front(scored)
    axes.step(
        [e.parameters for e in best],
        [scale * e.score for e in best],
        where="post",
        color=_FRONT,
        marker="o",
        markersize=5,
        label="front: none is smaller and as good",
    )
    axes.plot(
        search.best.parameters, scale * search.best.score, "*", color=_BEST, markersize=16, label="chosen", zorder=3
    )
    if search.limit is not None:
        axes.axvline(search.limit, color=_LIMIT, linestyle="--", label=f"limit: {search.limit:,}")
    axes.set_xlabel("parameters")
    axes.xaxis.set_major_formatter(thousands)
    axes.grid(alpha=0.3)
    _legend(axes)


def _legend(axes: Any) -> None:
    """Put the legend below the axes, where it covers nothing."""
    axes.legend(fontsize=9, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.14), frameon=False)
