"""Builds the CUDA extension into the source tree, for this GPU alone: ``python -m bench.gpu.extension``."""

from __future__ import annotations

import os
import subprocess
import sys

import torch

from .rehearsal import WRONG, fault, is_rehearsal
from .running import TOLD


def main() -> int:
    architecture = ".".join(map(str, torch.cuda.get_device_capability()))
    environment = {**os.environ, "GLORA_BUILD_CUDA": "1", "TORCH_CUDA_ARCH_LIST": architecture, "MAX_JOBS": "7"}
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    if is_rehearsal():  # where there need be no nvcc
        command = [sys.executable, "-c", f"raise SystemExit({fault() == WRONG:d})"]
    status = subprocess.run(command, env=environment, check=False).returncode
    print(f"{TOLD}not built" if status else f"{TOLD}built for {architecture}")
    return int(status != 0)


if __name__ == "__main__":
    sys.exit(main())
