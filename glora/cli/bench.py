"""``glora bench``: the benchmarks, which stand outside of this package (``bench/`` in a checkout)."""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

GROUPS = ("layer", "model", "inference", "merge", "search", "roofline")


def add_bench(commands) -> None:
    command = commands.add_parser(
        "bench",
        help="speed, memory and exactness against the frozen layer and the peers, on this machine",
        description=(
            "Check, then time ours and its peers in interleaved rounds; write results.json, table.md and pictures into "
            "--out. Exits with 1 if anything was wrong. The default takes about eight minutes on two CPU cores."
        ),
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    command.add_argument(
        "--only", nargs="+", choices=GROUPS, default=list(GROUPS), metavar="GROUP", help=", ".join(GROUPS)
    )
    command.add_argument(
        "--shapes", default="small", help="by commas: small, square, vit_b, vit_b_small, swin_b, llama7b, llama3b; all"
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
    names = ("shapes", "dtype", "device", "rounds", "threads", "clock")
    arguments = [text for name in names for text in (f"--{name}", str(getattr(options, name)))]
    file = options.out / "results.json"
    before = file.stat().st_mtime_ns if file.exists() else None
    status = _run_benchmarks(options.only, arguments, options.out, options.json)
    if status not in (0, 1):
        return 2
    if not file.exists() or file.stat().st_mtime_ns == before:
        raise ValueError(f"only: expected groups that measure something of {options.shapes!r}, got {options.only}")
    print(file.read_text() if options.json else f"\nWritten: {options.out}")
    return status


def _run_benchmarks(groups: Sequence[str], options: Sequence[str], results: Path, quiet: bool) -> int:
    """The exit status of ``pytest`` over groups of benchmarks in a process of its own; ``quiet``: to standard error."""
    found = find_spec("glora_bench")
    if found is None or not found.submodule_search_locations:
        raise ModuleNotFoundError("the benchmarks are not installed", name="glora_bench")
    for package in ("pytest", "pytest_benchmark"):
        if find_spec(package) is None:
            raise ModuleNotFoundError(f"No module named {package!r}", name=package)
    folder = Path(found.submodule_search_locations[0])
    files = [str(folder / f"test_{group}.py") for group in groups]
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    command = [*pytest, "--results", str(results), *options, *files]
    return subprocess.run(command, stdout=sys.stderr if quiet else None, check=False).returncode
