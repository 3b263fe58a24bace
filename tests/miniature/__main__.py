"""The whole protocol in miniature, under four minutes on two cores: ``python -m tests.miniature FOLDER``."""

import shlex
import sys
import time
from pathlib import Path

import torch

from glora.cli import main
from tests.miniature.backbone import RECIPE, pretrain
from tests.miniature.images import DATASETS, write_datasets


def run(folder: Path) -> int:
    started = time.perf_counter()
    data, weights, study = folder / "data", folder / "backbone.safetensors", folder / "study"
    data.mkdir(parents=True, exist_ok=True)
    write_datasets(data)
    if not weights.exists():
        pretrain(weights)
    given = ["--recipe", str(RECIPE), "--data", str(data), "--weights", str(weights), "--out", str(study)]
    commands = [
        ["train", *given, "--dataset", *DATASETS],
        ["search", str(study)],
        ["merge", str(study), "--test"],
        ["report", str(study)],
    ]
    for command in commands:
        print(f"\n$ glora {shlex.join(command)}", flush=True)
        status = main(command)
        if status:
            return status
    print(f"\n{time.perf_counter() - started:.0f} seconds")
    return 0


if __name__ == "__main__":
    torch.set_num_threads(1)  # two are slower at this size
    sys.exit(run(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/miniature")))
