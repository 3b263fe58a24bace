"""Where programs of their own leave what they measured: data for machines, and a table for people."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

FIGURES, TABLE = "figures.json", "table.md"


def write_figures(folder: Path | None, content: dict[str, Any], table: str) -> None:
    """Write both into ``folder``, which is made if it is not there; nothing for None."""
    if folder is None:
        return
    folder.mkdir(parents=True, exist_ok=True)
    (folder / FIGURES).write_text(json.dumps(content, indent=1) + "\n")
    (folder / TABLE).write_text(table)


def versions(where: dict[str, Any], packages: Iterable[str]) -> str:
    """The versions of ``packages`` in an :func:`.environment.environment`, as text."""
    return ", ".join(f"{package} {where['versions'][package]}" for package in packages)
