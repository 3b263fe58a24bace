"""Sentences below tables: the data and packages of our runs, and where published numbers are from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from .conditions import weights
from .published import Published
from .runs import Run


def our_notes(runs: Iterable[Run]) -> list[str]:
    """The data and dates of our accuracies, how many runs have any, and which columns have random weights."""
    found = list(runs)
    random = list(dict.fromkeys(run.setting.method for run in found if run.spec.weights is None))
    about = [f"Weights: none, the backbone was randomly initialised ({'; '.join(random)})."] if random else []
    return [_split_note(found), *_refit_notes(found), *about]


def _refit_notes(found: Sequence[Run]) -> list[str]:
    if not any(run.refit for run in found):
        return []
    return [
        "Refit: the searched path was trained some steps more on the data that are named, from the weights that it "
        "inherits; the paper goes without. Such columns compare with no published number, and count as runs here."
    ]


def _split_note(found: Sequence[Run]) -> str:
    dates = sorted(run.test.date for run in found if run.test)
    if not dates:
        return "No run was tested yet."
    when = f"on {dates[0]}" if dates[0] == dates[-1] else f"between {dates[0]} and {dates[-1]}"
    return (
        f"Ours: accuracy on the test split, which was read {when} (`test.json` of {len(dates)} of {len(found)} runs). "
        "Searches saw the validation split alone. Cells of several seeds: mean ± sample standard deviation."
    )


def origin_notes(runs: Sequence[Run]) -> list[str]:
    """The backbone's weights, and the packages that trained it, each with its number of runs."""
    runs = [run for run in runs if not run.refit]
    origins = Counter("none, randomly initialised" if run.spec.weights is None else weights(run) for run in runs)
    versions = Counter(", ".join(f"{name} {version}" for name, version in run.versions.items()) for run in runs)
    return [f"Weights: {_counted(origins)}.", f"Versions: {_counted(versions)}."]


def _counted(found: Counter[str]) -> str:
    return "; ".join(
        f"{name or 'not recorded'} ({count} run{'s' if count > 1 else ''})" for name, count in found.items()
    )


def published_notes(known: Sequence[Published]) -> list[str]:
    """One sentence per source."""
    sources = list(dict.fromkeys(each.source for each in known))
    return [
        f"Published, not measured here: {', '.join(each.method for each in known if each.source == source)} ({source})."
        for source in sources
    ]
