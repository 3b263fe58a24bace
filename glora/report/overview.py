"""One line per run: its size, accuracy and time, and what is still missing."""

from __future__ import annotations

from collections.abc import Sequence

from ..evolution.texts import describe_score
from .notes import origin_notes
from .runs import Run
from .seeds import test_accuracy
from .tables.table import markdown_table

_HEADER = (
    "run",
    "method",
    "parameters",
    "limit",
    "validation",
    "test accuracy",
    "training, h",
    "search, h",
    "evaluations",
    "merge error",
    "remarks",
)


def overview_rows(runs: Sequence[Run]) -> list[list[str]]:
    """The cells as text; a dash stands for no value."""
    return [_row(run) for run in runs]


def _row(run: Run) -> list[str]:
    search = None if run.refit else run.search  # in the row of the run itself
    accuracy = test_accuracy(run)
    hours = run.training.seconds / 3600 if run.training else None
    return [
        run.name,
        run.setting.method,
        _or_dash(run.parameters, "{:,}"),
        _or_dash(run.limit, "{:,}"),
        "-" if search is None else describe_score(search.metric, search.best.score),
        _or_dash(accuracy, "{:.2f}%"),
        _or_dash(hours, "{:.2f}"),
        _or_dash(search.hours if search else None, "{:.2f}"),
        _or_dash(search.evaluations if search else None, "{:,}"),
        _or_dash(run.merged.largest_error if run.merged else None, "{:.1e}"),
        "; ".join(run.remarks),
    ]


def _or_dash(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def overview_markdown(runs: Sequence[Run]) -> list[str]:
    """The table, and what the runs were made from."""
    notes = [f"- {note}" for note in [*origin_notes(runs), *_explanations(runs)]]
    return [*markdown_table(_HEADER, overview_rows(runs)), "", *notes]


def _explanations(runs: Sequence[Run]) -> list[str]:
    merged = any(run.merged and run.merged.largest_error is not None for run in runs)
    return ["Merge error: the largest of a merged layer's output against the formula in fp64."] if merged else []


def overview_text(runs: Sequence[Run]) -> str:
    """The table for a terminal, with aligned columns."""
    lines = [list(_HEADER), *overview_rows(runs)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(_HEADER))]
    left = {0, 1, len(_HEADER) - 1}
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column in left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths))
        ).rstrip()
        for line in lines
    )
