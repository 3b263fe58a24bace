"""Writing files so that a reader sees the old one or the new one, never a part."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO


def write_atomically(file: str | os.PathLike, write: Callable[[BinaryIO], object]) -> None:
    """Call ``write`` with a temporary file beside ``file``, flush it to disk, then rename it over.

    Killed at any moment, or failing, it leaves the previous ``file`` as it was (and perhaps a file
    ``.<name>.tmp`` that the next call overwrites).
    """
    target = Path(file)
    temporary = target.with_name(f".{target.name}.tmp")
    try:
        with open(temporary, "wb") as stream:
            write(stream)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(target.parent)


def require_folder(argument: str, file: str | os.PathLike) -> None:
    """Raise ValueError, naming the argument, if the folder of ``file`` does not exist."""
    folder = Path(file).parent
    if not folder.is_dir():
        raise ValueError(f"{argument}: expected an existing folder, got {folder}")


def _sync_folder(folder: Path) -> None:
    """Make the rename itself durable, where the platform can."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:  # Windows cannot open a folder
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
