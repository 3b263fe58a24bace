"""Reads run folders: checks the files of each, and decides which runs may be averaged."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from ..config import LayerShape
from ..presets import PRESETS
from ..runs.folder import ADAPTER, DESCRIPTION, MERGED, REFITTED, SEARCHED, TESTED, TRAINED, RunFolder, find_runs
from ..runs.spec import RunSpec
from .checked import Entries
from .conditions import tell_apart
from .records import Layers, read_merged, read_refit, read_search, read_test, read_training
from .runs import Run, Setting


def load_runs(folder: str | os.PathLike) -> list[Run]:
    """The run in ``folder``, or the runs in its folders, in the order of their protocol's data sets; and their refits.

    Unfinished runs are allowed. Runs that were made differently get different settings
    (:func:`glora.report.conditions.tell_apart`).

    Raises:
        ValueError: no run there; a file that is damaged, of another format, or that belongs to another run; two runs
            with the same data set, seed and method, of which a mean would count one twice.
    """
    runs = tell_apart([run for each in find_runs(folder) for run in _with_refit(_load_run(each))])
    _refuse_doubles(runs)
    return sorted(runs, key=_order)


def _load_run(folder: RunFolder) -> Run:
    entries = Entries.read(folder / DESCRIPTION)
    _check(entries, folder.spec)
    layers = _layers(entries)
    versions = entries.optional("versions", Entries.table)
    return Run(
        folder=folder,
        setting=Setting(folder.spec.recipe.protocol, folder.spec.backbone, _method(folder.spec)),
        layers=layers,
        versions={name: versions.text(name) for name in versions.content} if versions else {},
        training=read_training(_file(folder, TRAINED)),
        search=read_search(_file(folder, SEARCHED), layers),
        merged=read_merged(_file(folder, MERGED), layers),
        test=read_test(_file(folder, TESTED)),
    )


def _with_refit(run: Run) -> Iterator[Run]:
    """The run, and its refit if there is one, as a run of another method."""
    yield run
    folder = run.folder.refit
    if folder.has(REFITTED):
        refit = read_refit(folder / REFITTED, run.folder.winner if run.folder.has(ADAPTER) else None)
        method = f"{run.setting.method}, searched, refit on {run.spec.protocol.trains_last_on}"
        yield replace(
            run,
            folder=folder,
            setting=run.setting._replace(method=method),
            training=refit.training,
            merged=read_merged(_file(folder, MERGED), run.layers),
            test=read_test(_file(folder, TESTED)),
            refit=refit,
        )


def _file(folder: RunFolder, name: str) -> Path | None:
    return folder / name if folder.has(name) else None


def _check(entries: Entries, spec: RunSpec) -> None:
    """Raise ValueError for entries that the recipe does not know, or that have the wrong type."""
    choices = {"dataset": spec.protocol.datasets, "size": spec.recipe.sizes}
    for name, known in choices.items():
        if entries.text(name) not in known:
            entries.fail(name, f"one of {list(known)}")
    if spec.preset is not None and entries.text("preset") not in PRESETS:
        entries.fail("preset", f"one of {list(PRESETS)}")
    entries.integer("seed")
    entries.optional("shots", Entries.count)
    entries.optional("weights", Entries.text)
    entries.table("fingerprint").optional("weights", Entries.count)


def _method(spec: RunSpec) -> str:
    """The name of a method: a supernet by its size; a preset, which has no budget, by its rank if it has one."""
    if spec.preset is None:
        return f"GLoRA {spec.size}"
    ranked = "lora" in PRESETS[spec.preset].kinds.values()
    return f"preset {spec.preset}, rank {spec.rank}" if ranked else f"preset {spec.preset}"


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
    return (*run.setting, run.spec.protocol.datasets.index(run.task.dataset), run.task.shots or 0, run.seed)
