"""``glora train``: the runs of a protocol from a recipe, or on data of one's own."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from .interrupts import said
from .next_step import next_step

if TYPE_CHECKING:  # nothing here imports PyTorch before a command runs
    from ..protocols import OwnSplit
    from ..runs import RunSpec

SPLIT = "split"  # the folder of a study that the split of own data is written into
_NEEDED = {"data": ("recipe", "weights"), "images": ("model",), "texts": ("model",)}
_ALLOWED = {
    "data": ("dataset", "shots"),
    "images": ("recipe", "weights", "split"),
    "texts": ("recipe", "weights", "split", "text_column", "label_column", "max_length"),
}
GRAPHS = ("auto", "piecewise", "whole", "off")  # those of glora.training, which would import PyTorch


def add_train(commands) -> None:
    command = commands.add_parser(
        "train",
        help="train supernets on a folder of images, a CSV file of texts, or a protocol (VTAB-1K, few-shot, ImageNet)",
        description=(
            "Train a supernet (or, with --preset, one fixed path) for every data set, number of shots and seed "
            "asked for, into a folder each within --out. The data are one of three: --recipe and --data (a protocol), "
            "--images and --model, --texts and --model. The data and the weights are checked first, all of them;"
            " a run that was cut goes on where it was, a finished one is left as it is. Under torchrun the "
            "processes share each batch."
        ),
        epilog="Then: glora search OUT, glora refit OUT, glora merge OUT --test, glora report OUT. More: "
        "docs/own-data.md, docs/protocols.md",
    )
    protocol = command.add_argument_group("a protocol", "needs --recipe, --data and --weights")
    protocol.add_argument("--data", type=Path, metavar="FOLDER", help="where the protocol's data are")
    protocol.add_argument("--dataset", nargs="+", metavar="NAME", help="data sets; default: all")
    protocol.add_argument("--shots", nargs="+", type=int, metavar="K", help="images a class; default: the recipe's")
    own = command.add_argument_group("data of your own", "needs --images or --texts, and --model")
    own.add_argument(
        "--images",
        type=Path,
        metavar="FOLDER",
        help="one folder of images for each class; or train/, val/ and test/ with such folders",
    )
    own.add_argument("--texts", type=Path, metavar="FILE.csv", help="a CSV file with a header and one text in a row")
    own.add_argument("--model", help="a model of timm; for texts a name on Hugging Face's hub, or a folder")
    own.add_argument(
        "--split",
        nargs=3,
        type=float,
        metavar=("TRAIN", "VALIDATION", "TEST"),
        help="per cent of each class, where there are no folders; default: 70 15 15",
    )
    own.add_argument("--text-column", metavar="NAME", help="default: text")
    own.add_argument("--label-column", metavar="NAME", help="default: label")
    own.add_argument("--max-length", type=int, metavar="N", help="tokens of a text at most; default: 128")
    command.add_argument(
        "--recipe", help="vtab1k, fewshot, imagenet, or a TOML file; for your own data a TOML file of changes"
    )
    command.add_argument("--seeds", nargs="+", type=int, metavar="SEED", help="default: the recipe's")
    command.add_argument("--size", help="which of the recipe's sizes, such as 0.29M; default: the first")
    command.add_argument("--preset", help="train a fixed path instead: lora, hira, bitfit, ssf, ... (docs/presets.md)")
    command.add_argument(
        "--weights",
        help="of the backbone: a .npz, .pth or .safetensors file, 'hub' for the download (the default for your own "
        "data), 'none' for random numbers",
    )
    command.add_argument(
        "--balance",
        nargs="?",
        type=float,
        const=0.02,
        metavar="SHARE",
        help="measure the scales of kinds first, so that a step of any kind moves a layer's output by this share of it "
        "at a rate of 0.01 (without a number: 0.02); it stands for --set training.balance=SHARE",
    )
    command.add_argument(
        "--set", action="append", default=[], dest="changes", metavar="KEY=VALUE", help="as training.epochs=10"
    )
    command.add_argument("--out", type=Path, help="the study's folder; default: runs/<recipe, folder or file>")
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
    from ..processes import from_first
    from ..runs import check_runs, process_group, train_run
    from ..runs.saved import saved_trainings
    from ..runs.texts import describe_plan, describe_training

    _require_one_kind_of_data(options)
    if options.balance is not None:
        if options.preset:
            raise ValueError(
                f"balance: expected a supernet, got the preset {options.preset!r}, which has its own scales"
            )
        options.changes.append(f"training.balance={options.balance}")
    out = options.out or Path("runs") / _name(options)
    split = None if options.data is not None else _find_split(options)
    specs = _plan(options) if split is None else _plan_own(options, split, out / SPLIT)
    problems = check_runs(specs)
    if options.dry_run:
        sizes = {} if split is None else split.sizes
        plan = {"out": str(out), "runs": [spec.to_dict() for spec in specs], "missing": problems}
        print(json.dumps({**plan, "split": sizes}) if options.json else describe_plan(specs, out, problems, sizes))
        return 1 if problems else 0
    if problems:
        raise ValueError("data: expected everything that the runs read\n" + "\n".join(problems))
    options.saved = lambda: said(saved_trainings([out / spec.name for spec in specs]))
    with process_group(options.device) as process:
        if split is not None:
            from_first(lambda: split.write(out / SPLIT))
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


def _require_one_kind_of_data(options: argparse.Namespace) -> None:
    """Raise ValueError unless the arguments go together."""
    given = [kind for kind in _NEEDED if getattr(options, kind) is not None]
    if len(given) != 1:
        raise ValueError(
            "expected one of --data FOLDER (with --recipe and --weights), --images FOLDER (with --model) or --texts "
            f"FILE.csv (with --model), got {' and '.join(map(_flag, given)) or 'none'}"
        )
    kind = given[0]
    known = {*_NEEDED[kind], *_ALLOWED[kind]}
    others = {name for names in (*_NEEDED.values(), *_ALLOWED.values()) for name in names} - known
    missing = [name for name in _NEEDED[kind] if getattr(options, name) is None]
    if kind != "data" and options.recipe is not None:
        missing = []  # the file may say the model
    unfit = sorted(name for name in others if getattr(options, name) is not None)
    if missing:
        raise ValueError(f"{_flag(kind)}: expected {' and '.join(map(_flag, missing))} with it, got none")
    if unfit:
        raise ValueError(f"{_flag(kind)}: expected no {' or '.join(map(_flag, unfit))} with it")


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _name(options: argparse.Namespace) -> str:
    """The name of the study by default."""
    return options.images.resolve().name if options.images else Path(options.texts or options.recipe).stem


def _plan(options: argparse.Namespace) -> list[RunSpec]:
    from ..runs import load_recipe, plan_runs

    return plan_runs(
        load_recipe(options.recipe, options.changes),
        options.data,
        datasets=options.dataset or ["all"],
        shots=options.shots,
        seeds=options.seeds,
        size=options.size,
        preset=options.preset,
        weights=None if options.weights == "none" else options.weights,
    )


def _find_split(options: argparse.Namespace) -> OwnSplit:
    from ..protocols import split_images, split_texts

    shares = {} if options.split is None else {"shares": options.split}
    if options.texts is not None:
        return split_texts(options.texts, (options.text_column or "text", options.label_column or "label"), **shares)
    found = split_images(options.images, **shares)
    if options.split is not None and not found.data.shares:
        raise ValueError(f"--split: expected none for {options.images}, which has train/ and val/ already")
    return found


def _plan_own(options: argparse.Namespace, split: OwnSplit, folder: Path) -> list[RunSpec]:
    from ..runs import load_own_recipe, plan_own_runs

    changes = [] if options.max_length is None else [f"texts.max_length={options.max_length}"]
    recipe = load_own_recipe(split.data.protocol, options.model, options.recipe, [*changes, *options.changes])
    split.check(folder)
    return plan_own_runs(
        recipe,
        split.data,
        folder,
        seeds=options.seeds,
        size=options.size,
        preset=options.preset,
        weights=options.weights or "hub",
    )
