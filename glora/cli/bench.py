"""``glora bench``: the benchmarks."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_bench(commands) -> None:
    from ..benchmarks import GROUPS

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
    from ..benchmarks import run_benchmarks

    names = ("shapes", "dtype", "device", "rounds", "threads", "clock")
    arguments = [text for name in names for text in (f"--{name}", str(getattr(options, name)))]
    file = options.out / "results.json"
    before = file.stat().st_mtime_ns if file.exists() else None
    status = run_benchmarks(options.only, arguments, options.out, quiet=options.json)
    if status not in (0, 1):
        return 2
    if not file.exists() or file.stat().st_mtime_ns == before:
        raise ValueError(f"only: expected groups that measure something of {options.shapes!r}, got {options.only}")
    print(file.read_text() if options.json else f"\nWritten: {options.out}")
    return status
