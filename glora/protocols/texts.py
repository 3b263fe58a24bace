"""Texts with classes, in the rows of a CSV file."""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch.utils.data import Dataset

from .lists import Entry
from .sources import Folders, ListSource, Missing

Columns = tuple[str, str]


@dataclass(frozen=True)
class TextSettings:
    """How a text becomes tokens.

    Args:
        max_length: tokens of a text at most; the rest is cut off.

    Raises:
        ValueError: a value out of range.
    """

    max_length: int = 128

    def __post_init__(self) -> None:
        if type(self.max_length) is not int or self.max_length < 1:
            raise ValueError(f"max_length: expected an integer from 1, got {self.max_length!r}")


def read_rows(file: str | os.PathLike, columns: Columns) -> list[tuple[str, str]]:
    """Text and label of every row of a CSV file with a header, in its order; space around a label does not count.

    Args:
        columns: the names of the two columns.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: no column of that name (those that there are are listed); a row without a text or a label; something
            else than CSV in UTF-8. File and line are named.
    """
    if not Path(file).is_file():
        raise FileNotFoundError(f"texts: expected a CSV file, found none at {os.fspath(file)!r}")
    rows = []
    with open(file, encoding="utf-8-sig", newline="") as stream:
        reader = csv.DictReader(stream)
        try:
            found = list(reader.fieldnames or ())
            for argument, column in zip(("text_column", "label_column"), columns):
                if found.count(column) != 1:
                    raise ValueError(f"{argument}: expected one column {column!r}, the file has the columns {found}")
            for row in reader:
                text, label = (row[column] or "" for column in columns)
                if not text.strip() or not label.strip():
                    raise ValueError(f"line {reader.line_num}: expected a text and a label, got {text!r}, {label!r}")
                rows.append((text, label.strip()))
        except (ValueError, csv.Error) as error:
            raise ValueError(f"{os.fspath(file)}: {error}") from None
    return rows


def sorted_classes(labels: Sequence[str]) -> tuple[str, ...]:
    """The different labels, sorted: as numbers if all are integers."""
    names = set(labels)
    numbers = all(re.fullmatch(r"-?[0-9]+", name) for name in names)
    return tuple(sorted(names, key=int if numbers else None))  # type: ignore[type-var]


class TextList(Dataset):
    """A map-style data set of ``(text, class)`` from the rows of a CSV file, which is read once.

    Args:
        root: the file.
        entries: ``(row, class)`` pairs, rows counted from 1 without the header.
        columns: the names of the columns of texts and labels.
        classes: the label of each class.

    Raises:
        ValueError: a row that the file does not have, or of another class; as :func:`read_rows`.
    """

    noun = "texts"
    random = False

    def __init__(self, root: str | os.PathLike, entries: Sequence[Entry], columns: Columns, classes: Sequence[str]):
        self.root, self.entries, self._how = Path(root), tuple(entries), (columns, tuple(classes))
        rows = read_rows(root, columns)
        for row, label in self.entries:
            found = rows[int(row) - 1][1] if row.isdecimal() and 0 < int(row) <= len(rows) else "no such row"
            if found != classes[label]:
                raise ValueError(f"{self.root}, row {row}: expected the class {classes[label]!r}, got {found!r}")
        self.texts = tuple(rows[int(row) - 1][0] for row, _ in self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> tuple[str, int]:
        return self.texts[index], self.entries[index][1]

    @property
    def identity(self) -> list:
        """What tells the list from others: its rows, with their texts."""
        return [*zip(self.entries, self.texts)]

    def of(self, entries: Sequence[Entry]) -> TextList:
        """The same list of other ``entries``."""
        return TextList(self.root, entries, *self._how)


@dataclass(frozen=True)
class RowSource(ListSource):
    """A list file whose paths are rows of a CSV file, ``folders[0]``, with these columns and labels of its classes."""

    columns: Columns = ("", "")
    names: tuple[str, ...] = ()

    def open(self) -> TextList:
        """The texts; raises as :meth:`read` and :class:`TextList`."""
        _, entries = self.read()
        return TextList(self.folders[0], entries, self.columns, self.names)

    def missing(self, folders: Folders) -> Iterator[Missing]:
        try:
            self.open()
        except (FileNotFoundError, ValueError) as error:
            yield self.lacks(self.file, str(error))
