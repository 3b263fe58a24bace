"""Refitting: the searched path is trained some steps more, from the weights that it inherits from the supernet."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import replace

from torch import nn
from torch.utils.data import DataLoader, Dataset

from .config import PathConfig
from .dataset import Collate
from .objective import Loss, Outputs
from .paths import get_paths, set_paths
from .processes import require_group, together
from .training.loop import TrainSummary, train
from .training.recipe import Recipe


def refit(
    model: nn.Module,
    paths: Mapping[str, PathConfig] | PathConfig,
    dataset: Dataset | DataLoader,
    recipe: Recipe,
    *,
    validation: Dataset | DataLoader | None = None,
    loss_fn: Loss | None = None,
    outputs: Outputs = None,
    collate: Collate | None = None,
    checkpoint: str | os.PathLike | None = None,
    log: str | os.PathLike | None = None,
    workers: int = 0,
    progress: bool = True,
    on_step: Callable[[int, float], object] | None = None,
    graphs: str = "auto",
) -> TrainSummary:
    """Set ``paths``, and train what they read from the values that ``model`` has: those that the supernet left.

    It is :func:`glora.set_paths`, then :func:`glora.train` without a space, to the same bits. Support tensors that the
    paths do not read stay as they are; the head, and whatever else requires grad, trains too. The paper does without:
    its winners keep the inherited weights. Afterwards the model has ``paths`` and is in training mode; whatever is
    raised, it has the paths of before.

    Args:
        paths: as for :func:`glora.set_paths`: usually the winner of a search, ``result.best.paths``.
        dataset: as for :func:`glora.train`. The search is over, so its validation samples may be among them.
        recipe: how to train: some hundred steps, at the learning rate of the supernet. Its ``balance`` is not read: the
            scales stay those of the supernet.
        validation, loss_fn, outputs, collate, checkpoint, log, workers, progress, on_step, graphs: as for
            :func:`glora.train`. The checkpoint of other paths is refused, and so is the supernet's own.

    Raises:
        ValueError, TypeError: paths that do not fit the model, as of :func:`glora.set_paths`; or as
            :func:`glora.train`.
        RuntimeError: as :func:`glora.set_paths`; another process failed.

    Example:
        >>> best = glora.search(model, space, validation_set).best
        >>> both = torch.utils.data.ConcatDataset([train_set, validation_set])
        >>> glora.refit(model, best.paths, both, glora.Recipe(steps=200, warmup=0.1))
    """
    require_group()
    before = together(lambda: get_paths(model))
    together(lambda: set_paths(model, paths))
    try:
        return train(
            model,
            dataset,
            replace(recipe, balance=None) if isinstance(recipe, Recipe) else recipe,
            validation=validation,
            loss_fn=loss_fn,
            outputs=outputs,
            collate=collate,
            checkpoint=checkpoint,
            log=log,
            workers=workers,
            progress=progress,
            on_step=on_step,
            graphs=graphs,
        )
    except BaseException:
        set_paths(model, before)
        raise
