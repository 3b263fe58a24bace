"""``glora search``: the best path of every layer, for trained runs."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path

from .interrupts import announce, said
from .next_step import next_step


def add_search(commands) -> None:
    command = commands.add_parser(
        "search",
        help="search the best path of every layer of trained supernets, under the parameter limit",
        description=(
            "Evolutionary search on the validation split, for one run or every run of a folder. Every score is on"
            " disk as soon as it is known: a search that was cut goes on with the identical history. The test "
            "split is not read."
        ),
        epilog="Then: glora refit FOLDER, which the paper goes without, or glora merge FOLDER --test.",
    )
    command.add_argument("folder", type=Path, help="a run, or a folder of runs")
    command.add_argument("--limit", type=int, metavar="N", help="support parameters; default: that of the run's size")
    command.add_argument("--front", action="store_true", help="search accuracy against parameters, not accuracy alone")
    command.add_argument("--halving", action="store_true", help="judge candidates on growing parts of the split")
    command.add_argument(
        "--quick", action="store_true", help="120 candidates, for a first look; single settings by --set, as ever"
    )
    command.add_argument(
        "--set", action="append", default=[], dest="changes", metavar="KEY=VALUE", help="as search.generations=5"
    )
    command.add_argument(
        "--again", action="store_true", help="put an earlier search and all that was made of it aside, and search anew"
    )
    command.add_argument("--device", default="auto", help="auto (default), cpu, cuda, cuda:1, mps")
    command.add_argument("--json", action="store_true", help="print JSON alone, no progress bars")
    command.set_defaults(run=_search)


def _search(options: argparse.Namespace) -> int:
    from ..evolution.settings import QUICK
    from ..runs import find_runs, process_group, search_run, search_settings
    from ..runs.folder import JOURNAL
    from ..runs.saved import saved_searches, unfinished_search
    from ..runs.texts import describe_searches

    runs = find_runs(options.folder)
    if options.quick:
        quick = [f"search.{name}={value}" for name, value in QUICK.items()]
        options.changes = quick + options.changes  # the last one counts
    if options.front:
        options.changes.append("search.objective=front")
    if options.halving:
        options.changes.append("search.halving=[0.25, 0.5, 1]")
    settings = [search_settings(run, options.changes, options.limit) for run in runs]
    folders = [run.path for run in runs]
    options.saved = (
        saved_again(folders, JOURNAL, saved_searches, "searches")
        if options.again
        else lambda: said(saved_searches(folders))
    )
    with process_group(options.device) as process:
        tell = process.first and not options.json
        found = []
        for run, how in zip(runs, settings):
            if tell:
                announce(run.spec.name, None if options.again else unfinished_search(run.path))
            found.append(search_run(run, how, process.device, again=options.again, progress=tell))
    if process.first:
        print(json.dumps(found) if options.json else describe_searches(found))
        if tell:
            print(next_step("refit", options.folder))
    return 0


def saved_again(
    folders: Sequence[Path], first: str, saved: Callable[[Sequence[Path]], str | None], what: str
) -> Callable[[], str]:
    """What to say of searches, or ``what``, with --again, which would also put aside the one that has just begun.

    Each begins by writing a file ``first`` of its run; ``saved`` says what there is.
    """

    def written(folder: Path) -> int | None:
        return (folder / first).stat().st_ino if (folder / first).is_file() else None

    before = {folder: written(folder) for folder in folders}

    def say() -> str:
        begun = [folder for folder in folders if written(folder) != before[folder]]
        if not begun:
            return f"earlier {what} are where they were; the same command line starts again"
        rest = [str(folder) for folder in folders if folder not in begun]
        then = f"; then --again for {', '.join(rest)}" if rest else ""
        return said(saved(begun), "without --again, the same command line") + then

    return say
