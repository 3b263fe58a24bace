"""Scores of a search on disk, each as soon as it is known."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from .files import require_folder, write_atomically

JOURNAL_FORMAT = 1


class Scores:
    """Scores by candidate: from the journal where it has them, else evaluated, and into the journal."""

    def __init__(self, journal: Journal | None):
        self.journal, self.evaluated = journal, 0
        self.known = {} if journal is None else journal.read()

    def of(self, candidate: str, evaluate: Callable[[], float]) -> float:
        if candidate not in self.known:
            self.known[candidate] = float(evaluate())
            self.evaluated += 1
            if self.journal is not None:
                self.journal.append(candidate, self.known[candidate])
        return self.known[candidate]


class Journal:
    """One line of JSON a score, after a first line that says which search this is.

    A process killed while it writes leaves at most one incomplete line, which is cut off on resume.

    Args:
        file: where it is, or will be.
        description: plain data that tells this search from others.

    Raises:
        ValueError: the folder of ``file`` does not exist.
    """

    def __init__(self, file: str | os.PathLike, description: Mapping[str, Any]):
        self.file = Path(file)
        require_folder("journal", file)
        self.header = {"format": JOURNAL_FORMAT, **description}

    def read(self) -> dict[str, float]:
        """Scores so far; starts the file if there is none. Raises ValueError for another search's."""
        content = self.file.read_bytes() if self.file.exists() else b""
        if not content:
            line = json.dumps(self.header).encode() + b"\n"
            write_atomically(self.file, lambda stream: stream.write(line))
            return {}
        complete = content[: content.rfind(b"\n") + 1]
        try:
            header, *entries = [json.loads(line) for line in complete.splitlines()]
            scores = dict(entries)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{self.file}: expected a search journal, got something else ({error})") from None
        if header != self.header:
            raise ValueError(f"{self.file}: journal of another search; expected {self.header}, got {header}")
        if len(complete) < len(content):
            with open(self.file, "rb+") as stream:
                stream.truncate(len(complete))
        return scores

    def append(self, candidate: str, score: float) -> None:
        with open(self.file, "a", encoding="utf-8") as stream:
            stream.write(json.dumps([candidate, score]) + "\n")
            stream.flush()
            os.fsync(stream.fileno())
