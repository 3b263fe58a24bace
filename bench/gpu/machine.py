"""The machine: ``python -m bench.gpu.machine --out machine.json`` writes what all figures depend on."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from glora.files import write_text_atomically

from ..environment import environment
from .rehearsal import is_rehearsal
from .running import TOLD

QUERY = "driver_version,clocks.sm,clocks.max.sm,temperature.gpu,power.draw,utilization.gpu"
TOOLS = ("nvcc", "compute-sanitizer", "gcc", "ncu")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.machine", description="Write down what machine this is.")
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    if not torch.cuda.is_available():
        print(f"{TOLD}no GPU here")
        return 1
    properties = torch.cuda.get_device_properties(0)
    found = {
        "rehearsal": is_rehearsal(),
        **environment("cuda"),
        "architecture": f"sm_{properties.major}{properties.minor}",
        "memory": properties.total_memory,
        "processors": properties.multi_processor_count,
        "cuda": torch.version.cuda,
        "system": platform.platform(),
        "cores": os.cpu_count(),
        "tools": {tool: shutil.which(tool) for tool in TOOLS},
        "nvidia_smi": {},
    }
    write_text_atomically(out, json.dumps(found, indent=1) + "\n")
    found["nvidia_smi"] = _asked()  # which may take long
    write_text_atomically(out, json.dumps(found, indent=1) + "\n")
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items() if version)
    print(f"{TOLD}{found['device']}, driver {found['nvidia_smi'].get('driver_version')}; {versions}")
    return 0


def _asked() -> dict[str, str]:
    """What nvidia-smi says; nothing where it does not answer."""
    try:
        command = ["nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader"]
        line = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.splitlines()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return {}
    return dict(zip(QUERY.split(","), line.split(", ")))


if __name__ == "__main__":
    sys.exit(main())
