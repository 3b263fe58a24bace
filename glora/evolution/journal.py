"""Scores of a search on disk, each as soon as it is known."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from ..arguments import differences
from ..files import require_file, write_atomically
from ..processes import from_first, gather, process_rank, world_size

JOURNAL_FORMAT = 2


class Part(NamedTuple):
    """A candidate (its paths as text) on the samples ``start`` to ``stop``."""

    candidate: str
    start: int
    stop: int


class Total(NamedTuple):
    """The sum of the scores of a part's samples, and the seconds it took one process."""

    total: float
    seconds: float


class Scores:
    """Scores of parts: from the journal if it has them, else evaluated and written to the journal.

    Several ranks evaluate different parts at the same time. All know all scores; only rank 0 reads
    and writes the journal.

    Attributes:
        known: every score of the search, whoever formed it.
        new: those that were formed since this object was made.
    """

    def __init__(self, journal: Journal | None):
        self.journal = journal
        self.known: dict[Part, Total] = {} if journal is None else from_first(journal.read)
        self.new: dict[Part, Total] = {}

    @property
    def seconds(self) -> float:
        """The seconds of all evaluations on all ranks, those in the journal included."""
        return math.fsum(scored.seconds for scored in self.known.values())

    @property
    def samples(self) -> int:
        """How many samples were evaluated, by earlier calls too."""
        return sum(part.stop - part.start for part in self.known)

    def of(self, parts: Mapping[Part, Callable[[], float]], on_scores: Callable[[int], object]) -> dict[Part, float]:
        """The total of each part. Missing ones are split into consecutive runs, one per rank.

        Args:
            on_scores: told how many more are known, as soon as they are.
        """
        unknown = [part for part in parts if part not in self.known]
        on_scores(len(parts) - len(unknown))
        longest = -(-len(unknown) // world_size())
        mine = unknown[process_rank() * longest : (process_rank() + 1) * longest]
        for turn in range(longest):
            found = gather(partial(_evaluated, {part: parts[part] for part in mine[turn : turn + 1]}))
            new = {part: scored for own in found for part, scored in own.items()}
            self._remember(new)
            on_scores(len(new))
        return {part: self.known[part].total for part in parts}

    def _remember(self, found: Mapping[Part, Total]) -> None:
        journal = self.journal
        if journal is not None:
            from_first(lambda: journal.append(found))
        self.known.update(found)
        self.new.update(found)


def _evaluated(calls: Mapping[Part, Callable[[], float]]) -> dict[Part, Total]:
    found = {}
    for part, call in calls.items():
        started = time.perf_counter()
        total = float(call())
        found[part] = Total(total, time.perf_counter() - started)
    return found


class Journal:
    """One line of JSON per score, ``[candidate, start, stop, total, seconds]``, after a line that names the search.

    A process killed while it writes leaves at most one incomplete line, which is cut off on resume.

    Args:
        file: where it is, or will be.
        description: plain data that tells this search from others.
    """

    def __init__(self, file: str | os.PathLike, description: Mapping[str, Any]):
        self.file = Path(file)
        self.header = json.loads(json.dumps({"format": JOURNAL_FORMAT, **description}))  # as it will be read

    def read(self) -> dict[Part, Total]:
        """Scores so far; starts the file if there is none, or only a part of its first line.

        Raises:
            ValueError: the folder does not exist, the file is a folder or another search's, with what differs.
        """
        require_file("journal", self.file)
        content = self.file.read_bytes() if self.file.exists() else b""
        first = json.dumps(self.header).encode() + b"\n"
        if len(content) < len(first) and first.startswith(content):
            write_atomically(self.file, lambda stream: stream.write(first), "journal")
            return {}
        complete = content[: content.rfind(b"\n") + 1]
        header, scores = self._parse(complete.splitlines())
        if header != self.header:
            raise ValueError(
                f"{self.file}: journal of another search: {_differing(header, self.header)}; choose another file, or "
                "put this one aside (`glora search --again` does)"
            )
        if len(complete) < len(content):
            with open(self.file, "rb+") as stream:
                stream.truncate(len(complete))
        return scores

    def _parse(self, lines: Iterable[bytes]) -> tuple[Any, dict[Part, Total]]:
        try:
            header, *entries = [json.loads(line) for line in lines]
            if header != self.header:
                return header, {}
            return header, {Part(*entry[:3]): Total(*entry[3:]) for entry in entries}
        except (ValueError, TypeError) as error:
            raise ValueError(f"{self.file}: expected a search journal, got something else ({error})") from None

    def append(self, scores: Mapping[Part, Total]) -> None:
        with open(self.file, "a", encoding="utf-8") as stream:
            stream.writelines(json.dumps([*part, *scored]) + "\n" for part, scored in scores.items())
            stream.flush()
            os.fsync(stream.fileno())


def count_scores(file: Path) -> int:
    """How many scores a journal holds; 0 if there is none."""
    return max(file.read_bytes().count(b"\n") - 1, 0) if file.is_file() else 0


def _differing(header: Any, expected: Mapping[str, Any]) -> str:
    return differences(header, expected) if isinstance(header, dict) else f"{header!r} for a description"
