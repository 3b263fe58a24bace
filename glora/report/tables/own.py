"""Own data: test accuracy and parameters, by data set."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from ..drawing import file_stem
from ..notes import our_notes
from ..runs import Setting, Task, task_title
from ..seeds import Tasks, over_seeds, runs_of
from .table import OURS, PARAMETERS, Entry, Table, run_entry


def own_table(protocol: str, backbone: str, settings: Mapping[Setting, Tasks]) -> Table:
    """The table of one model: one column for each setting."""
    tasks = list(dict.fromkeys(task for each in settings.values() for task in each))
    return Table(
        stem=file_stem("table", protocol, backbone),
        title=f"Own data, {backbone}: test accuracy, %",
        corner="Data",
        rows=[row for task in tasks for row in _rows(protocol, task)],
        entries=[entry for setting, each in settings.items() for entry in _entries(protocol, setting.method, each)],
        notes=our_notes(runs_of(settings)),
    )


def _rows(protocol: str, task: Task) -> tuple[str, str]:
    title = task_title(protocol, task)
    return title, f"{title}, parameters"


def _entries(protocol: str, method: str, tasks: Tasks) -> Iterable[Entry]:
    for task, runs in tasks.items():
        accuracy, parameters = _rows(protocol, task)
        yield run_entry(method, accuracy, runs)
        size = over_seeds(runs, lambda run: run.parameters)
        mean, note = (size.mean, "") if size else (None, "not searched")
        yield Entry(method, OURS, parameters, mean, PARAMETERS, note=note)
