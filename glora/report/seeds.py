"""Runs that differ only in their seed, and means over them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from .runs import Run, Setting, Task

Tasks = Mapping[Task, Sequence[Run]]
Value = Callable[[Run], float | None]
Combine = Callable[[Mapping[str, float]], float]


@dataclass(frozen=True)
class OverSeeds:
    """One value per seed, at least one."""

    values: Mapping[int, float]

    @property
    def mean(self) -> float:
        return fmean(self.values.values())

    @property
    def deviation(self) -> float | None:
        """The sample standard deviation; None for one seed."""
        return stdev(self.values.values()) if len(self.values) > 1 else None


def by_setting(runs: Iterable[Run]) -> dict[Setting, Tasks]:
    """The runs of each setting, by task; a task has one run per seed."""
    found: dict[Setting, dict[Task, list[Run]]] = defaultdict(lambda: defaultdict(list))
    for run in runs:
        found[run.setting][run.task].append(run)
    return {setting: dict(tasks) for setting, tasks in found.items()}


def runs_of(settings: Mapping[Setting, Tasks]) -> list[Run]:
    """The inverse of :func:`by_setting`."""
    return [run for tasks in settings.values() for runs in tasks.values() for run in runs]


def over_seeds(runs: Iterable[Run], value: Value) -> OverSeeds | None:
    """The ``value`` of the runs that have one; None if no run has one."""
    values = {run.seed: found for run in runs if (found := value(run)) is not None}
    return OverSeeds(values) if values else None


def combined(found: Mapping[str, OverSeeds], combine: Combine) -> OverSeeds | None:
    """``combine`` of the values of all names, for each seed; None if the names do not have the same seeds."""
    seeds = {frozenset(each.values) for each in found.values()}
    if len(seeds) != 1:
        return None
    return OverSeeds({s: combine({name: each.values[s] for name, each in found.items()}) for s in sorted(*seeds)})


def test_accuracy(run: Run) -> float | None:
    """The test accuracy in per cent."""
    return None if run.test is None else 100 * run.test.accuracy
