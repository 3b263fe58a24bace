"""The numbers that others published, as data (``published.json``), for the columns beside our own."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any


@dataclass(frozen=True)
class Published:
    """One method's published numbers.

    Attributes:
        accuracy: in per cent. VTAB-1K: ``average`` and groups; ImageNet: ``imagenet`` and targets; few-shot: by data
            set, then by shots as text. Numbers that were not found are absent.
        backbones: names of the timm architectures for which it holds.
        source: paper and table, or the page.
    """

    method: str
    parameters: int | None
    backbones: tuple[str, ...]
    source: str
    accuracy: Mapping[str, Any]


def published(protocol: str, backbone: str) -> list[Published]:
    """The published numbers for a protocol and a timm model; the tag of a name (``.augreg_in21k``) is ignored."""
    architecture = backbone.partition(".")[0]
    return [each for each in _all().get(protocol, ()) if architecture in each.backbones]


@cache
def _all() -> dict[str, tuple[Published, ...]]:
    content = json.loads((files(__package__) / "published.json").read_text(encoding="utf-8"))
    protocols = {name: rows for name, rows in content.items() if name != "about"}
    return {
        name: tuple(Published(**{**row, "backbones": tuple(row["backbones"])}) for row in rows)
        for name, rows in protocols.items()
    }
