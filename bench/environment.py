"""What figures depend on: machine, versions, date, commit."""

from __future__ import annotations

import functools
import os
import platform
import subprocess
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("torch", "triton", "timm", "peft", "lycoris-lora", "numpy")


@functools.cache
def environment(device: str) -> dict[str, Any]:
    """The environment as plain data; the load is that of the first call."""
    found = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": _commit(),
        "device": torch.cuda.get_device_name() if device != "cpu" else _cpu_name(),
        "python": platform.python_version(),
        "versions": {package: _version(package) for package in PACKAGES},
    }
    if device == "cpu":
        found |= {
            "cores": os.cpu_count(),
            "capability": torch.backends.cpu.get_cpu_capability(),
            "load_average": os.getloadavg(),
        }
    return found


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of the source tree, with ``+`` where files differ from it."""

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(Path(__file__).parent), *arguments], capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    if not (Path(__file__).parent.parent / "pyproject.toml").is_file():
        return None  # installed: a repository around it is not ours
    try:
        return git("rev-parse", "--short=10", "HEAD") + ("+" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):  # no git, or not a checkout
        return None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
