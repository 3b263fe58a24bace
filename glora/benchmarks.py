"""Running the benchmarks, which are not part of this package: ``bench/`` in a checkout, ``glora_bench`` installed."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

GROUPS = ("layer", "model", "inference", "merge", "search", "roofline")


def run_benchmarks(groups: Sequence[str], options: Sequence[str], results: Path, *, quiet: bool = False) -> int:
    """Run ``pytest`` over groups of benchmarks in a process of its own.

    Args:
        groups: some of :data:`GROUPS`.
        options: of ``pytest bench/`` (``bench/README.md``), such as ``("--shapes", "vit_b")``.
        results: the folder for ``results.json``, ``table.md`` and the pictures.
        quiet: send what pytest prints to standard error.

    Returns:
        The exit status: 0; 1 if something was wrong or not timed; 2 or more if the options are wrong.

    Raises:
        ModuleNotFoundError: the benchmarks, or what they need, are not installed.
    """
    found = find_spec("glora_bench")
    if found is None or not found.submodule_search_locations:
        raise ModuleNotFoundError("the benchmarks are not installed", name="glora_bench")
    for package in ("pytest", "pytest_benchmark"):
        if find_spec(package) is None:
            raise ModuleNotFoundError(f"No module named {package!r}", name=package)
    folder = Path(found.submodule_search_locations[0])
    files = [str(folder / f"test_{group}.py") for group in groups]
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "--results",
        str(results),
        *options,
        *files,
    ]
    return subprocess.run(command, stdout=sys.stderr if quiet else None, check=False).returncode
