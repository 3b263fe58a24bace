"""The test of a run: the one place where the test split is read, once for each winner."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset

from ..backbones import features
from ..evaluation import evaluate
from ..files import write_atomically
from ..protocols import AmongClasses
from .folder import FEATURES, TESTED, RunFolder, read_json, write_json
from .models import make_backbone
from .samples import loading_processes, open_splits, ready
from .stages import now

FEATURE_IMAGES = 2000


def evaluate_run(run: RunFolder, model: nn.Module, device: torch.device, progress: bool = True) -> dict[str, Any]:
    """Test a run's merged ``model`` on the test split and the protocol's targets; return the content of ``test.json``.

    The split is read once: a second call returns the first one's figures. Features before the head, of the merged and
    of the frozen model, go into ``features.npz`` for up to 2,000 images drawn with a fixed seed, and for no texts.

    Raises:
        ValueError: the split has been read for another winner of this run.
    """
    winner = run.winner
    if run.has(TESTED):
        tested = read_json(run / TESTED)
        if tested.get("winner") != winner:
            raise ValueError(
                f"{run / TESTED}: the test split has been read for another winner of this run; "
                f"`glora {'refit' if run.is_refit else 'search'} --again` puts that one's files aside"
            )
        return tested
    splits, workers = open_splits(run.spec), loading_processes(run.spec)
    test = ready(splits.test(), run.spec)
    metrics = evaluate(model, test, workers=workers, progress=progress)
    targets = {}
    for name, target in splits.targets.items():
        chooser = model if target.classes is None else AmongClasses(model, target.classes)
        targets[name] = evaluate(chooser, ready(target(), run.spec), workers=workers, progress=progress)._asdict()
    if run.spec.recipe.images:
        _save_features(run, model, make_backbone(run.spec).to(device), test)
    tested = {**run.marks, "split": "test", **metrics._asdict(), "targets": targets, "winner": winner, "date": now()}
    write_json(run / TESTED, tested)
    return tested


def _save_features(run: RunFolder, adapted: nn.Module, frozen: nn.Module, test: Dataset) -> None:
    size: int = len(test)  # type: ignore[arg-type]
    chosen = torch.randperm(size, generator=torch.Generator().manual_seed(0))[:FEATURE_IMAGES].tolist()
    images = Subset(test, chosen)
    ours, original, labels = _features((adapted, frozen), images)
    write_atomically(run / FEATURES, lambda stream: np.savez(stream, adapted=ours, frozen=original, labels=labels))


@torch.no_grad()
def _features(models: Sequence[nn.Module], images: Dataset) -> list[np.ndarray]:
    """The features (n, d) of each model, and the classes (n,)."""
    device = next(models[0].parameters()).device
    rows = []
    for x, target in DataLoader(images, 64, generator=torch.Generator()):
        rows.append([*(features(model.eval(), x.to(device)).float().cpu() for model in models), target])
    return [torch.cat(column).numpy() for column in zip(*rows)]
