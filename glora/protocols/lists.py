"""List files of the VTAB-1K, few-shot and ImageNet releases: per image one line ``<relative path> <class>``."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path, PurePosixPath

Entry = tuple[str, int]


def read_list(
    file: str | os.PathLike, classes: Collection[int] | None = None, *, repeats: bool = False
) -> tuple[Entry, ...]:
    """The ``(relative path, class)`` pairs of a list file, in its order.

    The class follows the last space, so paths may hold spaces; blank lines are skipped.

    Args:
        classes: the valid classes, as ``range(100)``; None accepts any from 0.
        repeats: whether a line may come twice, as in NOAH's one-shot lists of Oxford Pets.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: it names no image, or a line is malformed, has another class, or repeats a path; the message
            names file and line.
    """
    entries: list[Entry] = []
    first_lines: dict[str, tuple[int, int]] = {}
    for number, text in enumerate(_text(file).split("\n"), 1):
        if not text.strip():
            continue
        try:
            path, label = _entry(text, classes)
            line, former = first_lines.setdefault(path, (number, label))
            if former != label:
                raise ValueError(f"expected class {former} as in line {line} for {path!r}, got {label}")
            if line != number and not repeats:
                raise ValueError(f"expected every image once, got {path!r} again, after line {line}")
        except ValueError as error:
            raise ValueError(f"{os.fspath(file)}, line {number}: {error}") from None
        entries.append((path, label))
    if not entries:
        raise ValueError(f"{os.fspath(file)}: expected lines of '<relative path> <class>', got none")
    return tuple(entries)


def _text(file: str | os.PathLike) -> str:
    try:
        return Path(file).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{os.fspath(file)}: expected UTF-8 text ({error})") from error


def _entry(text: str, classes: Collection[int] | None) -> Entry:
    path, _, label = text.strip().rpartition(" ")
    path = path.strip()
    if not path or not (label.isascii() and label.isdigit()):
        raise ValueError(f"expected '<relative path> <class>', got {text!r}")
    if PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts:
        raise ValueError(f"expected a path within the data set's folder, got {path!r}")
    if classes is not None and int(label) not in classes:
        raise ValueError(f"expected a class {_described(classes)}, got {label}")
    return path, int(label)


def _described(classes: Collection[int]) -> str:
    if isinstance(classes, range):
        return f"from {classes[0]} to {classes[-1]}"
    return f"of the {len(classes)} between {min(classes)} and {max(classes)}"
