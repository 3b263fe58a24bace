"""``glora report``: tables and pictures, from the files of a study."""

from __future__ import annotations

import argparse
import json
from pathlib import Path


def add_report(commands) -> None:
    command = commands.add_parser(
        "report",
        help="tables and pictures, from the folder of a protocol's runs or from quickstart.json",
        description=(
            "Of a run, or a folder of runs: the paper's figures (parameters by layer type, paths, t-SNE, progress"
            " of the search, few-shot curves) and tables, as PNG, SVG, markdown and CSV, beside the published "
            "numbers, marked as such; refits in columns of their own. Of quickstart.json: its table and pictures again."
        ),
    )
    command.add_argument("folder", type=Path, help="a run, a folder of runs, or quickstart.json")
    command.add_argument("--out", type=Path, help="where files go; default: FOLDER/report, or beside quickstart.json")
    command.add_argument("--json", action="store_true", help="print JSON alone")
    command.set_defaults(run=_report)


def _report(options: argparse.Namespace) -> int:
    if options.folder.is_file() or options.folder.suffix == ".json":
        return _report_quickstart(options)
    from ..report import write_report

    written = write_report(options.folder, options.out, progress=not options.json)
    print(json.dumps({"files": [str(file) for file in written.files]}) if options.json else written.text)
    return 0


def _report_quickstart(options: argparse.Namespace) -> int:
    from ..files import make_folder
    from ..quickstart.figures import save_figures
    from ..quickstart.study import load_study
    from ..quickstart.table import format_study

    study = load_study(options.folder)
    out = options.out or options.folder.parent
    make_folder("out", out)
    figures = save_figures(study, out)
    if options.json:
        print(json.dumps(study["summary"]))
    else:
        print(format_study(study))
        print("\nWritten: " + "\n         ".join(str(figure) for figure in figures))
    return 0
