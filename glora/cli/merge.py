"""``glora merge``: the winners as plain models, and their test."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from .next_step import next_step


def add_merge(commands) -> None:
    command = commands.add_parser(
        "merge",
        help="merge the winners into plain models; --test reads the test split, once",
        description=(
            "Merge the searched path (or the preset) of one run, or of every run of a folder, into a model of plain "
            "layers: merged.safetensors, for timm.create_model(...).load_state_dict; and its refit, if there is one, "
            "into another, in the folder refit/ of the run. With --test each is tested, once: a second time prints the "
            "first result."
        ),
    )
    command.add_argument("folder", type=Path, help="a run, or a folder of runs")
    command.add_argument("--test", action="store_true", help="evaluate the merged models on the test split")
    command.add_argument("--device", default="auto", help="auto (default), cpu, cuda, cuda:1, mps")
    command.add_argument("--json", action="store_true", help="print JSON alone, no progress bars")
    command.set_defaults(run=_merge)


def _merge(options: argparse.Namespace) -> int:
    from ..runs import choose_device, evaluate_run, find_runs, merge_run, winners
    from ..runs.saved import unfinished_refit
    from ..runs.texts import describe_merges

    found = [winner for run in find_runs(options.folder) for winner in winners(run)]
    device = choose_device(options.device)
    merged: list[dict[str, Any]] = []
    options.saved = lambda: f"done: {len(merged)} of {len(found)} winners; the same command line continues"
    for winner in found:
        model, summary = merge_run(winner, device)
        if options.test:
            summary["test"] = evaluate_run(winner, model, device, progress=not options.json)
        merged.append(summary)
    print(json.dumps(merged) if options.json else describe_merges(merged))
    if not options.json:
        for begun in filter(None, (unfinished_refit(run.path) for run in find_runs(options.folder))):
            print(f"not merged: an unfinished refit, {begun}; `glora refit` continues it")
        print(next_step("report", options.folder))
    return 0
