"""Triton's cache, filled on a machine without a GPU and carried to one with it. What it lacks is compiled there.

    make gpu-cache     # python -m bench.gpu.cache, with the Triton of that machine

Its keys say what a build was made of: kernels, Triton, the GPU, not the machine or the folder.
"""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

FILE = Path("build/gpu-cache/triton.tar.xz")
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
    """Unpack into a folder of another name; says how much that is."""
    if not file.exists():
        return f"{file}: not there, so that every build is compiled here"
    with tarfile.open(file) as archive:
        archive.extractall(cache, filter="data")
    for group in cache.glob(f"*/{_GROUP}*"):
        names = [Path(path).name for path in json.loads(group.read_text())["child_paths"].values()]
        there = {name: str(group.with_name(name)) for name in names if group.with_name(name).exists()}
        group.write_text(json.dumps({"child_paths": there}))
    return f"{file}: {builds_in(cache)} builds"


def builds_in(cache: Path) -> int:
    return sum(1 for _ in cache.glob("*/*.cubin"))
