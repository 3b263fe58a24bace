"""``glora refit``: the searched paths, trained some steps more."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from .interrupts import said
from .next_step import next_step
from .search import saved_again
from .train import GRAPHS


def add_refit(commands) -> None:
    command = commands.add_parser(
        "refit",
        help="train the searched paths some steps more, on training and validation data",
        description=(
            "Train the searched path of one run, or of every run of a folder, from the weights that it inherits from "
            "the supernet: by default 200 steps, on the splits of training and validation together (in few-shot "
            "protocols on the shots alone). The paper does without; the searched winner stays as it is, and all files "
            "of the refit lie in the folder refit/ of the run. The test split is not read. A refit that was cut goes "
            "on where it was; a finished one is left as it is. Under torchrun the processes share each batch."
        ),
        epilog="Then: glora merge FOLDER --test, which merges and tests both.",
    )
    command.add_argument("folder", type=Path, help="a searched run, or a folder of such runs")
    command.add_argument(
        "--set",
        action="append",
        default=[],
        dest="changes",
        metavar="KEY=VALUE",
        help="refit.steps=300, refit.lr=1e-4 (default: that of the training), refit.warmup=0.2 (share of the steps)",
    )
    command.add_argument("--again", action="store_true", help="put an earlier refit aside, and refit anew")
    command.add_argument("--device", default="auto", help="auto (default), cpu, cuda, cuda:1, mps")
    command.add_argument("--graphs", default="auto", choices=GRAPHS, help="CUDA graphs on a GPU, as for glora train")
    command.add_argument("--json", action="store_true", help="print JSON alone, no progress bars")
    command.set_defaults(run=_refit)


def _refit(options: argparse.Namespace) -> int:
    from ..runs import find_runs, process_group, refit_run, refit_settings
    from ..runs.folder import REFIT, REFITTED
    from ..runs.saved import saved_refits
    from ..runs.texts import describe_training

    runs = find_runs(options.folder)
    settings = [refit_settings(run, options.changes) for run in runs]
    folders = [run.path for run in runs]
    options.saved = (
        saved_again(folders, f"{REFIT}/{REFITTED}", saved_refits, "refits")
        if options.again
        else lambda: said(saved_refits(folders))
    )
    with process_group(options.device) as process:
        tell = process.first and not options.json
        done = []
        for run, how in zip(runs, settings):
            if tell:
                print(run.spec.name, flush=True)  # the training itself says where it continues from
            done.append(refit_run(run, how, process.device, again=options.again, progress=tell, graphs=options.graphs))
    if process.first:
        print(json.dumps(done) if options.json else describe_training(done, options.folder))
        if tell:
            print(next_step("merge", options.folder, "--test"))
    return 0
