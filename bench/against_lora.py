"""A layer and a whole ViT on a CPU against PEFT's LoRA, at one and two threads, with the passes in C++ and without.

    python -m bench.against_lora --out FOLDER

Everyone is held against fp64 first. In the model all steps are interleaved, and ours take new random paths in each
round, with and without the passes the same. CPU time at one thread, wall time at two: it wants a quiet machine.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any
from unittest.mock import patch

import torch

import glora
from glora import PathConfig, SearchSpace
from glora.sampling import PathSampler
from glora_kernels import cpu_passes_fault, recompute_inputs
from glora_kernels._torch import passes

from . import counting
from .entrants import names as who
from .environment import environment
from .figures import versions, write_figures
from .measurements.layer import NAME, make_layer
from .measurements.model import make_checked, training_step
from .settings import SEED, Settings
from .shapes import Layer, Model
from .timing import Timed, Watch, interleave, ratio, total
from .workloads import step

LAYERS = (
    Layer("fc1", (1576, 1576), 768, 3072),
    Layer("fc2", (1576, 1576), 3072, 768),
    Layer("square", (512, 512), 2048, 2048),
)
EQUAL = "LoRA's own path"
PATHS = {  # of rank 8
    EQUAL: PathConfig(B="lora_8"),
    "A vector, B low rank, C, D, E vectors": PathConfig("vector", "lora_8", "vector", "vector", "vector"),
    "B vector, D, E vectors": PathConfig(B="vector", D="vector", E="vector"),
    "A, B, C low rank, D, E vectors": who.all_low_rank(8),
}
SPACES = ((4,), (8, 4))  # ranks
VIT = "vit_base_patch16_224"
WITHOUT, WITH = "PyTorch alone", "C++ passes"
ENTRANTS = (who.LORA, who.OURS)
PACKAGES = ("torch", "timm", "peft")  # on which the figures depend


@contextmanager
def without_passes() -> Iterator[None]:
    """A ``with`` block in which the torch backend takes PyTorch's operations alone."""
    with patch.object(passes, "takes", lambda matrix: False):
        yield


def both(name: str, timed: Timed) -> dict[str, Timed]:
    """``timed`` with and without the passes, if they are there."""

    def alone(watch: Watch) -> None:
        with without_passes():
            timed(watch)

    found: dict[str, Timed] = {f"{name}, {WITHOUT}": alone}
    return found if cpu_passes_fault() is not None else {**found, f"{name}, {WITH}": timed}


def measure_layer(layer: Layer, settings: Settings) -> list[dict[str, Any]]:
    """Forward and backward on each of ``PATHS``."""
    field, workload = make_layer(layer, settings, ENTRANTS)
    field.check(workload, [{NAME: path} for path in PATHS.values()], settings.layer_tolerance)

    def on(path: PathConfig) -> Timed:
        def timed(watch: Watch) -> None:
            field.set_path(path)
            step(workload, field.models[who.OURS])(watch)

        return timed

    functions: dict[str, Timed] = {who.LORA: step(workload, field.models[who.LORA])}
    for name, path in PATHS.items():
        functions |= both(name, on(path))
    title = f"{layer.tokens_on('cpu')} x {layer.inputs} -> {layer.outputs}, rank {layer.rank}"
    return rows(title, functions, settings, None)


def measure_model(ranks: tuple[int, ...], settings: Settings) -> list[dict[str, Any]]:
    """A training step with random paths of these ranks; LoRA has the largest."""
    field, workload, _, _ = make_checked(Model(VIT, (4, 4), 48, max(ranks)), settings, ENTRANTS)
    layers = glora.glora_layers(field.models[who.OURS])
    sampler = PathSampler({name: layer.shape for name, layer in layers.items()}, SearchSpace(ranks))
    generator = torch.Generator().manual_seed(SEED)
    functions = {who.LORA: training_step(workload, field.models[who.LORA])}
    functions |= both("random paths", training_step(workload, field.models[who.OURS]))
    title = f"training step of {VIT}, batch 4, ranks {', '.join(map(str, ranks))}"
    return rows(title, functions, settings, lambda: field.set_paths(sampler.sample(generator)))


