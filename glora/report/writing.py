"""The report of a run or a study: figures, tables and the page that shows them, in one folder."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from ..files import make_folder
from ..progress import progress_bar
from ..protocols import OWN
from .drawing import NotDrawn, distinct, file_stem, save_figure, write_text
from .figures.distribution import distribution_figure
from .figures.features import features_figure
from .figures.fewshot import few_shot_figure
from .figures.path import path_figure
from .figures.search import search_figure
from .figures.training import training_figure
from .figures.vtab import vtab_figure
from .loading import load_runs
from .overview import overview_markdown, overview_text
from .runs import Run, Setting
from .seeds import Tasks, by_setting
from .tables.fewshot import few_shot_table
from .tables.imagenet import imagenet_table
from .tables.own import own_table
from .tables.table import Table
from .tables.vtab import vtab_table

Settings = Mapping[Setting, Tasks]
Figures = Mapping[str, Sequence[Path] | NotDrawn]


@dataclass(frozen=True)
class ReportFiles:
    """The files that were written, and a few lines for the terminal."""

    files: tuple[Path, ...]
    text: str


class _Drawing(NamedTuple):
    """A figure to be drawn; ``draw`` returns None if there is nothing yet, NotDrawn if it cannot be drawn."""

    stem: str
    caption: str
    draw: Callable[[], Any | NotDrawn | None]


class _Section(NamedTuple):
    title: str
    drawings: Sequence[_Drawing]


def write_report(folder: str | os.PathLike, out: str | os.PathLike | None = None, progress: bool = True) -> ReportFiles:
    """Write the paper's figures and tables of a run, or of a folder of runs.

    Unfinished runs are allowed: the report says what is missing, and nothing is put in its place.

    Args:
        folder: a run, or a folder of runs.
        out: the folder to write into, made if it does not exist; default: ``report`` in ``folder``. Files of an
            earlier report are replaced.
        progress: show a progress bar.

    Returns:
        The files, the page ``report.md`` first, and a summary.

    Raises:
        ValueError: no run there, or a file of a run that is damaged or does not belong to it; ``out`` is a file.
    """
    runs = load_runs(folder)
    target = Path(folder) / "report" if out is None else Path(out)
    make_folder("out", target)
    groups = _by_protocol_and_backbone(by_setting(runs))
    tables = [table for (protocol, backbone), each in groups.items() for table in _tables(protocol, backbone, each)]
    tables = [replace(table, stem=stem) for table, stem in zip(tables, distinct(table.stem for table in tables))]
    study = _Section("Figures", [one for key, each in groups.items() for one in _study_drawings(*key, each)])
    sections = _with_distinct_stems([study, *(_Section(run.name, _run_drawings(run)) for run in runs)])
    figures = _draw_all(sections, target, progress)
    texts = {f"{table.stem}.csv": table.to_csv() for table in tables}
    texts |= {f"{table.stem}.md": table.to_markdown() for table in tables}
    written = [write_text(target / name, text) for name, text in texts.items()]
    page = write_text(target / "report.md", _page(runs, tables, sections, figures))
    pictures = [file for figure in figures.values() if not isinstance(figure, NotDrawn) for file in figure]
    files = (page, *written, *pictures)
    return ReportFiles(files, f"{overview_text(runs)}\n\nWritten: {page} and {len(files) - 1} more files beside it")


def _by_protocol_and_backbone(settings: Settings) -> dict[tuple[str, str], dict[Setting, Tasks]]:
    found: dict[tuple[str, str], dict[Setting, Tasks]] = {}
    for setting, tasks in settings.items():
        found.setdefault((setting.protocol, setting.backbone), {})[setting] = tasks
    return found


def _tables(protocol: str, backbone: str, settings: Settings) -> list[Table]:
    if protocol == "imagenet":
        shots = sorted({task.shots for tasks in settings.values() for task in tasks}, key=lambda shots: shots or 0)
        return [imagenet_table(backbone, each, settings) for each in shots]
    if protocol in OWN:
        return [own_table(protocol, backbone, settings)]
    return [{"vtab1k": vtab_table, "fewshot": few_shot_table}[protocol](backbone, settings)]


def _study_drawings(protocol: str, backbone: str, settings: Settings) -> Iterable[_Drawing]:
    whole = {"vtab1k": vtab_figure, "fewshot": few_shot_figure}
    if protocol in whole:
        caption = f"Test accuracy, {backbone}"
        yield _Drawing(file_stem("accuracy", protocol, backbone), caption, partial(whole[protocol], backbone, settings))
    for setting, tasks in settings.items():
        if any(run.refit for runs in tasks.values() for run in runs):
            continue  # the paths are those of the searched runs
        caption = f"Share of trained parameters, {setting.method}, {backbone} (the paper's Figure 3)"
        yield _Drawing(file_stem("parameters", *setting), caption, partial(distribution_figure, setting, tasks))


def _run_drawings(run: Run) -> list[_Drawing]:
    """The figures of a run; a refit has the path and the search of its run."""
    kinds = {
        "paths": ("Path of every layer (the paper's Figure 4)", path_figure),
        "search": ("Search: progress, and quality against parameters", search_figure),
        "training": ("Training", training_figure),
        "features": ("Features by t-SNE (the paper's Figure 5)", features_figure),
    }
    return [
        _Drawing(file_stem(run.name, kind), caption, partial(draw, run))
        for kind, (caption, draw) in kinds.items()
        if not run.refit or kind not in ("paths", "search")
    ]


def _with_distinct_stems(sections: Sequence[_Section]) -> list[_Section]:
    """The same figures with distinct file names, also for the runs "a b" and "a_b"."""
    stems = iter(distinct(drawing.stem for section in sections for drawing in section.drawings))
    return [
        section._replace(drawings=[drawing._replace(stem=next(stems)) for drawing in section.drawings])
        for section in sections
    ]


def _draw_all(sections: Sequence[_Section], target: Path, progress: bool) -> Figures:
    """The files of each figure that has something to show, or why it cannot be drawn, by stem."""
    drawings = [drawing for section in sections for drawing in section.drawings]
    found: dict[str, Sequence[Path] | NotDrawn] = {}
    for drawing in progress_bar(drawings, desc="report", unit="figure", shown=progress):
        figure = drawing.draw()
        if isinstance(figure, NotDrawn):
            found[drawing.stem] = figure
        elif figure is not None:
            found[drawing.stem] = save_figure(figure, target, drawing.stem)
    return found


def _page(runs: Sequence[Run], tables: Sequence[Table], sections: Sequence[_Section], figures: Figures) -> str:
    """``report.md``: the overview, the tables, the figures of the study, then those of each run, folded."""
    study, *others = sections
    lines = ["# Report", "", *overview_markdown(runs), "", "## Tables", ""]
    for table in tables:
        lines += [table.to_markdown(), f"[As CSV]({table.stem}.csv), [as markdown]({table.stem}.md)", ""]
    lines += ["## Figures", "", *_pictures(study, figures), "## Runs", ""]
    for section, run in zip(others, runs):
        pictures = _pictures(section, figures) or ["Nothing to show yet.", ""]
        lines += [f"<details><summary>{section.title}: {run.title}</summary>", "", *pictures, "</details>", ""]
    return "\n".join(lines)


def _pictures(section: _Section, figures: Figures) -> list[str]:
    lines = []
    for drawing in section.drawings:
        figure = figures.get(drawing.stem)
        if isinstance(figure, NotDrawn):
            lines += [f"{drawing.caption}: not drawn. {figure.reason[0].upper()}{figure.reason[1:]}.", ""]
        elif figure is not None:
            png, svg = (file.name for file in figure)
            lines += [f"{drawing.caption} ([SVG]({svg}))", "", f"![{drawing.caption}]({png})", ""]
    return lines
