"""Figure 4: the kinds that the path of a run chooses in every layer."""

from __future__ import annotations

from typing import Any

from ..drawing import new_figure, set_title
from ..runs import Run
from .path_map import add_kind_legend, draw_paths

_LONGEST = 60


def path_figure(run: Run) -> Any | None:
    """The heat map of the chosen path, in panels of at most 60 layers; None without a path."""
    if not run.paths or run.parameters is None:
        return None
    names = list(run.paths)
    count = -(-len(names) // _LONGEST)
    rows = -(-len(names) // count)
    figure = new_figure(4.4 * count + 0.6, 1.6 + 0.21 * rows)
    for index, axes in enumerate(figure.subplots(1, count, squeeze=False)[0]):
        draw_paths(axes, {name: run.paths[name] for name in names[index * rows : (index + 1) * rows]})
        axes.xaxis.tick_top()
        axes.tick_params(axis="y", labelsize=8)
    add_kind_legend(figure, columns=2 * count)
    set_title(
        figure, f"Path of {run.title}\n{run.setting.method}: {run.parameters:,} parameters in {len(names)} layers"
    )
    return figure
