"""A run as read from its folder: one data set and one seed, with the stages that are done."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from ..runs.folder import ADAPTER, FEATURES, LOG, RunFolder
from ..runs.spec import RunSpec
from .datasets import title_of
from .records import Layers, Merged, Paths, Refit, Search, Test, Training


class Setting(NamedTuple):
    """What the runs of one column of a table have in common."""

    protocol: str
    backbone: str
    method: str


class Task(NamedTuple):
    """The subject of a cell of a table; its runs differ only in their seed."""

    dataset: str
    shots: int | None


@dataclass(frozen=True)
class Run:
    """A run folder, or the refit in it, which counts as a run of a method of its own.

    Attributes:
        versions: the versions of the packages that trained it; empty if ``run.json`` does not say.
        training, search, merged, test: the records of each stage; None if it has not been run. Those of a refit are its
            own, but for the search that it continues.
        refit: the record of the refit; None for a run itself.
    """

    folder: RunFolder
    setting: Setting
    layers: Layers
    versions: Mapping[str, str]
    training: Training | None
    search: Search | None
    merged: Merged | None
    test: Test | None
    refit: Refit | None = None

    @property
    def name(self) -> str:
        path = self.folder.path.resolve()
        return f"{path.parent.name}-{path.name}" if self.refit else path.name

    @property
    def spec(self) -> RunSpec:
        return self.folder.spec

    @property
    def task(self) -> Task:
        return Task(self.spec.dataset, self.spec.shots)

    @property
    def seed(self) -> int:
        return self.spec.seed

    @property
    def limit(self) -> int | None:
        """How many parameters the path may read: the search's own limit, which ``glora search --limit`` changes.

        None where there is none, or where the search is to find the mean of random paths.
        """
        limit = self.search.limit if self.search else self.spec.limit
        return None if isinstance(limit, str) else limit

    @property
    def title(self) -> str:
        """The data set as the paper calls it, with shots and seed."""
        return f"{task_title(self.setting.protocol, self.task)}, seed {self.seed}"

    @property
    def paths(self) -> Paths | None:
        """The paths of the merged model, or of the search's winner."""
        chosen = self.merged or self.search
        return chosen.paths if chosen else None

    @property
    def parameters(self) -> int | None:
        """How many support parameters :attr:`paths` read, without the head."""
        if self.merged:
            return self.merged.parameters
        return self.search.best.parameters if self.search else None

    @property
    def log(self) -> Path | None:
        return self.folder / LOG if self.folder.has(LOG) else None

    @property
    def features(self) -> Path | None:
        return self.folder / FEATURES if self.folder.has(FEATURES) else None

    @property
    def remarks(self) -> list[str]:
        """Stages that are missing, and files that do not belong together."""
        stages = {"trained": self.training, "searched": self.search or self.spec.preset, "merged": self.merged}
        found = [f"not {stage}" for stage, done in {**stages, "tested": self.test}.items() if done is None]
        if self.merged and self.search and self.merged.paths != self.search.paths:
            found.append("merge.json has other paths than the winner of search.json")
        if self.refit and self.refit.is_of_another:
            found.append(f"refit of another winner than {ADAPTER}")
        return found


def task_title(protocol: str, task: Task) -> str:
    title = title_of(protocol, task.dataset)
    return title if task.shots is None else f"{title}, {task.shots} shot{'s' if task.shots > 1 else ''}"
