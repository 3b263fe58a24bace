"""Figure 5: features of test images of the frozen and of the adapted model, in two dimensions by t-SNE."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..drawing import COLOURS, MARKERS, NotDrawn, new_figure, set_title
from ..runs import Run

CLASSES, IMAGES = 10, 100
_FEWEST = 8


class Features(NamedTuple):
    """``frozen`` and ``adapted`` (n, d), ``labels`` (n,), of the same n test images."""

    frozen: np.ndarray
    adapted: np.ndarray
    labels: np.ndarray


def read_features(file: Path) -> Features:
    """Raises ValueError, naming the file, for anything but features and labels of the same images."""
    try:
        with open(file, "rb") as stream:
            arrays = np.load(stream, allow_pickle=False)
            found = Features(*(arrays[name] for name in Features._fields))
    except (OSError, ValueError, KeyError, IndexError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{file}: expected frozen, adapted and labels in a .npz ({error})") from None
    count = len(found.labels) if found.labels.ndim == 1 else -1
    if any(each.ndim != 2 or len(each) != count for each in found[:2]):
        raise ValueError(f"{file}: expected (n, d), (n, d) and (n,), got {[each.shape for each in found]}")
    return found


def choose_classes(labels: np.ndarray, most: int = CLASSES) -> list[int]:
    """The ``most`` classes with the most images, ascending; of classes with equally many, the smaller label."""
    classes, counts = np.unique(labels, return_counts=True)
    return sorted(classes[np.lexsort((classes, -counts))[:most]].tolist())


def choose_images(labels: np.ndarray, classes: list[int], most: int = IMAGES) -> np.ndarray:
    """Indices of the first ``most`` images of each class, ascending."""
    return np.sort(np.concatenate([np.flatnonzero(labels == label)[:most] for label in classes]))


def features_figure(run: Run) -> Any | NotDrawn | None:
    """Both models side by side; None without features, NotDrawn if t-SNE cannot place them."""
    if run.features is None:
        return None
    features = read_features(run.features)
    if len(features.labels) < _FEWEST:
        return NotDrawn(f"t-SNE needs {_FEWEST} test images, there are {len(features.labels)}")
    chosen = choose_classes(features.labels)
    shown = choose_images(features.labels, chosen)
    panels = {"frozen backbone": features.frozen[shown], "adapted": features.adapted[shown]}
    problems = [f"features of the {title} model {why}" for title, points in panels.items() if (why := _unfit(points))]
    if problems:
        return NotDrawn("; ".join(problems))
    figure = new_figure(11, 5.4)
    for axes, (title, points) in zip(figure.subplots(1, 2), panels.items()):
        _draw(axes, embed(points), features.labels[shown], chosen)
        axes.set_title(title, fontsize=10)
    handles, names = axes.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=5, frameon=False)
    which = f"{len(shown):,} test images, the first {IMAGES} at most of each of {len(chosen)} classes"
    of = len(np.unique(features.labels))
    more = f" (those with most of {of})" if len(chosen) < of else ""
    set_title(figure, f"t-SNE of features of {run.title}: {which}{more}")
    return figure


def _unfit(points: np.ndarray) -> str:
    """Why t-SNE, which starts from principal components, cannot place ``points``; empty if it can."""
    if points.shape[1] < 2:
        return f"have {points.shape[1]} of at least 2 dimensions"
    if not np.isfinite(points).all():
        return "are not all finite"
    return "are all equal: the model is collapsed" if (points == points[0]).all() else ""


def embed(points: np.ndarray) -> np.ndarray:
    """(n, d) to (n, 2), always the same for the same points.

    t-SNE uses relative distances in single precision, so the points are scaled to a largest offset of 1 first.
    """
    from sklearn.manifold import TSNE

    offsets = points.astype(np.float64) - points[0]
    perplexity = min(30.0, (len(points) - 1) / 3)
    embedding = TSNE(2, perplexity=perplexity, init="pca", random_state=0)
    return embedding.fit_transform(offsets / np.abs(offsets).max())


def _draw(axes: Any, points: np.ndarray, labels: np.ndarray, classes: list[int]) -> None:
    for index, label in enumerate(classes):
        x, y = points[labels == label].T
        colour, marker = COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)]
        axes.scatter(x, y, s=20, color=colour, marker=marker, linewidths=0, alpha=0.8, label=f"class {label}")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_xlabel("t-SNE 1 (no unit)")
    axes.set_ylabel("t-SNE 2 (no unit)")
