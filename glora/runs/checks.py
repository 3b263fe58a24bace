"""Everything that runs need and that is missing, found before any work."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from ..backbones import check_backbone
from ..protocols import describe_missing
from .models import make_model
from .spec import RunSpec


def check_runs(specs: Sequence[RunSpec]) -> list[str]:
    """Everything that is missing or malformed, one paragraph each, with what to do about it; empty if nothing is.

    Checked are the data: every list and every image file that a list names, of the test split too; no image is opened.
    Checked is the model: whether timm knows it, its weights' file exists, and a model with random weights can be
    adapted and takes images of the recipe's size. ``specs`` are those of one :func:`plan_runs`.
    """
    first = specs[0]
    missing = first.protocol.check(
        first.data,
        list(dict.fromkeys(spec.dataset for spec in specs)),
        list(dict.fromkeys(spec.shots for spec in specs)),
        list(dict.fromkeys(spec.seed for spec in specs)) if first.protocol.seeds else None,
    )
    problems = describe_missing(missing).split("\n\n") if missing else []
    model, classes = first.recipe.model, first.protocol.classes(first.dataset)
    try:
        check_backbone(model.name, classes, weights=first.weights, drop_path=model.drop_path, options=model.options)
        _try_model(first)
    except (TypeError, ValueError, FileNotFoundError) as error:
        problems.append(str(error))
    return problems


def _try_model(spec: RunSpec) -> None:
    """Build the run's model, with its errors; raise ValueError if the model does not take the run's images."""
    model, size = make_model(replace(spec, weights=None)), spec.recipe.images.size
    try:
        with torch.no_grad():
            model.eval()(torch.zeros(1, 3, size, size))
    except (AssertionError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"images.size: expected a size that {spec.recipe.model.name} takes, got {size}: {error}"
        ) from None
