"""Compiles ahead of time what a model's adapted layers will launch, into the cache that their launches look in.

    python -m glora_kernels.warm --model vit_base_patch16_224 --ranks 8 4 --dtype bfloat16
    python -m glora_kernels.warm --shapes 4096x4096 11008x4096 --ranks 8 --architecture cuda:90

A supernet asks for most of its builds in its first steps, each of which takes about a second. This compiles all of them
(:func:`glora_kernels.builds_for`) in several processes, for the GPU of this machine or for a named one, which need not
be there. Triton's cache (``TRITON_CACHE_DIR``) keeps them, under keys that say what they were made of: a launch finds
them if Triton and this package are the same there.
"""

from __future__ import annotations

import argparse
import itertools
import re
import sys
import time
from collections.abc import Iterable, Sequence

from tqdm.auto import tqdm
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from ._aot.models import calls_of
from ._aot.targets import architecture_of, gpu_named, name_of
from ._aot.work import Job, stored, workers
from ._triton.builds import Build
from .builds import DTYPES, TOKENS, builds_of_calls
from .planning.cases import Layer
from .planning.prediction import STRATEGIES
from .terms import PRODUCTS

_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}


def main(argv: Sequence[str] | None = None) -> int:
    """The command: 0 if all is in the cache, 1 if some builds cannot be compiled, 2 if nothing could be tried."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    began = time.monotonic()
    try:
        jobs = workers(arguments.jobs)
        gpus = [gpu_named(name) for name in arguments.architecture] or [_present()]
        todo = [Job(build, gpu) for gpu in gpus for build in _builds(arguments, architecture_of(gpu))]
    except ValueError as error:
        parser.error(str(error))
    results = list(tqdm(stored(todo, jobs), total=len(todo), desc="warm", unit="build", disable=None))
    failed = [(job, result) for job, result in zip(todo, results) if isinstance(result, str)]
    for job, result in failed:
        print(f"FAILED {name_of(job.gpu)} {job.build.label}: {result}")
    there = sum(result is True for result in results)
    counts = f"{len(todo) - there - len(failed)} compiled, {there} were there" + (
        f", {len(failed)} failed" * bool(failed)
    )
    names = ", ".join(map(name_of, gpus))
    print(f"{len(todo)} builds for {names}: {counts}, in {time.monotonic() - began:.0f} s; {knobs.cache.dir}")
    return 1 if failed else 0


def _builds(arguments: argparse.Namespace, architecture: str) -> list[Build]:
    return builds_of_calls(
        _calls(arguments),
        arguments.ranks,
        _DTYPES[arguments.dtype],
        architecture,
        arguments.product,
        arguments.strategy,
        training=not arguments.inference,
        kept_outputs=(True, False) if arguments.checkpoints else (True,),
    )


def _calls(arguments: argparse.Namespace) -> Iterable[tuple[Layer, int]]:
    if arguments.model is None:
        return itertools.product(arguments.shapes, arguments.tokens)
    return dict.fromkeys(call for batch in arguments.batch for call in calls_of(arguments.model, batch))


def _present() -> GPUTarget:
    try:
        return driver.active.get_current_target()
    except RuntimeError as error:
        raise ValueError(f"architecture: expected a name like cuda:90, since there is no GPU here ({error})") from error


def _shape(text: str) -> Layer:
    """``768x3072``: out and in; ``768x3072-`` without a bias."""
    found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)(-?)", text)
    if not found:
        raise argparse.ArgumentTypeError(f"expected OUTxIN, or OUTxIN- without a bias, got {text!r}")
    return Layer(int(found[1]), int(found[2]), not found[3])


def _number(text: str) -> int:
    if not re.fullmatch(r"[1-9]\d*", text):
        raise argparse.ArgumentTypeError(f"expected an integer from 1, got {text!r}")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m glora_kernels.warm", description="Compile kernels ahead of time.")
    layers = parser.add_mutually_exclusive_group(required=True)
    layers.add_argument("--model", metavar="NAME", help="a model of timm's: its linear layers outside of the heads")
    layers.add_argument("--shapes", nargs="+", type=_shape, metavar="OUTxIN", help="layers; OUTxIN- has no bias")
    parser.add_argument(
        "--batch", nargs="+", type=_number, default=[64], metavar="N", help="images per call of a model"
    )
    parser.add_argument(
        "--tokens", nargs="+", type=_number, default=[TOKENS], metavar="N", help="tokens per call of shapes"
    )
    parser.add_argument("--ranks", nargs="+", type=_number, required=True, metavar="R", help="what paths may ask for")
    parser.add_argument("--dtype", choices=_DTYPES, default="bfloat16")
    parser.add_argument("--product", nargs="+", choices=PRODUCTS, default=["hadamard"])
    parser.add_argument("--strategy", nargs="+", choices=STRATEGIES, help="default: what is predicted to be faster")
    parser.add_argument("--inference", action="store_true", help="forward passes alone")
    parser.add_argument("--checkpoints", action="store_true", help="also what layers in activation checkpoints launch")
    parser.add_argument(
        "--architecture", nargs="+", default=[], metavar="NAME", help="cuda:90, hip:gfx942 ... (default: this GPU's)"
    )
    parser.add_argument("--jobs", type=int, metavar="N", help="processes (default: one for each CPU)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
