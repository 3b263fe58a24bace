"""Tables 1 and 5: VTAB-1K, by data set and by group, with the average that papers report."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from statistics import fmean

from ...protocols import GROUPS, average
from ..datasets import VTAB, group_of
from ..drawing import file_stem
from ..notes import our_notes, published_notes
from ..published import Published, published
from ..runs import Setting, Task
from ..seeds import OverSeeds, Tasks, over_seeds, runs_of, test_accuracy
from .table import OURS, PARAMETERS, Entry, Table, mean_entry, run_entry

AVERAGE = "**Average** of the groups' means"
SIZE = "Parameters, mean over the data sets"
# Which table of the paper has which backbone.
_NUMBERS = {"vit_base_patch16_224": "Table 1: ", "swin_base_patch4_window7_224": "Table 5: "}


def vtab_table(backbone: str, settings: Mapping[Setting, Tasks]) -> Table:
    """The table of one backbone: one column for each of our settings, then the published numbers."""
    known = published("vtab1k", backbone)
    ours = [entry for setting, tasks in settings.items() for entry in _our_entries(setting.method, tasks)]
    return Table(
        stem=file_stem("table-vtab1k", backbone),
        title=f"{_NUMBERS.get(backbone.partition('.')[0], '')}VTAB-1K, {backbone}: test accuracy, %",
        corner="Data set",
        rows=[*map(_row, VTAB), *map(_group_row, GROUPS), AVERAGE, SIZE],
        entries=[*ours, *(entry for each in known for entry in _published_entries(each))],
        notes=[
            *our_notes(runs_of(settings)),
            f"The average, the mean of the three groups' means, is given only where all {len(VTAB)} data sets are. "
            'Where a cell says "x of y run" it is the plain mean over those x, which compares with nothing published.',
            *published_notes(known),
            *(["Their numbers of single data sets were not found."] if known else []),
        ],
    )


def accuracies(tasks: Tasks) -> dict[str, OverSeeds]:
    """The accuracies of the data sets that were tested, in the paper's order."""
    found = {name: over_seeds(tasks.get(Task(name, None), ()), test_accuracy) for name in VTAB}
    return {name: each for name, each in found.items() if each is not None}


def _row(dataset: str) -> str:
    return f"{VTAB[dataset].title} ({VTAB[dataset].group})"


def _group_row(group: str) -> str:
    return f"*{group}*, mean of {len(group_of(group))}"


def _our_entries(method: str, tasks: Tasks) -> Iterable[Entry]:
    for name in VTAB:
        yield run_entry(method, _row(name), tasks.get(Task(name, None), ()))
    tested = accuracies(tasks)
    for group in GROUPS:
        names = group_of(group)
        run = {name: tested[name] for name in names if name in tested}
        yield mean_entry(method, _group_row(group), run, len(names))
    if len(tested) == len(VTAB):
        yield mean_entry(method, AVERAGE, tested, len(VTAB), average)
    else:
        yield mean_entry(method, AVERAGE, tested, len(VTAB))
    yield _size_entry(method, tasks)


def _size_entry(method: str, tasks: Tasks) -> Entry:
    found = [over_seeds(runs, lambda run: run.parameters) for runs in tasks.values()]
    counts = [each.mean for each in found if each is not None]
    if not counts:
        return Entry(method, OURS, SIZE, None, PARAMETERS, note="not searched")
    note = f"{len(counts)} of {len(VTAB)} searched" if len(counts) < len(VTAB) else ""
    return Entry(method, OURS, SIZE, fmean(counts), PARAMETERS, note=note)


def _published_entries(known: Published) -> Iterable[Entry]:
    for row, name in [*((_group_row(group), group) for group in GROUPS), (AVERAGE, "average")]:
        if name in known.accuracy:
            yield Entry(known.method, known.source, row, known.accuracy[name])
    if known.parameters is not None:
        yield Entry(known.method, known.source, SIZE, known.parameters, PARAMETERS)
