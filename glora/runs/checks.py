"""What runs need that is not there: all of it, before any work."""

from __future__ import annotations

from collections.abc import Sequence

from ..backbones import check_backbone
from ..protocols import describe_missing
from .spec import RunSpec


def check_runs(specs: Sequence[RunSpec]) -> list[str]:
    """Everything that is missing or malformed, a paragraph each, with what to do about it; empty if nothing is.

    Of the data, every list and every image file that a list names, of the test split too; no image is opened. Of the
    model, whether timm knows it and the file of its weights is there. ``specs`` are those of one :func:`plan_runs`.
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
    except (TypeError, ValueError, FileNotFoundError) as error:
        problems.append(str(error))
    return problems
