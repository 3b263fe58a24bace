"""One table, as markdown for people and as CSV (one line per number) for programs."""

from __future__ import annotations

import csv
import io
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from ..runs import Run
from ..seeds import Combine, OverSeeds, Value, combined, over_seeds, test_accuracy

OURS = "this study"
PER_CENT, PARAMETERS = "%", "parameters"
_CSV_HEADER = ("method", "source", "row", "value", "unit", "standard deviation", "seeds", "note")


@dataclass(frozen=True)
class Entry:
    """One cell.

    Attributes:
        method, source: its column, ours or a published one.
        value: None if there is none; ``note`` then says why.
        seeds: how many seeds ``value`` is the mean of; None for published numbers.
        part: for a mean over data sets that were not all run: how many were run, and how many there are.
    """

    method: str
    source: str
    row: str
    value: float | None
    unit: str = PER_CENT
    deviation: float | None = None
    seeds: int | None = None
    part: tuple[int, int] | None = None
    note: str = ""

    @property
    def remark(self) -> str:
        """``part`` and ``note`` in words."""
        part = f"{self.part[0]} of {self.part[1]} run" if self.part else ""
        return "; ".join(filter(None, (part, self.note)))

    @property
    def text(self) -> str:
        """The rounded value for markdown."""
        if self.value is None:
            return self.remark
        scaled = f"{self.value / 1e6:.3f}M" if self.unit == PARAMETERS else f"{self.value:.1f}"
        spread = "" if self.deviation is None or self.unit == PARAMETERS else f" ± {self.deviation:.1f}"
        seeds = f" ({self.seeds} seed{'s' if self.seeds > 1 else ''})" if self.seeds and self.unit == PER_CENT else ""
        return f"{scaled}{spread}{seeds}" + (f", {self.remark}" if self.remark else "")


def our_entry(
    method: str, row: str, found: OverSeeds | None, part: tuple[int, int] | None = None, absent: str = "not run"
) -> Entry:
    """A cell of our own accuracies, or ``absent`` if nothing was found."""
    if found is None:
        return Entry(method, OURS, row, None, note=absent)
    return Entry(method, OURS, row, found.mean, PER_CENT, found.deviation, len(found.values), part)


def run_entry(method: str, row: str, runs: Collection[Run], value: Value = test_accuracy) -> Entry:
    """The cell of some runs that differ only in their seed."""
    return our_entry(method, row, over_seeds(runs, value), absent="not tested" if runs else "not run")


def mean(values: Mapping[str, float]) -> float:
    return fmean(values.values())


def mean_entry(method: str, row: str, found: Mapping[str, OverSeeds], of: int, combine: Combine = mean) -> Entry:
    """The mean cell. If all have the same seeds: ``combine`` per seed, then average. Else: ``combine`` the means."""
    if not found:
        return our_entry(method, row, None)
    part = (len(found), of) if len(found) < of else None
    by_seed = combined(found, combine)
    if by_seed is not None:
        return our_entry(method, row, by_seed, part)
    value = combine({name: each.mean for name, each in found.items()})
    return Entry(method, OURS, row, value, part=part, note="seeds differ")


@dataclass(frozen=True)
class Table:
    """Entries, pivoted: ``rows`` down, in this order; methods across, in the order of the entries.

    Attributes:
        stem: the name of its files, without ending.
        notes: sentences that a reader of the table has to know.
    """

    stem: str
    title: str
    corner: str
    rows: Sequence[str]
    entries: Sequence[Entry]
    notes: Sequence[str]

    def to_markdown(self) -> str:
        """Heading, table and notes."""
        columns = list(dict.fromkeys((entry.method, entry.source) for entry in self.entries))
        cells = {(entry.row, entry.method, entry.source): entry.text for entry in self.entries}
        body = [[row, *(cells.get((row, *column), "-") for column in columns)] for row in self.rows]
        lines = markdown_table([self.corner, *(_heading(*column) for column in columns)], body)
        return "\n".join([f"### {self.title}", "", *lines, "", *(f"- {note}" for note in self.notes), ""])

    def to_csv(self) -> str:
        """One line per number, in full, with the source in its own column."""
        stream = io.StringIO()
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(_CSV_HEADER)
        for entry in self.entries:
            number = "" if entry.value is None else repr(entry.value)
            spread = "" if entry.deviation is None else repr(entry.deviation)
            count = "" if entry.seeds is None else entry.seeds
            row = entry.row.replace("*", "")  # emphasis
            writer.writerow((entry.method, entry.source, row, number, entry.unit, spread, count, entry.remark))
        return stream.getvalue()


def _heading(method: str, source: str) -> str:
    return method if source == OURS else f"*{method} (published)*"


def markdown_table(header: Sequence[str], body: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a table; the first column is text, the others are numbers."""
    rule = ["---", *(["---:"] * (len(header) - 1))]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in [header, rule, *body]]
