"""The command line: parses arguments, calls one function, prints text or JSON."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from ..version import __version__
from .bench import add_bench
from .doctor import add_doctor
from .interrupts import raising_on_signals, stopped
from .merge import add_merge
from .quickstart import add_quickstart
from .refit import add_refit
from .report import add_report
from .search import add_search
from .train import add_train


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``glora``; returns the exit status.

    It is 0, 1 for a failed check, 2 for bad arguments, 130 after Ctrl-C or 143 after SIGTERM. Without a command it
    prints the help, as pip does, and returns 0.
    """
    parser = _parser()
    options, unknown = parser.parse_known_args(arguments)
    if unknown:
        options.parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if options.command is None:
        parser.print_help()
        return 0
    with raising_on_signals() as received:
        try:
            return options.run(options)
        except BaseException as error:
            # the code that a signal interrupts may raise an error of its own
            if received or isinstance(error, KeyboardInterrupt):
                return stopped(options, received)
            if not isinstance(error, (ValueError, TypeError, OSError, ModuleNotFoundError)):
                raise
            extra = f"; pip install 'glora[{getattr(options, 'extra', 'demo')}]'"
            hint = extra if isinstance(error, ModuleNotFoundError) else ""
            options.parser.print_usage(sys.stderr)
            print(f"glora {options.command}: error: {error}{hint}", file=sys.stderr)
            return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="glora",
        description="GLoRA: adapt a frozen model with small support tensors, search the best ones, merge for free.",
        epilog="Start with: glora quickstart",
    )
    parser.add_argument("--version", action="version", version=f"glora {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="command")
    for add in (add_quickstart, add_train, add_search, add_refit, add_merge, add_report, add_bench, add_doctor):
        add(commands)
    parser.set_defaults(parser=parser)
    for command in commands.choices.values():
        command.set_defaults(parser=command)
    return parser
