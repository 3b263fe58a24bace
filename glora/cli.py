"""The command line: arguments in, one function called, text or JSON out."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from .version import __version__


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``glora``; returns the exit status: 0, 1 for a failed check, 2 for bad arguments."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        return options.run(options)
    except (ValueError, TypeError, OSError) as error:
        print(f"glora {options.command}: error: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        extra = getattr(options, "extra", "demo")
        print(f"glora {options.command}: error: {error}; pip install 'glora[{extra}]'", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="glora",
        description="GLoRA: adapt a frozen model with small support tensors, search the best ones, merge for free.",
        epilog="Start with: glora quickstart",
    )
    parser.add_argument("--version", action="version", version=f"glora {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    _add_quickstart(commands)
    _add_report(commands)
    _add_bench(commands)
    _add_doctor(commands)
    return parser


def _add_quickstart(commands) -> None:
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
    from .quickstart.figures import save_figures
    from .quickstart.study import FEW_SHOT_CURVE, StudySettings, run_study, save_study
    from .quickstart.table import format_study

    tasks, shots, seeds = tuple(options.tasks), tuple(options.shots), options.seeds
    if options.full:
        tasks, shots, seeds = ("inverted", "rotated90"), FEW_SHOT_CURVE, 5
    settings = StudySettings(
        tasks, shots, seeds, options.seed, options.steps, options.pretraining_steps, options.workers
    )
    study = run_study(settings, options.out, progress=not options.json)
    file = save_study(study, options.out)
    figures = save_figures(study, options.out)
    if options.json:
        print(json.dumps(study))
    else:
        print(f"\n{format_study(study)}\n\nWritten: {file}")
        print("\n".join(f"         {figure}" for figure in figures))
    return 0 if all(summary["merge"]["agreement"] == 1.0 for summary in study["summary"]) else 1


def _add_report(commands) -> None:
    command = commands.add_parser(
        "report",
        help="table and pictures again, from the JSON of an earlier quickstart",
        description="Print the table of an earlier quickstart and write its pictures beside its JSON.",
    )
    command.add_argument("file", type=Path, help="quickstart.json")
    command.add_argument("--json", action="store_true", help="print the summary as JSON alone")
    command.set_defaults(run=_report)


def _report(options: argparse.Namespace) -> int:
    from .quickstart.figures import save_figures
    from .quickstart.study import load_study
    from .quickstart.table import format_study

    study = load_study(options.file)
    figures = save_figures(study, options.file.parent)
    if options.json:
        print(json.dumps(study["summary"]))
    else:
        print(format_study(study))
        print("\nWritten: " + "\n         ".join(str(figure) for figure in figures))
    return 0


def _add_bench(commands) -> None:
    from .benchmarks import GROUPS

    command = commands.add_parser(
        "bench",
        help="speed, memory and exactness against the frozen layer and the peers, on this machine",
        description=(
            "Check, then time ours and its peers in interleaved rounds; write results.json, table.md and pictures into "
            "--out. Exits with 1 if anything was wrong. The default takes about four minutes on two CPU cores."
        ),
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    command.add_argument(
        "--only", nargs="+", choices=GROUPS, default=list(GROUPS), metavar="GROUP", help=", ".join(GROUPS)
    )
    command.add_argument(
        "--shapes", default="small", help="by commas: small, square, vit_b, swin_b, llama7b, llama3b; all"
    )
    command.add_argument(
        "--dtype", default="float32", choices=("float32", "float16", "bfloat16"), help="of the weights"
    )
    command.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="where to run")
    command.add_argument("--rounds", type=int, default=7, help="timed rounds")
    command.add_argument("--threads", type=int, default=1, help="of torch on a CPU")
    command.add_argument("--clock", default="wall", choices=("wall", "cpu"), help="on a CPU: passed, or given time")
    command.add_argument("--out", type=Path, default=Path("runs/bench"), metavar="FOLDER", help="where files go")
    command.add_argument("--json", action="store_true", help="print results.json alone; the rest to standard error")
    command.set_defaults(run=_bench, extra="bench")


def _bench(options: argparse.Namespace) -> int:
    from .benchmarks import run_benchmarks

    names = ("shapes", "dtype", "device", "rounds", "threads", "clock")
    arguments = [text for name in names for text in (f"--{name}", str(getattr(options, name)))]
    status = run_benchmarks(options.only, arguments, options.out, quiet=options.json)
    if status in (0, 1):
        file = options.out / "results.json"
        print(file.read_text() if options.json else f"\nWritten: {options.out}")
    return status


def _add_doctor(commands) -> None:
    command = commands.add_parser(
        "doctor",
        help="versions, devices, backends, and why others are not available",
        description="Say what this machine offers GLoRA. Exits with 1 if something required is missing.",
    )
    command.add_argument("--json", action="store_true", help="print JSON")
    command.set_defaults(run=_doctor)


def _doctor(options: argparse.Namespace) -> int:
    from .doctor import examine, format_findings

    findings = examine()
    print(json.dumps(findings) if options.json else format_findings(findings))
    return 1 if findings["problems"] else 0
