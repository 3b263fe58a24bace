"""Writing files so that a reader sees the old one or the new one, never a part."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from functools import partial
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


def write_folder_atomically(argument: str, folder: str | os.PathLike, files: Mapping[str, bytes]) -> None:
    """Make ``folder`` hold exactly ``files``: all of them or, whenever it is killed, what was there before.

    The new folder is written beside it and renamed. A former one, which may hold nothing but files of these
    names, is first renamed to ``.<name>.old``; where a run was killed between the two renames it stays there
    whole, and the next call puts it back before anything else.

    Raises:
        ValueError: there is no folder to put it in, or it holds something else, which would be lost.
    """
    target = Path(folder).resolve()
    old, new = target.with_name(f".{target.name}.old"), target.with_name(f".{target.name}.tmp")
    require_folder(argument, target)
    _put_back(old, target)
    if target.exists() and not target.is_dir():
        raise ValueError(f"{argument}: expected a folder, got the file {target}")
    others = sorted({file.name for file in target.iterdir()} - set(files)) if target.exists() else []
    if others:
        raise ValueError(
            f"{argument}: expected a new folder, or one with nothing but {sorted(files)}; {target} holds {others}"
        )
    try:
        _write_new_folder(new, files)
        shutil.rmtree(old, ignore_errors=True)
        if target.exists():
            os.replace(target, old)
        os.replace(new, target)
    except BaseException:
        _put_back(old, target)
        shutil.rmtree(new, ignore_errors=True)
        raise
    _sync_folder(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def _write_new_folder(folder: Path, files: Mapping[str, bytes]) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, content in files.items():
        write_atomically(folder / name, partial(_write, content))


def _write(content: bytes, stream: BinaryIO) -> None:
    stream.write(content)


def _put_back(old: Path, target: Path) -> None:
    """Undo the first of the two renames, where the second did not follow."""
    if old.exists() and not target.exists():
        os.replace(old, target)


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
