"""Figure 5: features of test images in two dimensions by t-SNE, of the frozen and of the adapted model."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .drawing import COLOURS, MARKERS, new_figure
from .runs import Run

CLASSES, IMAGES = 10, 100
_FEWEST = 8


class Features(NamedTuple):
    """``frozen`` and ``adapted`` (n, d), ``labels`` (n,), of the same n test images."""

    frozen: np.ndarray
    adapted: np.ndarray
    labels: np.ndarray


def read_features(file: Path) -> Features:
    """Raises ValueError, naming the file, for anything but finite features and labels of the same images."""
    try:
        with open(file, "rb") as stream:
            arrays = np.load(stream, allow_pickle=False)
            found = Features(*(arrays[name] for name in Features._fields))
    except (OSError, ValueError, KeyError, IndexError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{file}: expected frozen, adapted and labels in a .npz ({error})") from None
    count = len(found.labels) if found.labels.ndim == 1 else -1
    if any(each.ndim != 2 or len(each) != count for each in found[:2]):
        raise ValueError(f"{file}: expected (n, d), (n, d) and (n,), got {[each.shape for each in found]}")
    if not all(np.isfinite(each).all() for each in found[:2]):
        raise ValueError(f"{file}: expected finite features, got others")
    return found


def choose_classes(labels: np.ndarray, most: int = CLASSES) -> list[int]:
    """The ``most`` classes with most images, ascending; of equals the smaller label."""
    classes, counts = np.unique(labels, return_counts=True)
    return sorted(classes[np.lexsort((classes, -counts))[:most]].tolist())


def choose_images(labels: np.ndarray, classes: list[int], most: int = IMAGES) -> np.ndarray:
    """Indices of the first ``most`` images of each class, ascending."""
    return np.sort(np.concatenate([np.flatnonzero(labels == label)[:most] for label in classes]))


def features_figure(run: Run) -> Any | None:
    """Both models side by side; None without features, or with too few images for t-SNE."""
    if run.features is None:
        return None
    features = read_features(run.features)
    chosen = choose_classes(features.labels)
    shown = choose_images(features.labels, chosen)
    if len(shown) < _FEWEST:
        return None
    figure = new_figure(11, 5.4)
    panels = {"frozen backbone": features.frozen, "adapted": features.adapted}
    for axes, (title, points) in zip(figure.subplots(1, 2), panels.items()):
        _draw(axes, embed(points[shown]), features.labels[shown], chosen)
        axes.set_title(title, fontsize=10)
    handles, names = axes.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=5, frameon=False)
    which = f"{len(shown):,} test images, the first {IMAGES} at most of each of {len(chosen)} classes"
    of = len(np.unique(features.labels))
    more = f" (those with most of {of})" if len(chosen) < of else ""
    figure.suptitle(f"t-SNE of features of {run.title}: {which}{more}", fontsize=11)
    return figure


def embed(points: np.ndarray) -> np.ndarray:
    """(n, d) to (n, 2), the same for the same points."""
    from sklearn.manifold import TSNE

    perplexity = min(30.0, (len(points) - 1) / 3)
    return TSNE(2, perplexity=perplexity, init="pca", random_state=0).fit_transform(np.ascontiguousarray(points))


def _draw(axes: Any, points: np.ndarray, labels: np.ndarray, classes: list[int]) -> None:
    for index, label in enumerate(classes):
        x, y = points[labels == label].T
        colour, marker = COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)]
        axes.scatter(x, y, s=20, color=colour, marker=marker, linewidths=0, alpha=0.8, label=f"class {label}")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_xlabel("t-SNE 1 (no unit)")
    axes.set_ylabel("t-SNE 2 (no unit)")
