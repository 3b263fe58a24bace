"""Table 2: ImageNet with few images per class as the source, and targets used only for tests."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial

from ...protocols import TARGETS
from ..drawing import file_stem
from ..notes import our_notes, published_notes
from ..published import Published, published
from ..runs import Run, Setting, Task
from ..seeds import Tasks, over_seeds, runs_of
from .table import OURS, PARAMETERS, Entry, Table, run_entry

SOURCE, SIZE = "ImageNet (source)", "Parameters"
_PAPERS_SHOTS = 16


def imagenet_table(backbone: str, shots: int | None, settings: Mapping[Setting, Tasks]) -> Table:
    """The table of one backbone and number of shots: one column for each of our settings, then published numbers."""
    known = published("imagenet", backbone) if shots == _PAPERS_SHOTS else []
    task = Task("imagenet", shots)
    chosen = {setting: {task: tasks[task]} for setting, tasks in settings.items() if task in tasks}
    ours = [entry for setting, tasks in chosen.items() for entry in _our_entries(setting.method, tasks[task])]
    return Table(
        stem=file_stem("table-imagenet", backbone, None if shots is None else f"{shots}shots"),
        title=f"{'Table 2: ' if known else ''}ImageNet, {shots} images a class, {backbone}: accuracy, %",
        corner="Test images",
        rows=[SOURCE, *map(_target_row, TARGETS), SIZE],
        entries=[*ours, *(entry for each in known for entry in _published_entries(each))],
        notes=[
            *our_notes(runs_of(chosen)),
            *published_notes(known),
            *(["Their numbers of ImageNet-R were not found."] if known else []),
        ],
    )


def _target_row(target: str) -> str:
    return f"ImageNet-{target}"


def _our_entries(method: str, runs: Sequence[Run]) -> Iterable[Entry]:
    yield run_entry(method, SOURCE, runs)
    for target in TARGETS:
        yield run_entry(method, _target_row(target), runs, partial(_target_accuracy, target))
    size = over_seeds(runs, lambda run: run.parameters)
    mean, note = (size.mean, "") if size else (None, "not searched")
    yield Entry(method, OURS, SIZE, mean, PARAMETERS, note=note)


def _target_accuracy(target: str, run: Run) -> float | None:
    return None if run.test is None or target not in run.test.targets else 100 * run.test.targets[target]


def _published_entries(known: Published) -> Iterable[Entry]:
    for row, name in [(SOURCE, "imagenet"), *((_target_row(target), target) for target in TARGETS)]:
        if name in known.accuracy:
            yield Entry(known.method, known.source, row, known.accuracy[name])
    if known.parameters is not None:
        yield Entry(known.method, known.source, SIZE, known.parameters, PARAMETERS)
