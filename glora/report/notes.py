"""Sentences below tables: which split was read and when, and where published numbers are from."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from .published import Published
from .runs import Run


def split_notes(runs: Iterable[Run]) -> list[str]:
    """What our own accuracies were measured on, when, and how many runs have some."""
    found = list(runs)
    dates = sorted(run.test.date for run in found if run.test)
    if not dates:
        return ["No run was tested yet."]
    when = f"on {dates[0]}" if dates[0] == dates[-1] else f"between {dates[0]} and {dates[-1]}"
    return [
        f"Ours: accuracy on the test split, which was read {when} (`test.json` of {len(dates)} of {len(found)} runs). "
        "Searches saw the validation split alone. Cells of several seeds: mean ± sample standard deviation."
    ]


def published_notes(known: Sequence[Published]) -> list[str]:
    """One sentence a source."""
    sources = list(dict.fromkeys(each.source for each in known))
    return [
        f"Published, not measured here: {', '.join(each.method for each in known if each.source == source)} ({source})."
        for source in sources
    ]
