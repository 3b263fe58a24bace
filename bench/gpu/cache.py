"""Triton's cache, filled on a machine without a GPU and carried to one with it. What it lacks is compiled there.

    make gpu-cache     # python -m bench.gpu.cache, with the Triton of that machine

Its keys say what a build was made of: kernels, Triton, the GPU, not the machine or the folder.
"""

from __future__ import annotations

import argparse
import itertools
import json
import lzma
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .builds import name_of
from .parts import LAYERS, MODELS, TUNED
from .running import ROOT

if TYPE_CHECKING:
    from glora_kernels._triton.builds import Build

FOLDER = ROOT / "build/gpu-cache"  # ignored by git, and carried
FILE = FOLDER / "triton.tar.xz"
CANDIDATES = FOLDER / "candidates.jsonl"  # tiles that were compiled for the tuner
GPU, ARCHITECTURE = "cuda:90", "sm_90"
SUFFIXES = (".cubin", ".json", ".so")  # what a launch reads
_GROUP = "__grp__"  # a file with the paths of a build's files


def packed(cache: Path, file: Path) -> str:
    """Pack the cache; says how much that is."""
    file.parent.mkdir(parents=True, exist_ok=True)
    kept = sorted(path for path in cache.glob("*/*") if path.suffix in SUFFIXES)
    with tarfile.open(file, "w:xz") as archive:
        for path in kept:
            archive.add(path, path.relative_to(cache))
    return f"{file}: {builds_in(cache)} builds, {file.stat().st_size / 2**20:.1f} MiB"


def unpacked(file: Path, cache: Path) -> str:
    """Unpack into a folder of another name; says how much that is, or what is wrong with the file."""
    try:
        with tarfile.open(file) as archive:
            archive.extractall(cache, filter="data")
    except (OSError, EOFError, tarfile.TarError, lzma.LZMAError) as error:
        return f"{file}: builds are compiled here, since it cannot be unpacked: {error}"
    for group in cache.glob(f"*/{_GROUP}*"):
        names = [Path(path).name for path in json.loads(group.read_text())["child_paths"].values()]
        there = {name: str(group.with_name(name)) for name in names if group.with_name(name).exists()}
        group.write_text(json.dumps({"child_paths": there}))
    return f"{file}: {builds_in(cache)} builds"


def builds_in(cache: Path) -> int:
    return sum(1 for _ in cache.glob("*/*.cubin"))


# Filling it ----------------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """The command: 0 if all that the program asks for could be compiled."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu.cache", description="Compile what bench/gpu.sh launches."
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, metavar="N", help="processes")
    jobs = parser.parse_args(argv).jobs
    cache = FOLDER / "triton"
    os.environ |= {"TRITON_CACHE_DIR": str(cache), "PYTHONPATH": str(ROOT)}

    statuses = [_measured(jobs)]
    tuner = ["--compile", GPU, "--kernels", *TUNED, "--jobs", str(jobs), "--log", str(CANDIDATES)]
    with tempfile.TemporaryDirectory() as out:
        patient = ["--limits", "100", "--seconds", "7200", "--triton-cache", str(cache)]
        for command in (
            ["glora_kernels.tune", *tuner],
            ["bench.gpu", "--rehearse", "1", out, *patient, "--only", "tests", "memcheck"],
        ):
            statuses.append(subprocess.run([sys.executable, "-m", *command], check=False).returncode)
    print(packed(cache, FILE))
    return int(any(statuses))


def _measured(jobs: int) -> int:
    """Compile what is measured on layers too large to be rehearsed as they are."""
    from tqdm.auto import tqdm

    from glora_kernels._aot.targets import gpu_named
    from glora_kernels._aot.work import Job, stored

    builds = {name_of(build): build for build in builds_measured()}
    todo = [Job(build, gpu_named(GPU)) for build in builds.values()]
    results = list(tqdm(stored(todo, jobs), total=len(todo), desc="measured layers", unit="build", disable=None))
    failed = [f"FAILED {job.build.label}: {found}" for job, found in zip(todo, results) if isinstance(found, str)]
    print("\n".join([*failed, f"{len(todo)} builds of measured layers, {len(failed)} failed"]))
    return int(bool(failed))


def builds_measured() -> Iterator[Build]:
    """What the parts launch that measure kernels, layers, steps and inference."""
    import torch

    from glora_kernels._aot.models import calls_of
    from glora_kernels._triton.builds import builds_of
    from glora_kernels.builds import builds_of_calls
    from glora_kernels.planning.cases import Layer
    from glora_kernels.planning.prediction import STRATEGIES
    from glora_kernels.terms import PRODUCTS

    from ..measurements.inference import BATCHES
    from ..shapes import SHAPE_SETS
    from . import ops

    both, half = (True, False), torch.bfloat16
    yield from builds_of(
        ops.case_of(*one, ARCHITECTURE)
        for one in itertools.product(ops.SHAPES.values(), ops.PATHS.values(), STRATEGIES)
    )
    layers = [SHAPE_SETS[name].layers for name in LAYERS]
    calls = [(Layer(one.outputs, one.inputs), one.tokens_on("cuda")) for one in itertools.chain.from_iterable(layers)]
    ranks = {one.rank for one in itertools.chain.from_iterable(layers)}
    yield from builds_of_calls(calls, [*ranks], half, ARCHITECTURE, PRODUCTS, None, training=True, kept_outputs=both)
    for name in MODELS:
        model = SHAPE_SETS[name].model
        assert model is not None
        for batches, training in (([model.batch_on("cuda")], True), (BATCHES, False)):
            calls = [call for batch in batches for call in calls_of(model.name, batch)]
            yield from builds_of_calls(
                calls, [model.rank], half, ARCHITECTURE, PRODUCTS, None, training=training, kept_outputs=both
            )


if __name__ == "__main__":
    sys.exit(main())
