"""``glora quickstart``: the demonstration on real data."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from .interrupts import said


def add_quickstart(commands) -> None:
    command = commands.add_parser(
        "quickstart",
        help="the whole pipeline on real data, on a CPU, in about three minutes",
        description=(
            "Pre-train a small ViT on handwritten digits, then adapt it to a shifted task from a few images: "
            "linear probe, BitFit, SSF, LoRA, full fine-tuning, and GLoRA (supernet, search, merge). "
            "Prints a table; writes quickstart.json, pictures and the pre-trained backbone into --out."
        ),
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    command.add_argument("--tasks", nargs="+", default=["inverted"], metavar="TASK", help="inverted, rotated90")
    command.add_argument("--shots", nargs="+", type=int, default=[16], metavar="K", help="images a class to train on")
    command.add_argument("--seeds", type=int, default=3, metavar="N", help="few-shot draws to average over")
    command.add_argument("--seed", type=int, default=0, help="the first seed")
    command.add_argument("--steps", type=int, default=500, help="optimiser steps of every method")
    command.add_argument("--pretraining-steps", type=int, default=1000, help="optimiser steps of pre-training")
    command.add_argument("--full", action="store_true", help="both tasks, 5 seeds, 1 to 16 shots; about half an hour")
    command.add_argument("--workers", type=int, default=None, help="processes; the default is one a core")
    command.add_argument("--out", type=Path, default=Path("runs/quickstart"), metavar="FOLDER", help="where files go")
    command.add_argument("--json", action="store_true", help="print JSON alone, no progress bars")
    command.set_defaults(run=_quickstart)


def _quickstart(options: argparse.Namespace) -> int:
    from ..quickstart.figures import save_figures
    from ..quickstart.study import FEW_SHOT_CURVE, StudySettings, backbone_file, run_study, save_study
    from ..quickstart.table import format_study
    from ..runs.saved import saved_checkpoint

    tasks, shots, seeds = tuple(options.tasks), tuple(options.shots), options.seeds
    if options.full:
        tasks, shots, seeds = ("inverted", "rotated90"), FEW_SHOT_CURVE, 5
    settings = StudySettings(
        tasks, shots, seeds, options.seed, options.steps, options.pretraining_steps, options.workers
    )
    file = backbone_file(options.out, settings)
    options.saved = lambda: _saved(saved_checkpoint(file))
    if not options.json:
        print("pre-training", flush=True)  # the training itself says where it continues from
    study = run_study(settings, options.out, progress=not options.json)
    written = save_study(study, options.out)
    figures = save_figures(study, options.out)
    if options.json:
        print(json.dumps(study))
    else:
        print(f"\n{format_study(study)}\n\nWritten: {written}")
        print("\n".join(f"         {figure}" for figure in figures))
    return 0 if all(summary["merge"]["agreement"] == 1.0 for summary in study["summary"]) else 1


def _saved(pretraining: str | None) -> str:
    """What is saved: the pre-training; the adaptations after it are saved only once all are done."""
    return said(pretraining and f"the pre-training, {pretraining}")
