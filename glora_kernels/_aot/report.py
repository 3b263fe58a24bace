"""The results as a table for people and as JSON for programs."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import NamedTuple

import triton

from .reading import Reading

_HEAD = ("target", "label", "regs", "stack", "spills", "shared", "matrix", "verdict")
_NUMBERS = frozenset({"regs", "stack", "spills", "shared"})


class Row(NamedTuple):
    target: str
    label: str
    reading: Reading | None  # None: there is no kernel
    failures: list[str]


def table(rows: Sequence[Row]) -> str:
    """Aligned columns: words to the left, numbers to the right."""
    lines = [_HEAD, *map(_cells, rows)]
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join(_line(cells, widths) for cells in lines)


def complaints(rows: Sequence[Row]) -> list[str]:
    """One line for every failure of every row."""
    return [f"FAILED {row.target} {row.label}: {failure}" for row in rows for failure in row.failures]


def summary(rows: Sequence[Row]) -> str:
    failed = sum(bool(row.failures) for row in rows)
    targets = len({row.target for row in rows})
    counts = f"{len(rows) - failed} pass, {failed} fail"
    return f"{len(rows)} builds for {targets} targets, Triton {triton.__version__}: {counts}"


def write_json(rows: Sequence[Row], file: str | os.PathLike[str]) -> None:
    """``{"triton", "date", "rows": [{"target", "label", "failures", "reading"}]}``; reading may be null."""
    result = {
        "triton": triton.__version__,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "rows": [row._asdict() | {"reading": row.reading and row.reading._asdict()} for row in rows],
    }
    Path(file).write_text(json.dumps(result, indent=1) + "\n")


def _cells(row: Row) -> tuple[str, ...]:
    verdict = "FAILED" if row.failures else "ok"
    shown = ("-",) * 5
    if row.reading is not None:
        registers, stack, spills, shared, _, matrix, *_ = row.reading
        instructions = ", ".join(f"{count} {name}" for name, count in matrix.items())
        shown = (str(registers), str(stack), str(sum(spills.values())), str(shared), instructions or "-")
    return (row.target, row.label, *shown, verdict)


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    padded = (
        cell.rjust(width) if name in _NUMBERS else cell.ljust(width) for name, cell, width in zip(_HEAD, cells, widths)
    )
    return "  ".join(padded).rstrip()
