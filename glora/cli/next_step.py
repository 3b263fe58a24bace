"""What to type after a command."""

from __future__ import annotations

import shlex
from pathlib import Path


def next_step(command: str, folder: Path, *options: str) -> str:
    """The line that a command ends with, for people."""
    return f"\nNext: glora {shlex.join([command, str(folder), *options])}"
