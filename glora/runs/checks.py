"""What runs need that is not there: all of it, before any work."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..protocols import describe_missing
from .spec import RunSpec


def check_runs(specs: Sequence[RunSpec]) -> list[str]:
    """Everything that is missing or malformed, a paragraph each, with what to do about it; empty if nothing is.

    Of the data, every list and every image file that a list names, of the test split too; no image is opened. Of the
    weights, whether the file is there. ``specs`` are those of one :func:`plan_runs`.
    """
    first = specs[0]
    missing = first.protocol.check(
        first.data,
        list(dict.fromkeys(spec.dataset for spec in specs)),
        list(dict.fromkeys(spec.shots for spec in specs)),
        list(dict.fromkeys(spec.seed for spec in specs)) if first.protocol.seeds else None,
    )
    problems = describe_missing(missing).split("\n\n") if missing else []
    if first.weights not in (None, "hub") and not Path(first.weights).is_file():
        problems.append(
            f"weights: {first.weights}: no such file\n  ViT-B/16 of ImageNet-21k: download "
            "https://storage.googleapis.com/vit_models/imagenet21k/ViT-B_16.npz, or give 'hub' for timm's own"
        )
    return problems
