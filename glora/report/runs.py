"""Run folders: one data set and one seed each, as far as their stages have come."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ..config import LayerShape
from ..protocols import PROTOCOLS
from .checked import Entries
from .datasets import data_sets
from .records import (
    Layers,
    Merged,
    Paths,
    Search,
    Test,
    Training,
    read_merged,
    read_search,
    read_test,
    read_training,
)

RUN_FORMAT = 1
DESCRIPTION, LOG, FEATURES = "run.json", "log.csv", "features.npz"


class Setting(NamedTuple):
    """What runs of one column of a table have in common."""

    protocol: str
    backbone: str
    method: str


class Task(NamedTuple):
    """What a cell of a table is about; its runs differ in their seed alone."""

    dataset: str
    shots: int | None


@dataclass(frozen=True)
class Run:
    """A run folder.

    Attributes:
        size: the trained size's name, such as ``"0.86M"``.
        preset: a fixed path instead of a search.
        limit: of the search, in parameters.
        shots: images a class, where the protocol has them.
        training, search, merged, test: what each stage left; None where it has not been run.
    """

    folder: Path
    setting: Setting
    task: Task
    seed: int
    size: str | None
    preset: str | None
    limit: int | None
    layers: Layers
    samples: Mapping[str, int]
    versions: Mapping[str, Any]
    date: str
    training: Training | None
    search: Search | None
    merged: Merged | None
    test: Test | None

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @property
    def title(self) -> str:
        """The data set as the paper calls it, with shots and seed."""
        return f"{task_title(self.setting.protocol, self.task)}, seed {self.seed}"

    @property
    def paths(self) -> Paths | None:
        """Of the merged model, or of the search's winner."""
        chosen = self.merged or self.search
        return chosen.paths if chosen else None

    @property
    def parameters(self) -> int | None:
        """Support parameters that :attr:`paths` read, the head left out."""
        if self.merged:
            return self.merged.parameters
        return self.search.best.parameters if self.search else None

    @property
    def log(self) -> Path | None:
        file = self.folder / LOG
        return file if file.exists() else None

    @property
    def features(self) -> Path | None:
        file = self.folder / FEATURES
        return file if file.exists() else None

    @property
    def remarks(self) -> list[str]:
        """Stages that are missing, and files that do not belong together."""
        stages = {"trained": self.training, "searched": self.search or self.preset, "merged": self.merged}
        found = [f"not {stage}" for stage, done in {**stages, "tested": self.test}.items() if done is None]
        if self.merged and self.search and self.merged.paths != self.search.paths:
            found.append("merge.json has other paths than the winner of search.json")
        return found


def task_title(protocol: str, task: Task) -> str:
    title = data_sets(protocol)[task.dataset].title
    return title if task.shots is None else f"{title}, {task.shots} shot{'s' if task.shots > 1 else ''}"


def load_runs(folder: str | os.PathLike) -> list[Run]:
    """The run in ``folder``, or those in its folders, in the order of their protocol's data sets.

    Runs that have not come to an end are fine.

    Raises:
        ValueError: no run there; a file that is damaged, of another format, or that belongs to another run; two runs
            with the same data set, seed and method, of which a mean would count one twice.
    """
    path = Path(folder)
    if (path / DESCRIPTION).is_file():
        return [load_run(path)]
    inner = sorted(path.iterdir()) if path.is_dir() else []
    runs = [load_run(each) for each in inner if (each / DESCRIPTION).is_file()]
    if not runs:
        raise ValueError(f"folder: expected a run, a folder with {DESCRIPTION}, or a folder of runs; got {path}")
    _refuse_doubles(runs)
    return sorted(runs, key=_order)


def load_run(folder: Path) -> Run:
    """One run folder. Raises ValueError as :func:`load_runs` does."""
    entries = Entries.read(folder / DESCRIPTION)
    if entries.content.get("format") != RUN_FORMAT:
        entries.fail("format", f"{RUN_FORMAT}; a newer glora may read it")
    layers = _layers(entries)
    samples = entries.table("samples")
    preset, size = entries.optional("preset", Entries.text), entries.optional("size", Entries.text)
    return Run(
        folder=folder,
        setting=Setting(_protocol(entries), _backbone(entries), _method(size, preset)),
        task=Task(entries.text("dataset"), entries.optional("shots", Entries.count)),
        seed=entries.integer("seed"),
        size=size,
        preset=preset,
        limit=entries.optional("limit", Entries.count),
        layers=layers,
        samples={name: samples.count(name) for name in samples.content},
        versions=entries.table("versions").content,
        date=entries.text("date"),
        training=read_training(folder / "train.json"),
        search=read_search(folder / "search.json", layers),
        merged=read_merged(folder / "merge.json", layers),
        test=read_test(folder / "test.json"),
    )


def _protocol(entries: Entries) -> str:
    name, names = entries.text("protocol"), [known.name for known in PROTOCOLS]
    if name not in names:
        entries.fail("protocol", f"one of {names}")
    if entries.text("dataset") not in data_sets(name):
        entries.fail("dataset", f"one of {list(data_sets(name))}")
    return name


def _backbone(entries: Entries) -> str:
    """The timm name in the recipe."""
    return entries.table("recipe").table("model").text("name")


def _method(size: str | None, preset: str | None) -> str:
    return " ".join([f"preset {preset}" if preset else "GLoRA", *([size] if size else [])])


def _layers(entries: Entries) -> Layers:
    layers: Layers = {}
    for item in entries.list("layers"):
        if not isinstance(item, list) or [type(value) for value in item] != [str, int, int, bool, str]:
            entries.fail("layers", f"lists [name, out_features, in_features, bias, product], not {item!r}")
        layers[item[0]] = LayerShape(*item[1:])
    return layers


def _refuse_doubles(runs: Sequence[Run]) -> None:
    seen: dict[tuple, Run] = {}
    for run in runs:
        other = seen.setdefault((run.setting, run.task, run.seed), run)
        if other is not run:
            raise ValueError(
                f"folder: expected different runs, got {other.name} and {run.name}, both of "
                f"{run.setting.method} on {run.title} with {run.setting.backbone}"
            )


def _order(run: Run) -> tuple:
    names = list(data_sets(run.setting.protocol))
    return (*run.setting, names.index(run.task.dataset), run.task.shots or 0, run.seed)
