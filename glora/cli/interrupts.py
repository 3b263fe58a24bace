"""Where a command continues from; what Ctrl-C and SIGTERM raise, and the one line that says what is saved."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

_NAMES = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}


@contextmanager
def raising_on_signals() -> Iterator[list[int]]:
    """SIGINT and SIGTERM raise KeyboardInterrupt in the block; the list holds the signals that came.

    A signal that this process was started to ignore (``nohup``) is still ignored.
    """
    received: list[int] = []
    before: dict[signal.Signals, object] = {}

    def stop(number: int, _frame: object) -> None:
        received.append(number)
        raise KeyboardInterrupt

    if threading.current_thread() is threading.main_thread():
        handlers = {number: signal.getsignal(number) for number in _NAMES}
        before = {number: handler for number, handler in handlers.items() if handler not in (None, signal.SIG_IGN)}
    try:
        for number in before:
            signal.signal(number, stop)
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]


def stopped(options: argparse.Namespace, received: list[int]) -> int:
    """Print the line, on one of several processes, and return the exit status: 128 plus the signal's number.

    A command that saves has set ``options.saved``, a function that says what is saved and how to continue.
    """
    for number in _NAMES if received else ():
        signal.signal(number, signal.SIG_IGN)  # until raising_on_signals() ends
    number = signal.Signals(received[0]) if received else signal.SIGINT
    if _is_launched_first():
        print(f"glora {options.command}: {_NAMES[number]}; {_saved(options)}", file=sys.stderr, flush=True)
    return 128 + number


def _is_launched_first() -> bool:
    """Whether this process prints, if ``torchrun`` has started several. PyTorch, maybe half imported, is not asked."""
    return "TORCHELASTIC_RUN_ID" not in os.environ or os.environ.get("RANK", "0") == "0"


def _saved(options: argparse.Namespace) -> str:
    with suppress(OSError, ValueError):  # a file that does not belong to this command
        if hasattr(options, "saved"):
            return options.saved()
    return "the same command line starts again"


def announce(name: str, unfinished: str | None) -> None:
    """Print the name of a run, and what it continues from."""
    print(name if unfinished is None else f"{name}\ncontinues from {unfinished}", flush=True)


def said(saved: str | None, line: str = "the same command line") -> str:
    """The end of the line: says that ``line`` continues from ``saved``, or starts again."""
    return f"nothing is saved yet; {line} starts again" if saved is None else f"saved: {saved}; {line} continues"
