"""Everything that is missing of some splits, and what to do about it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from .sources import Folders, Missing, Source


def find_missing(sources: Iterable[Source]) -> list[Missing]:
    """Everything on which reading ``sources`` and their images would fail; a data set without a folder is one entry."""
    missing: list[Missing] = []
    folders, absent = Folders(), set[Path]()
    for source in dict.fromkeys(sources):
        if source.home.is_dir():
            missing += source.missing(folders)
        elif source.home not in absent:
            absent.add(source.home)
            missing.append(source.lacks(source.home))
    return missing


def describe_missing(missing: Sequence[Missing]) -> str:
    """A text that says what is missing, where to get it and where to put it; empty if nothing is missing."""
    remedies: dict[str, list[Missing]] = {}
    for entry in missing:
        remedies.setdefault(entry.what_to_do, []).append(entry)
    paragraphs = []
    for what_to_do, entries in remedies.items():
        lines = [f"{entry.dataset}: {entry.file}: {entry.problem}" for entry in entries]
        paragraphs.append("\n".join([*lines, f"  {what_to_do}"]))
    return "\n\n".join(paragraphs)
