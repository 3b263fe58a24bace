"""The figures of a study as text."""

from __future__ import annotations

from typing import Any

from .domains import domain_of
from .methods import REFIT, SEARCHED

_HEADER = ("method", "parameters", "test accuracy", "generalisation", "s per run", "GLoRA minus it")


def format_study(study: dict[str, Any]) -> str:
    """Tables, the proof of the merge and what may be concluded, as printed by ``glora quickstart``."""
    domain, pre = domain_of(study["settings"]["tasks"]), study["pretraining"]
    reached = (
        "" if pre["accuracy"] is None else f", {pre['accuracy']:.1%} on {domain.samples} like those it has not seen"
    )
    lines = [
        f"Backbone: {domain.model}, {pre['parameters']:,} parameters{reached}.",
        *(f"Used: {origin}." for origin in domain.origins),
        "",
    ]
    for summary in study["summary"]:
        lines += [*_format_summary(summary, domain.samples), ""]
    lines += [*_conclusions(study), f"Took {study['seconds']:.0f} s."]
    return "\n".join(lines)


def _format_summary(summary: dict[str, Any], samples: str) -> list[str]:
    seeds = summary["rows"][0]["seeds"]
    title = f"Task {summary['task']}, {summary['shots']} {samples} a class, {seeds} seed{'s' if seeds > 1 else ''}"
    table = [_HEADER, *(_cells(row) for row in summary["rows"])]
    widths = [max(len(line[column]) for line in table) for column in range(len(_HEADER))]
    rule = "  ".join("-" * width for width in widths)
    body = [_line(line, widths) for line in table]
    return [title, body[0], rule, *body[1:], "", *_format_merge(summary["merge"])]


def _line(cells: tuple[str, ...], widths: list[int]) -> str:
    numbers = (cell.rjust(width) for cell, width in zip(cells[1:], widths[1:]))
    return "  ".join([cells[0].ljust(widths[0]), *numbers])


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    spread = "" if row["test_std"] is None else f" ± {100 * row['test_std']:.1f}"
    own = row["method"] in (SEARCHED, REFIT)
    difference = "" if own else f"{100 * row['glora_minus']:+.1f} ({row['glora_wins']}/{row['seeds']})"
    return (
        row["method"],
        "0 (+ head)" if not row["parameters"] else f"{row['parameters']:,.0f}",
        f"{100 * row['test']:.1f}{spread}",
        "" if row["generalisation"] is None else f"{100 * row['generalisation']:.1f}",
        f"{row['seconds']:.1f}",
        difference,
    )


def _format_merge(proof: dict[str, Any]) -> list[str]:
    same = "the same" if proof["same_parameters"] and proof["same_modules"] else "NOT the same"
    return [
        f"Merged: {same} parameter names, shapes and module types as the backbone "
        f"({proof['parameter_count']:,} parameters with head);",
        f"largest output difference {proof['largest_output_difference']:.1e}, largest layer error against fp64 "
        f"{proof['largest_layer_error']:.1e}, predictions agree {proof['agreement']:.1%}.",
    ]


def _conclusions(study: dict[str, Any]) -> list[str]:
    """The conclusions from this run's figures: the sign of a mean proves nothing, so seeds are counted."""
    lines = [
        "What this run shows (accuracy of GLoRA minus the other's, wins by seed; of the searched path, or, where",
        "the other was trained on the validation samples too, of the one that was refit on both):",
    ]
    for method in (row["method"] for row in study["summary"][0]["rows"] if row["method"] not in (SEARCHED, REFIT)):
        rows = [row for summary in study["summary"] for row in summary["rows"] if row["method"] == method]
        mean = sum(row["glora_minus"] * row["seeds"] for row in rows) / sum(row["seeds"] for row in rows)
        wins, seeds = sum(row["glora_wins"] for row in rows), sum(row["seeds"] for row in rows)
        lines.append(f"  {method:<54} {100 * mean:+5.1f} points, ahead in {wins} of {seeds}")
    lines += ["This is a small demonstration: the paper's gain over LoRA is claimed for VTAB-1K, not shown here."]
    return lines
