"""What a call has found, in a few lines."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .running import PASSED, Outcome, line_of


def summary(outcomes: Sequence[Outcome], out: Path) -> str:
    lines = ["", "parts:"]
    for outcome in outcomes:
        lines += [line_of(outcome), *(f"    {told}" for told in outcome.told)]
    bad = [outcome.part for outcome in outcomes if outcome.status != PASSED]
    lines.append(f"{len(outcomes) - len(bad)} passed, {len(bad)} failed" + (f": {', '.join(bad)}" if bad else ""))
    return "\n".join(lines)
