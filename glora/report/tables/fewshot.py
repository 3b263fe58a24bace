"""Few-shot accuracies: data sets by images per class, and their mean (the numbers behind Figure 2)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from statistics import fmean

from ...protocols import FewShot
from ..datasets import FEW_SHOT
from ..drawing import file_stem
from ..notes import our_notes, published_notes
from ..published import Published, published
from ..runs import Setting, Task
from ..seeds import Tasks, over_seeds, runs_of, test_accuracy
from .table import Entry, Table, mean_entry, run_entry

AVERAGE = "**Average**"


def few_shot_table(backbone: str, settings: Mapping[Setting, Tasks]) -> Table:
    """The table of one backbone: one column for each of our settings, then the published numbers."""
    known = published("fewshot", backbone)
    titles = [*(about.title for about in FEW_SHOT.values()), AVERAGE]
    ours = [entry for setting, tasks in settings.items() for entry in our_entries(setting.method, tasks)]
    return Table(
        stem=file_stem("table-fewshot", backbone),
        title=f"Figure 2 as a table: few-shot learning, {backbone}: test accuracy, %",
        corner="Data set, images a class",
        rows=[row_of(title, shots) for title in titles for shots in FewShot.shots],
        entries=[*ours, *(entry for each in known for entry in published_entries(each))],
        notes=[
            *our_notes(runs_of(settings)),
            f"The average is over the {len(FEW_SHOT)} data sets, of the published numbers too (computed here); where a "
            'cell says "x of y run" it is over those x.',
            *published_notes(known),
        ],
    )


def row_of(title: str, shots: int) -> str:
    return f"{title}, {shots}"


def our_entries(method: str, tasks: Tasks) -> Iterable[Entry]:
    """Every data set and number of shots, then the means."""
    found = {
        (name, shots): over_seeds(tasks.get(Task(name, shots), ()), test_accuracy)
        for name in FEW_SHOT
        for shots in FewShot.shots
    }
    for name, shots in found:
        yield run_entry(method, row_of(FEW_SHOT[name].title, shots), tasks.get(Task(name, shots), ()))
    for shots in FewShot.shots:
        run = {name: each for name in FEW_SHOT if (each := found[name, shots]) is not None}
        yield mean_entry(method, row_of(AVERAGE, shots), run, len(FEW_SHOT))


def published_entries(known: Published) -> Iterable[Entry]:
    """As :func:`our_entries`; no data set or number of shots is missing."""
    for name, about in FEW_SHOT.items():
        for shots in FewShot.shots:
            yield Entry(known.method, known.source, row_of(about.title, shots), known.accuracy[name][str(shots)])
    for shots in FewShot.shots:
        mean = fmean(known.accuracy[name][str(shots)] for name in FEW_SHOT)
        yield Entry(known.method, known.source, row_of(AVERAGE, shots), mean)