def rows(
    title: str, functions: dict[str, Timed], settings: Settings, prepare: Callable[[], object] | None
) -> list[dict[str, Any]]:
    """The ratio of every function to LoRA's."""
    times = total(interleave(functions, settings.rounds, prepare=prepare, watch=settings.watch()))
    found = []
    for name in list(functions)[1:]:
        path, _, way = name.rpartition(", ")
        row = {"what": title, "path": path, "way": way, "threads": settings.threads}
        found.append({**row, **asdict(ratio(times, name, who.LORA))})
    return found


def measure_memory(settings: Settings, paths: int) -> list[dict[str, Any]]:
    """Bytes kept for backward and the peak of a step at rank 4: the mean over random paths, in parts of LoRA's."""
    field, workload, sampler, _ = make_checked(Model(VIT, (4, 4), 48, 4), settings, ENTRANTS)
    generator = torch.Generator().manual_seed(SEED)
    drawn = [sampler.sample(generator) for _ in range(paths)]

    def count(name: str) -> dict[str, float]:
        return counting.memory(workload, field.models[name], (workload.images,), "cpu")

    lora, found = count(who.LORA), []
    for title, recomputes in (("inputs formed again", True), ("inputs kept", False)):
        with recompute_inputs(recomputes):
            each = []
            for own in drawn:
                field.set_paths(own)
                each.append(count(who.OURS))
        means = {key: mean(one[key] for one in each) for key in lora}
        found.append({"ours": title, "bytes": means, "lora": lora, "parts": {k: means[k] / lora[k] for k in lora}})
    return found


def table(content: dict[str, Any]) -> str:
    lines = ["| time over PEFT LoRA's | path | threads | ours | median | interval |", "|---|---|---|---|---|---|"]
    for r in content["times"]:
        interval = f"{r['lower']:.3f} to {r['upper']:.3f}"
        lines.append(f"| {r['what']} | {r['path']} | {r['threads']} | {r['way']} | {r['median']:.3f} | {interval} |")
    lines += [
        "",
        f"| {VIT}, batch 4, rank 4 | kept for backward, MiB | of LoRA's | peak, MiB | of LoRA's |",
        "|---|---|---|---|---|",
    ]
    for m in content["memory"]:
        cells = (f"{m['bytes'][key] / 2**20:.0f} | {m['parts'][key]:.3f}" for key in ("saved_bytes", "peak_bytes"))
        lines.append(f"| {m['ours']} | " + " | ".join(cells) + " |")
    where = content["environment"]
    lines += [
        "",
        f"{where['device']}, {versions(where, PACKAGES)}; {where['date'][:10]}, commit {where['commit']}; the load was "
        f"{where['load_average'][0]:.1f} on {where['cores']} cores. Medians of {content['rounds']} interleaved rounds.",
    ]
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.against_lora", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--rounds", type=int, default=15, help="default: 15")
    parser.add_argument("--paths", type=int, default=12, help="random paths whose memory is counted (default: 12)")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="default: 1 2")
    parser.add_argument("--out", type=Path, help="folder for figures.json and table.md")
    options = parser.parse_args(arguments)
    content: dict[str, Any] = {"environment": environment("cpu"), "rounds": options.rounds, "times": []}
    measures = [partial(measure_layer, layer) for layer in LAYERS] + [partial(measure_model, ranks) for ranks in SPACES]
    for threads in options.threads:
        torch.set_num_threads(threads)
        settings = Settings(rounds=options.rounds, threads=threads, clock="cpu" if threads == 1 else "wall")
        for measure in measures:
            content["times"] += measure(settings)
            print(table({**content, "memory": []}), flush=True)
    torch.set_num_threads(1)
    content["memory"] = measure_memory(Settings(), options.paths)
    print(table(content), flush=True)
    write_figures(options.out, content, table(content))


if __name__ == "__main__":
    main()
