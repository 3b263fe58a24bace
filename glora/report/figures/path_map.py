"""The heat map of a path: layers down, support tensors A to E across, the colour is the kind, the number the rank."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...config import SLOTS, PathConfig

_KINDS = ("none", "constant", "vector", "lora")
_COLOURS = ("#f0f0f0", "#c6dbef", "#6baed6", "#08519c")


def draw_paths(axes: Any, paths: Mapping[str, PathConfig]) -> None:
    """Fill ``axes`` with one row per layer."""
    from matplotlib.colors import ListedColormap

    codes = [[_KINDS.index(path.choices[slot].kind) for slot in SLOTS] for path in paths.values()]
    axes.imshow(codes, cmap=ListedColormap(_COLOURS), vmin=0, vmax=len(_KINDS) - 1, aspect="auto")
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


def add_kind_legend(figure: Any, columns: int = len(_KINDS)) -> None:
    """Put the meaning of the colours below the figure."""
    from matplotlib.patches import Patch

    handles = [
        Patch(facecolor=colour, edgecolor="#888888", label="low rank (its rank)" if kind == "lora" else kind)
        for kind, colour in zip(_KINDS, _COLOURS)
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False)
