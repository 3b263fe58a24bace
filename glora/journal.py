"""Scores of a search on disk, each as soon as it is known."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from .files import require_folder, write_atomically
from .ranks import from_first, gather, rank, world_size

JOURNAL_FORMAT = 1


class Scores:
    """Scores by candidate: from the journal where it has them, else evaluated, and into the journal.

    Of several ranks each evaluates another candidate at the same time; all know all scores, and rank 0
    alone reads and writes the journal.
    """

    def __init__(self, journal: Journal | None):
        self.journal, self.evaluated = journal, 0
        self.known = {} if journal is None else from_first(journal.read)

    def of(self, candidates: Mapping[str, Callable[[], float]]) -> Iterator[float]:
        """The score of each candidate in their order, evaluated when it is its turn."""
        names = list(candidates)
        for position, name in enumerate(names):
            if name not in self.known:
                unknown = [other for other in names[position:] if other not in self.known]
                self._evaluate({other: candidates[other] for other in unknown[: world_size()]})
            yield self.known[name]

    def _evaluate(self, candidates: Mapping[str, Callable[[], float]]) -> None:
        """At most one candidate a rank."""
        calls = list(candidates.values())
        scores = gather(lambda: float(calls[rank()]()) if rank() < len(calls) else math.nan)
        found = dict(zip(candidates, scores))
        journal = self.journal
        if journal is not None:
            from_first(lambda: journal.append(found))
        self.known.update(found)
        self.evaluated += len(found)


class Journal:
    """One line of JSON a score, after a first line that says which search this is.

    A process killed while it writes leaves at most one incomplete line, which is cut off on resume.

    Args:
        file: where it is, or will be.
        description: plain data that tells this search from others.
    """

    def __init__(self, file: str | os.PathLike, description: Mapping[str, Any]):
        self.file = Path(file)
        self.header = {"format": JOURNAL_FORMAT, **description}

    def read(self) -> dict[str, float]:
        """Scores so far; starts the file if there is none.

        Raises:
            ValueError: the folder does not exist, or the file is another search's.
        """
        require_folder("journal", self.file)
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

    def append(self, scores: Mapping[str, float]) -> None:
        with open(self.file, "a", encoding="utf-8") as stream:
            stream.writelines(json.dumps(entry) + "\n" for entry in scores.items())
            stream.flush()
            os.fsync(stream.fileno())
