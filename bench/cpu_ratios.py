"""Speed on a CPU in fp32 against the peers: ratios from interleaved runs.

    python -m bench.cpu_ratios --threads 1

layer: one layer, forward and backward from a given dy, at three shapes, rank 8.
model: a training step of ViT-B/16 at batch 4, rank 4: forward, cross-entropy, backward, AdamW.

Everything is checked against the fp64 reference first, and not timed if it is wrong.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import asdict
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

import glora
from glora import PathConfig, SearchSpace
from glora.config import KINDS

from .peers import (
    FROZEN,
    GLORA,
    LORA,
    OFFICIAL,
    OURS,
    Entrants,
    all_low_rank,
    check_entrants,
    lora,
    make_entrants,
    set_paths,
)
from .tasks import ClassifierTask, LayerTask
from .timing import Times, interleave, ratio

SEED = 0
LAYER_SHAPES = ((1576, 768, 3072), (1576, 3072, 768), (512, 2048, 2048))  # tokens, in, out
LAYER_RANK = 8
LAYER_TOLERANCE = 1e-5
MODEL = "vit_base_patch16_224"
MODEL_LINEARS = 48
MODEL_BATCH = 4
MODEL_RANK = 4
MODEL_TOLERANCE = 1e-3
# Under a layer norm the gradient of a constant is a sum that cancels to nothing: the layers check these.
MODEL_CHECK_SPACE = SearchSpace(
    ranks=(MODEL_RANK,), B=("lora", "vector", "none"), D=("vector", "none"), E=("vector", "none")
)

A_VECTOR = "ours, A vector"
A_VECTOR_B = "ours, A vector, B low rank"
A_VECTOR_B_CDE = "ours, A vector, B low rank, CDE vectors"
B_LOW_RANK = "ours, B low rank"
AB_LOW_RANK = "ours, A and B low rank"
ALL_LOW_RANK = "ours, all low rank"
FIXED_PATHS = {
    A_VECTOR: PathConfig("vector"),
    A_VECTOR_B: PathConfig("vector", f"lora_{LAYER_RANK}"),
    A_VECTOR_B_CDE: PathConfig("vector", f"lora_{LAYER_RANK}", "vector", "vector", "vector"),
    B_LOW_RANK: lora(LAYER_RANK),
    AB_LOW_RANK: PathConfig(f"lora_{LAYER_RANK}", f"lora_{LAYER_RANK}"),
    ALL_LOW_RANK: all_low_rank(LAYER_RANK),
}
Clock = Callable[[], float]
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


class Comparison(NamedTuple):
    """Whose time is divided by whose, and what the ratio is to be at most, if anything."""

    candidate: str
    baseline: str
    target: float | None = None


LAYER_COMPARISONS = (
    Comparison(A_VECTOR, LORA, 1.04),
    *(Comparison(name, LORA) for name in (*FIXED_PATHS, OURS) if name != A_VECTOR),
    Comparison(OURS, OFFICIAL),
    Comparison(ALL_LOW_RANK, GLORA),
    *(Comparison(name, LORA) for name in (OFFICIAL, GLORA)),
    *(Comparison(name, FROZEN) for name in (A_VECTOR, OURS, LORA, OFFICIAL, GLORA)),
)
MODEL_COMPARISONS = (
    Comparison(OURS, OFFICIAL, 0.84),
    Comparison(OURS, GLORA, 0.49),
    Comparison(OURS, LORA, 1.08),
    *(Comparison(name, FROZEN) for name in (OURS, LORA, OFFICIAL, GLORA)),
)


# -- one layer -------------------------------------------------------------------------------------


def measure_layer(shape: tuple[int, int, int], rounds: int, clock: Clock) -> dict[str, Any]:
    """Check and time one layer; the time of random paths is the mean over :func:`spread_paths`."""
    tokens, inputs, outputs = shape
    torch.manual_seed(SEED)
    backbone = nn.Sequential(OrderedDict(linear=nn.Linear(inputs, outputs)))
    entrants = make_entrants(backbone, ["linear"], LAYER_RANK)
    task = LayerTask(torch.randn(tokens, inputs).requires_grad_(), torch.randn(tokens, outputs))
    paths = spread_paths(LAYER_RANK, torch.Generator().manual_seed(SEED))
    path_sets = [{"linear": path} for path in (*FIXED_PATHS.values(), *paths)]
    error = check_entrants(entrants, task, path_sets, LAYER_TOLERANCE)

    times = interleave(_layer_steps(entrants, task, paths), rounds, clock=clock)
    for name in (OURS, OFFICIAL):
        times[name] = [seconds / len(paths) for seconds in times[name]]
    title = f"layer {tokens} x {inputs} -> {outputs}, rank {LAYER_RANK}"
    return summary(title, times, LAYER_COMPARISONS, LAYER_TOLERANCE, error)


def _layer_steps(entrants: Entrants, task: LayerTask, paths: list[PathConfig]) -> dict[str, Callable[[], object]]:
    """What a round runs, in order: the closely compared side by side."""

    def run(name: str, *paths: PathConfig) -> Callable[[], object]:
        model = entrants[name]

        def steps() -> None:
            for path in paths:
                glora.set_paths(model, {"linear": path})
                task.step(model)

        return steps if paths else functools.partial(task.step, model)

    fixed = {name: run(OURS, path) for name, path in FIXED_PATHS.items()}
    first = (A_VECTOR_B_CDE, A_VECTOR_B, A_VECTOR)
    return {
        FROZEN: run(FROZEN),
        **{name: fixed.pop(name) for name in first},
        LORA: run(LORA),
        **fixed,
        GLORA: run(GLORA),
        OURS: run(OURS, *paths),
        OFFICIAL: run(OFFICIAL, *paths),
    }


def spread_paths(rank: int, generator: torch.Generator) -> list[PathConfig]:
    """16 paths: every pair of kinds of A and B once, C, D and E drawn uniformly.

    A and B decide the cost, so that the mean over these estimates the mean over all 432 paths far
    better than 16 free draws would.
    """
    kinds = {slot: SearchSpace(ranks=(rank,)).options[slot] for slot in KINDS}
    drawn = SearchSpace(ranks=(rank,)).sample_many(16, generator)
    pairs = [(a, b) for a in kinds["A"] for b in kinds["B"]]
    return [PathConfig(a, b, path.C, path.D, path.E) for (a, b), path in zip(pairs, drawn, strict=True)]


# -- the whole model -------------------------------------------------------------------------------


def measure_model(rounds: int, clock: Clock) -> dict[str, Any]:
    """Check and time training steps; ours and the official formula get the same new paths every round."""
    import timm

    torch.manual_seed(SEED)
    backbone = timm.create_model(MODEL).train()
    with torch.no_grad():
        for parameter in backbone.parameters():
            if parameter.dim() == 1:  # biases and norms, off the zeros and ones they start at
                parameter.add_(torch.randn_like(parameter), alpha=0.02)
    names = [name for name, module in backbone.named_modules() if type(module) is nn.Linear and name != "head"]
    if len(names) != MODEL_LINEARS:
        raise ValueError(f"{MODEL}: expected {MODEL_LINEARS} linear layers beside the head, got {len(names)}")
    entrants = make_entrants(backbone, names, MODEL_RANK)
    task = ClassifierTask(torch.randn(MODEL_BATCH, 3, 224, 224), torch.randint(1000, (MODEL_BATCH,)))
    generator = torch.Generator().manual_seed(SEED)
    check_paths = glora.sample_paths(entrants[OURS], MODEL_CHECK_SPACE, generator)
    error = check_entrants(entrants, task, [check_paths], MODEL_TOLERANCE)

    def draw_paths() -> None:
        set_paths(entrants, glora.sample_paths(entrants[OURS], SearchSpace(ranks=(MODEL_RANK,)), generator))

    steps = {name: _training_step(model, task) for name, model in entrants.items()}
    times = interleave(steps, rounds, prepare=draw_paths, clock=clock)
    title = f"training step of {MODEL}, batch {MODEL_BATCH}, rank {MODEL_RANK}"
    return summary(title, times, MODEL_COMPARISONS, MODEL_TOLERANCE, error)


def _training_step(model: nn.Module, task: ClassifierTask) -> Callable[[], object]:
    parameters = glora.trainable_parameters(model)
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=1e-4) if parameters else None

    def step() -> None:
        task.step(model)
        if optimizer is not None:
            optimizer.step()

    return step


# -- the report ------------------------------------------------------------------------------------


def summary(
    title: str, times: Times, comparisons: tuple[Comparison, ...], tolerance: float, error: float
) -> dict[str, Any]:
    """The figures of one interleaved run, as plain data."""
    return {
        "title": title,
        "check": {"tolerance": tolerance, "largest_relative_error": error},
        "seconds": times,
        "ratios": [_judged(times, comparison) for comparison in comparisons],
    }


def _judged(times: Times, comparison: Comparison) -> dict[str, Any]:
    found = ratio(times, comparison.candidate, comparison.baseline)
    met = None if comparison.target is None else found.median <= comparison.target
    return {**comparison._asdict(), **asdict(found), "met": met}


def table(section: dict[str, Any]) -> str:
    """A section as text."""
    check = section["check"]
    lines = [
        section["title"],
        f"  relative error against fp64 {check['largest_relative_error']:.1e}, allowed {check['tolerance']:.0e}",
        f"  {'ratio of times':52}  median  [min, max]      seconds",
    ]
    for row in section["ratios"]:
        pair = f"{row['candidate']} / {row['baseline']}"
        spread = f"[{row['low']:.3f}, {row['high']:.3f}]"
        seconds = f"{row['candidate_seconds']:7.4f} / {row['baseline_seconds']:.4f}"
        target = "" if row["met"] is None else f"  target {row['target']}: {'met' if row['met'] else 'MISSED'}"
        lines.append(f"  {pair:52}  {row['median']:6.3f}  {spread}  {seconds}{target}")
    return "\n".join(lines)


def environment() -> dict[str, Any]:
    """What the figures depend on."""
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": "cpu",
        "cpu": _cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "load_average": os.getloadavg(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{package: version(package) for package in ("torch", "peft", "timm")},
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.cpu_ratios", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (default: 1)")
    parser.add_argument("--rounds", type=int, default=11, help="interleaved rounds (default: 11)")
    parser.add_argument(
        "--clock",
        choices=CLOCKS,
        default="wall",
        help="wall: what a user waits (default); cpu: time the process was given, for one thread on a busy machine",
    )
    parser.add_argument("--only", choices=("layer", "model"), help="one of the two parts")
    parser.add_argument("--out", type=Path, default=Path("bench/results/cpu_ratios.json"), help="JSON file to write")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    report: dict[str, Any] = {
        "environment": environment(),
        "clock": options.clock,
        "rounds": options.rounds,
        "sections": [],
    }
    print(", ".join(f"{name} {value}" for name, value in report["environment"].items()), flush=True)

    measures: list[Callable[[int, Clock], dict[str, Any]]] = []
    if options.only != "model":
        measures += [functools.partial(measure_layer, shape) for shape in LAYER_SHAPES]
    if options.only != "layer":
        measures.append(measure_model)
    for measure in measures:
        section = measure(options.rounds, CLOCKS[options.clock])
        report["sections"].append(section)
        print("\n" + table(section), flush=True)
    report["environment"]["load_average_after"] = os.getloadavg()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=1) + "\n")
    print(f"\nwritten: {options.out}")


if __name__ == "__main__":
    main()
