"""``glora train``: the runs of a protocol, from a recipe."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from .interrupts import said
from .next_step import next_step

GRAPHS = ("auto", "piecewise", "whole", "off")  # those of glora.training, which would import PyTorch


def add_train(commands) -> None:
    command = commands.add_parser(
        "train",
        help="train the supernets of a protocol (VTAB-1K, few-shot, ImageNet) from a recipe",
        description=(
            "Train a supernet (or, with --preset, one fixed path) for every data set, number of shots and seed "
            "asked for, into a folder each within --out. The data and the weights are checked first, all of them;"
            " a run that was cut goes on where it was, a finished one is left as it is. Under torchrun the "
            "processes share each batch."
        ),
        epilog="Then: glora search OUT, glora merge OUT --test, glora report OUT. More: docs/protocols.md",
    )
    command.add_argument("--recipe", required=True, help="vtab1k, fewshot, imagenet, or a TOML file")
    command.add_argument("--data", required=True, type=Path, metavar="FOLDER", help="where the protocol's data are")
    command.add_argument("--dataset", nargs="+", default=["all"], metavar="NAME", help="data sets; default: all")
    command.add_argument("--shots", nargs="+", type=int, metavar="K", help="images a class; default: the recipe's")
    command.add_argument("--seeds", nargs="+", type=int, metavar="SEED", help="default: the recipe's")
    command.add_argument("--size", help="which of the recipe's sizes, such as 0.29M; default: the first")
    command.add_argument("--preset", help="train a fixed path instead: lora, hira, bitfit, ssf, ... (docs/presets.md)")
    command.add_argument(
        "--weights",
        required=True,
        help="of the backbone: a .npz, .pth or .safetensors file, 'hub' for timm's download, 'none' for random numbers",
    )
    command.add_argument(
        "--set", action="append", default=[], dest="changes", metavar="KEY=VALUE", help="as training.epochs=10"
    )
    command.add_argument("--out", type=Path, help="the study's folder; default: runs/<recipe>")
    command.add_argument("--device", default="auto", help="auto (default), cpu, cuda, cuda:1, mps")
    command.add_argument(
        "--graphs",
        default="auto",
        choices=GRAPHS,
        help="CUDA graphs on a GPU: auto (default; piecewise where possible), piecewise, whole, off",
    )
    command.add_argument("--dry-run", action="store_true", help="print the plan and everything missing; train nothing")
    command.add_argument("--json", action="store_true", help="print JSON alone, no progress bars")
    command.set_defaults(run=_train)


def _train(options: argparse.Namespace) -> int:
    from ..runs import check_runs, load_recipe, plan_runs, process_group, train_run
    from ..runs.saved import saved_trainings
    from ..runs.texts import describe_plan, describe_training

    recipe = load_recipe(options.recipe, options.changes)
    out = options.out or Path("runs") / Path(options.recipe).stem
    specs = plan_runs(
        recipe,
        options.data,
        datasets=options.dataset,
        shots=options.shots,
        seeds=options.seeds,
        size=options.size,
        preset=options.preset,
        weights=None if options.weights == "none" else options.weights,
    )
    problems = check_runs(specs)
    if options.dry_run:
        plan = {"out": str(out), "runs": [spec.to_dict() for spec in specs], "missing": problems}
        print(json.dumps(plan) if options.json else describe_plan(specs, out, problems))
        return 1 if problems else 0
    if problems:
        raise ValueError("data: expected everything that the runs read\n" + "\n".join(problems))
    options.saved = lambda: said(saved_trainings([out / spec.name for spec in specs]))
    with process_group(options.device) as process:
        tell = process.first and not options.json
        summaries = []
        for spec in specs:
            if tell:
                print(spec.name, flush=True)  # the training itself says where it continues from
            summaries.append(train_run(out, spec, process.device, tell, options.graphs))
    if process.first:
        print(json.dumps(summaries) if options.json else describe_training(summaries, out))
        if tell:
            print(next_step("merge", out, "--test") if options.preset else next_step("search", out))
    return 0
