"""``bench/gpu.sh 1 OUTDIR`` and ``bench/gpu.sh 2 OUTDIR``: see there, and docs/gpu-day.md."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

from . import cache, verdicts
from .parts import CALL, CALLS, Part
from .rehearsal import HANG, NO_FAULT, VARIABLE, WRONG
from .running import NOT_RUN, ROOT, Outcome, Program, failed

ALL = "all"  # parts


def main(argv: Sequence[str] | None = None) -> int:
    """The command: 0 if every part passed, 1 if one did not, 2 if nothing could be tried."""
    parser = _parser()
    options = parser.parse_args(argv)
    stages = CALLS[options.call]
    names = [part.name for stage in stages for part in stage]
    for option in ("only", "wrong", "hang"):
        if unknown := set(getattr(options, option)) - {*names, ALL}:
            parser.error(f"--{option}: expected {ALL} or some of {', '.join(names)}, got {', '.join(sorted(unknown))}")
    if (options.wrong or options.hang) and not options.rehearse:
        parser.error("--wrong, --hang: expected --rehearse with them: faults are planted in rehearsals alone")
    options.out = options.out.resolve()
    if options.out.exists() and (not options.out.is_dir() or any(options.out.iterdir())):
        parser.error(f"OUTDIR: expected an empty folder or none, got {options.out}")
    options.out.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    stages = tuple(
        tuple(_prepared(part, options) for part in stage if {part.name, ALL} & {*options.only}) for stage in stages
    )
    with tempfile.TemporaryDirectory(prefix="glora-gpu-", ignore_cleanup_errors=True) as scratch:
        program = _program(options, Path(scratch))
        try:
            program.run([stage for stage in stages if stage])
        except KeyboardInterrupt:
            program.stop()
        done = {outcome.part for outcome in program.outcomes}
        left = [Outcome(part.name, NOT_RUN, 0, None) for stage in stages for part in stage if part.name not in done]
        outcomes = [*program.outcomes, *left]
        print(verdicts.summary(outcomes, options.out), flush=True)
    return int(failed(outcomes))


def _program(options: argparse.Namespace, scratch: Path) -> Program:
    """The program of a call, with the caches of compilers in a scratch folder; Triton's has what was carried here."""
    triton = scratch / "triton" if options.triton_cache is None else options.triton_cache.resolve()
    environment = {"TORCHINDUCTOR_CACHE_DIR": str(scratch / "inductor"), "TRITON_CACHE_DIR": str(triton)}
    if options.triton_cache is None:
        print(cache.unpacked(cache.FILE, triton), flush=True)
    if options.rehearse:
        environment["PATH"] = f"{ROOT / 'tests/rehearsal/programs'}{os.pathsep}{os.environ['PATH']}"
    first = "tests.rehearsal" if options.rehearse else "bench.gpu.child"
    gone = time.time() - psutil.Process().create_time()  # imports and unpacking took some
    return Program(options.out, scratch, first, options.seconds - gone, environment=environment)


def _prepared(part: Part, options: argparse.Namespace) -> Part:
    """The part as this call runs it."""
    part = part._replace(limit=part.limit * options.limits)
    if part.module == "glora_kernels.tune" and cache.CANDIDATES.exists():
        part = part._replace(arguments=(*part.arguments, "--candidates", str(cache.CANDIDATES)))
    if not options.rehearse:
        return part
    fault = WRONG if {part.name, ALL} & {*options.wrong} else HANG if {part.name, ALL} & {*options.hang} else NO_FAULT
    environment = {**part.environment, VARIABLE: fault}
    return part._replace(arguments=(*part.arguments, *part.rehearsed), environment=environment)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="bench/gpu.sh", description="Test and measure on a GPU that is lent.")
    parser.add_argument("call", choices=CALLS, help="1: tests, kernels, layers; 2: steps, inference, tiles")
    parser.add_argument("out", type=Path, metavar="OUTDIR", help="an empty folder, or one to be made")
    parser.add_argument("--only", nargs="+", default=(ALL,), metavar="PART", help="run these parts alone")
    parser.add_argument("--seconds", type=float, default=CALL, help=f"of the whole call (default: {CALL:g})")
    parser.add_argument("--limits", type=float, default=1.0, metavar="FACTOR", help="of the limits of all parts")
    parser.add_argument("--triton-cache", type=Path, metavar="DIR", help="use this one, not the one that was packed")
    rehearse = parser.add_argument_group("rehearsal", "on a machine without a GPU")
    rehearse.add_argument(
        "--rehearse", action="store_true", help="run every part on small shapes over a stub of libcuda"
    )
    rehearse.add_argument("--wrong", nargs="+", default=(), metavar="PART", help="let results of these parts be wrong")
    rehearse.add_argument("--hang", nargs="+", default=(), metavar="PART", help="let these parts never end")
    return parser


if __name__ == "__main__":
    sys.exit(main())
