"""Progress on standard error: a bar on a terminal and in a notebook; elsewhere a line for every 5%."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import Any

from tqdm.auto import tqdm
from tqdm.notebook import tqdm_notebook

LINES = 20  # after the first line


def progress_bar(
    iterable: Iterable | None = None,
    *,
    total: int | None = None,
    initial: int = 0,
    desc: str,
    unit: str,
    shown: bool = True,
) -> Any:
    """A ``tqdm``, or :class:`Lines` where a bar would fill a file with carriage returns.

    Args:
        iterable: what the bar counts, if it is iterated over.
        total: by default the length of ``iterable``.
        shown: False for nothing at all, as where there is no standard error (``pythonw``).
    """
    options: dict[str, Any] = {"total": total, "initial": initial, "desc": desc, "unit": unit}
    shown = shown and sys.stderr is not None
    if shown and not _is_terminal(sys.stderr) and not issubclass(tqdm, tqdm_notebook):
        return Lines(iterable, **options)
    return tqdm(iterable, disable=not shown, **options)


def _is_terminal(stream: Any) -> bool:
    """Whether ``stream`` is a terminal; one that can only be written to is none."""
    return hasattr(stream, "isatty") and stream.isatty()


def say(line: str) -> None:
    """Print a line on standard error, above a bar."""
    if sys.stderr is not None:
        tqdm.write(line, file=sys.stderr)


class Lines:
    """What is used of a ``tqdm``, as lines: one at the beginning, one for every 5%, and the last when it is closed.

    Attributes:
        n: what is done, with ``initial``.
        total: None if it is unknown; then only the first line and the last are printed.
    """

    def __init__(self, iterable: Iterable | None, total: int | None, initial: int, desc: str, unit: str):
        if total is None and iterable is not None:
            with suppress(TypeError):
                total = len(iterable)  # type: ignore[arg-type]
        self.n, self.total = initial, total
        self._iterable, self._initial, self._desc, self._unit = iterable, initial, desc, unit
        self._began, self._postfix = time.monotonic(), ""
        self._print()

    def __iter__(self) -> Iterator:
        with self:
            for item in self._iterable or ():
                yield item
                self.update()

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def update(self, n: int = 1) -> None:
        before, self.n = self._part(), self.n + n
        if before < self._part() < LINES:
            self._print()

    def set_postfix_str(self, text: str, refresh: bool = True) -> None:
        """Let the following lines end with ``text``."""
        self._postfix = text

    def close(self) -> None:
        if self._printed != (self.n, self._postfix):
            self._print()

    def _part(self) -> int:
        """How many of the lines are due."""
        return LINES * self.n // self.total if self.total else 0

    def _print(self) -> None:
        done = "{n_fmt}" if self.total is None else "{percentage:3.0f}% {n_fmt}/{total_fmt}"
        passed = "{elapsed}" if self.total is None else "{elapsed}<{remaining}"
        line = tqdm.format_meter(
            self.n,
            self.total,
            time.monotonic() - self._began,
            prefix=self._desc,
            unit=self._unit,
            postfix=self._postfix,
            initial=self._initial,
            bar_format=f"{{desc}}: {done} [{passed}, {{rate_fmt}}{{postfix}}]",
        )
        print(line, file=sys.stderr, flush=True)
        self._printed = self.n, self._postfix
