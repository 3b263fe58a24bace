"""``glora quickstart``: the demonstration on real data."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

from .interrupts import said


def add_quickstart(commands) -> None:
    command = commands.add_parser(
        "quickstart",
        help="the whole pipeline on real data, on a CPU, in about three minutes",
        description=(
            "Adapt a small backbone to a task from a few samples: linear probe, LoRA, full fine-tuning and others, and "
            "GLoRA (supernet, search, refit, merge). By default a ViT is pre-trained on handwritten digits and adapted "
            "to a shift of them; mnist has more of these (extra demo-mnist), text adapts all-MiniLM-L6-v2 (extra "
            "demo-text). Prints a table; writes quickstart.json, pictures and what was pre-trained into --out."
        ),
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    command.add_argument(
        "--tasks",
        nargs="+",
        default=["digits"],
        metavar="TASK",
        help="digits, mnist or text, which stand for the first of their tasks; or tasks of one of them: inverted, "
        "rotated90; mnist-inverted, mnist-rotated90; plots, spoken, debates, movies",
    )
    command.add_argument(
        "--rows",
        nargs="+",
        metavar="METHOD",
        help="all, or methods beside glora: linear, bitfit, ssf, lora, lora-attention, lora-longer, hira, fixed, "
        "largest, full, glora-paper; the default is a few",
    )
    command.add_argument("--shots", nargs="+", type=int, metavar="K", help="samples a class to train on")
    command.add_argument("--seeds", type=int, metavar="N", help="few-shot draws to average over")
    command.add_argument("--seed", type=int, default=0, help="the first seed")
    command.add_argument("--steps", type=int, help="optimiser steps of every method")
    command.add_argument("--pretraining-steps", type=int, help="optimiser steps of pre-training")
    command.add_argument(
        "--full",
        action="store_true",
        help="all tasks of the domain, 5 seeds, a curve of shots; half an hour for digits",
    )
    command.add_argument("--workers", type=int, default=None, help="processes; the default is one a core")
    command.add_argument("--out", type=Path, default=Path("runs/quickstart"), metavar="FOLDER", help="where files go")
    command.add_argument("--json", action="store_true", help="print JSON alone, no progress bars")
    command.set_defaults(run=_quickstart)


def _quickstart(options: argparse.Namespace) -> int:
    from ..quickstart.figures import save_figures
    from ..quickstart.study import StudySettings, backbone_file, run_study, save_study
    from ..quickstart.table import format_study
    from ..runs.saved import saved_checkpoint

    settings = StudySettings(
        tuple(options.tasks),
        tuple(options.shots or ()),
        options.seeds,
        options.seed,
        options.steps,
        options.pretraining_steps,
        options.workers,
        tuple(options.rows or ()),
    )
    domain = settings.domain
    options.extra = domain.extra
    if options.full:
        settings = replace(settings, tasks=domain.tasks, shots=domain.curve, seeds=5)
    file = backbone_file(options.out, settings)
    options.saved = lambda: _saved(saved_checkpoint(file))
    if not options.json and domain.source is not None:
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
