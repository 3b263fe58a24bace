"""Everything that runs need and that is missing, found before any work."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from ..backbones import check_backbone
from ..protocols import describe_missing
from .models import make_model
from .spec import RunSpec
from .text_models import require_length


def check_runs(specs: Sequence[RunSpec]) -> list[str]:
    """Everything that is missing or malformed, one paragraph each, with what to do about it; empty if nothing is.

    Checked are the data: every list and every image file that a list names, of the test split too; no image is opened.
    Checked is the model: whether timm knows it, its weights' file exists, and a model with random weights can be
    adapted and takes images of the recipe's size, or as many tokens. ``specs`` are those of one :func:`plan_runs`. Own
    data were looked at when their split was made (:func:`glora.protocols.split_images`), and are not again.
    """
    first = specs[0]
    problems = [] if first.own else _missing_data(specs)
    try:
        if first.recipe.texts:
            _try_text_model(first, first.recipe.texts.max_length)
        else:
            _try_image_model(first)
    except (TypeError, ValueError, FileNotFoundError) as error:
        problems.append(str(error))
    return problems


def _missing_data(specs: Sequence[RunSpec]) -> list[str]:
    first = specs[0]
    missing = first.protocol.check(
        first.data,
        list(dict.fromkeys(spec.dataset for spec in specs)),
        list(dict.fromkeys(spec.shots for spec in specs)),
        list(dict.fromkeys(spec.seed for spec in specs)) if first.protocol.seeds else None,
    )
    return describe_missing(missing).split("\n\n") if missing else []


def _try_image_model(spec: RunSpec) -> None:
    """Build the run's model, with its errors; raise ValueError if the model does not take the run's images."""
    settings, images = spec.recipe.model, spec.recipe.images
    assert images is not None  # RunRecipe
    check_backbone(
        settings.name,
        spec.protocol.classes(spec.dataset),
        weights=spec.weights,
        drop_path=settings.drop_path,
        options=settings.options,
    )
    model, size = make_model(replace(spec, weights=None)), images.size
    try:
        with torch.no_grad():
            model.eval()(torch.zeros(1, 3, size, size))
    except (AssertionError, RuntimeError, ValueError) as error:
        raise ValueError(f"images.size: expected a size that {settings.name} takes, got {size}: {error}") from None


def _try_text_model(spec: RunSpec, max_length: int) -> None:
    """Build the run's model without its numbers, from the config alone, with its errors."""
    if spec.recipe.model.drop_path:
        raise ValueError(f"drop_path: expected 0 for a model of texts, got {spec.recipe.model.drop_path}")
    with torch.device("meta"):
        require_length(make_model(replace(spec, weights=None)), spec.recipe.model.name, max_length)
