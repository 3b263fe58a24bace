"""The ahead-of-time gate: every shipped Triton kernel, compiled for every target, must be worth launching.

    python -m glora_kernels.aot

needs no GPU. That a kernel compiles says little: one that does not fit becomes a trap or cannot be launched, and one
that spills is slow. So the gate reads the code that came out, and fails (exit status 1) on

- a spill, into memory or into other registers;
- no matrix instruction in a kernel that is meant to have some, or, in a plain loop, ones that the assembler serialised;
- more shared memory than the target gives a program, or more tensor memory than there is;
- a trap;
- two dots in one loop that add to each other, which some releases of Triton miscompile for Blackwell;
- an exception or an abort of the compiler.

It compiles the builds that ``shipped(architecture)`` of ``glora_kernels/_triton/shipped.py`` lists. For a target named
after ``--cover``, it compiles a few of them. Together they show every trait of all builds (``_aot/covering.py``).
Triton's cache (``TRITON_CACHE_DIR``) keeps the kernels, under the key that a launch looks for, and what was read in
them: only what has changed is compiled again.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Mapping, Sequence

from tqdm.auto import tqdm

from ._aot.covering import cover, traits
from ._aot.reading import Reading
from ._aot.report import Row, complaints, summary, table, write_json
from ._aot.targets import SHARED_LIMITS, Target, architecture_of, target_named
from ._aot.verdict import failures
from ._aot.work import Job, measured, workers
from ._triton.builds import Build, require_compiler

TARGETS = ("cuda:80", "cuda:90", "cuda:100", "hip:gfx942")
BUILDS = "glora_kernels._triton.shipped"


def gate(
    targets: Sequence[str] = TARGETS,
    *,
    covered: Sequence[str] = (),
    builds: str = BUILDS,
    only: str = "",
    jobs: int | None = None,
) -> list[Row]:
    """One row for every build of every target; a row without failures passed.

    Args:
        targets: like ``"cuda:90"`` or ``"hip:gfx942"``.
        covered: the targets for which a cover is enough.
        builds: the name of a module whose ``shipped(architecture)`` lists the builds.
        only: take the builds whose label contains this.
        jobs: how many processes (default: one for each CPU).

    Raises:
        ValueError: an unknown target, one to be covered that is no target, no build to compile, fewer than one
            process, or Triton in interpreter mode.
    """
    require_compiler()
    jobs = workers(jobs)
    known = {name: target_named(name) for name in targets}
    if unknown := [name for name in covered if name not in known]:
        raise ValueError(f"covered: expected some of the targets {', '.join(known)}, got {', '.join(unknown)}")
    todo = _todo(known, covered, builds, only)
    work = [Job(build, target.gpu) for target, build in todo]
    results = tqdm(measured(work, jobs), total=len(todo), desc="aot", unit="build", disable=None)
    return [_row(target, build, result) for (target, build), result in zip(todo, results)]


def _todo(targets: Mapping[str, Target], covered: Sequence[str], module: str, only: str) -> list[tuple[Target, Build]]:
    shipped, found = importlib.import_module(module).shipped, []
    for name, target in targets.items():
        builds = shipped(architecture_of(target.gpu))
        if name in covered:
            builds = [builds[place] for place in cover([traits(build) for build in builds])]
        found += [(target, build) for build in builds if only in build.label]
    if not found:
        raise ValueError(f"only: expected a part of some label of {module}, got {only!r}, which leaves no build")
    return found


def _row(target: Target, build: Build, result: Reading | str) -> Row:
    if isinstance(result, str):
        return Row(target.name, build.label, None, [f"compilation: expected to succeed, got {result}"])
    return Row(target.name, build.label, result, failures(build, target, result))


def main(argv: Sequence[str] | None = None) -> int:
    """The command: 0 if all pass, 1 if some fail, 2 if nothing could be tried."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    try:
        rows = gate(
            arguments.targets,
            covered=arguments.cover,
            builds=arguments.builds,
            only=arguments.only,
            jobs=arguments.jobs,
        )
    except ValueError as error:
        parser.error(str(error))
    if arguments.json is not None:
        write_json(rows, arguments.json)
    lines = complaints(rows)
    print(table(rows), *lines, summary(rows), sep="\n")
    return 1 if lines else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m glora_kernels.aot", description="Compile and check all kernels.")
    known = ", ".join(SHARED_LIMITS)
    parser.add_argument("--targets", nargs="+", default=TARGETS, metavar="TARGET", help=f"some of {known}")
    parser.add_argument(
        "--cover", nargs="+", default=(), metavar="TARGET", help="of these targets, a few builds that show all traits"
    )
    parser.add_argument("--only", default="", metavar="TEXT", help="take only builds with this in their label")
    parser.add_argument("--jobs", type=int, metavar="N", help="processes (default: one for each CPU)")
    parser.add_argument("--json", metavar="FILE", help="write the results to this file as well")
    parser.add_argument(
        "--builds", default=BUILDS, metavar="MODULE", help="whose shipped(architecture) lists the builds"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
