"""``python -m tests.coverage_loss SHORT EXHAUSTIVE``: the lines that the short tier does not run, as Markdown.

Both are JSON of ``python -m tests.run TIER --coverage FILE``. Exit status 1 if a file loses more than a percentage
point of its lines.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

MOST = 1.0  # percentage points


class Loss(NamedTuple):
    """The lines of a file that the exhaustive tier runs and the short one does not, and their share of all lines."""

    file: str
    lines: list[int]
    points: float


def losses(short: dict, exhaustive: dict) -> list[Loss]:
    """The losses of files that have any, largest first. A file that the short tier never imports loses all lines."""
    found = []
    for file, entry in exhaustive["files"].items():
        run = set(short["files"].get(file, {}).get("executed_lines", ()))
        lines = sorted(set(entry["executed_lines"]) - run)
        if lines:
            found.append(Loss(file, lines, 100 * len(lines) / max(entry["summary"]["num_statements"], 1)))
    return sorted(found, key=lambda loss: (-loss.points, loss.file))


def share(report: dict) -> str:
    return f"{report['totals']['percent_covered']:.2f}%"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.coverage_loss", description="Compare the tiers' coverage.")
    parser.add_argument("short", type=Path)
    parser.add_argument("exhaustive", type=Path)
    options = parser.parse_args(arguments)
    short, exhaustive = (json.loads(file.read_text()) for file in (options.short, options.exhaustive))
    found = losses(short, exhaustive)
    print(f"Lines run: {share(short)} in the short tier, {share(exhaustive)} in the exhaustive one.\n")
    print("| file | points lost | lines |\n|---|---|---|")
    for file, lines, points in found:
        print(f"| `{file}` | {points:.2f} | {', '.join(map(str, lines))} |")
    return int(any(loss.points > MOST for loss in found))


if __name__ == "__main__":
    sys.exit(main())
