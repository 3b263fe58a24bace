"""Makes committed results of what the two calls left: ``python -m bench.gpu.landing OUT1 [OUT2]``.

Writes ``bench/results/gpu-ARCHITECTURE`` (a file of a call that is not given stays), the ceilings of
``planning/machines.py``, and the tables of README.md, docs/kernels.md and docs/strategies.md. Commit what it changes.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from glora.files import write_text_atomically

from .. import readme
from ..environment import environment
from ..workloads import FORWARD
from .running import ROOT
from .tables import MACHINE, PARTS
from .verdicts import read

COPIED = ("kernels.json", "layers.json", "steps.json", "compiled_steps.json", "inference.json", "tiles.jsonl")
TESTS = "tests.json"
MACHINES = ROOT / "glora_kernels/planning/machines.py"
LARGE = "LLaMA-7B 8192"  # shapes whose products are long enough to give a rate


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.landing", description="Commit what a GPU has shown.")
    parser.add_argument("outs", nargs="+", type=Path, metavar="OUTDIR", help="the folders of results of the calls")
    outs = parser.parse_args(argv).outs
    try:
        folder = landed(outs, readme.RESULTS)
    except ValueError as error:
        parser.error(str(error))
    write_text_atomically(MACHINES, with_ceilings(MACHINES.read_text(), folder))
    readme.write()
    print(f"{folder}, {MACHINES.name} and the tables are written; look at `git diff`, then commit")
    return 0


def landed(outs: Sequence[Path], results: Path) -> Path:
    """Write the committed form of the results; the folder.

    Raises:
        ValueError: results of a rehearsal, of several GPUs, or none at all.
    """
    machines = [machine for out in outs for machine in _machine(out)]
    if len({(one["device"], one["architecture"]) for one in machines}) != 1:
        raise ValueError(f"OUTDIR: expected results of one kind of GPU, got {[one['device'] for one in machines]}")
    machine = {**machines[0], "commit": machines[0]["commit"] or environment("cpu")["commit"]}
    folder = results / f"gpu-{machine['architecture']}"
    folder.mkdir(parents=True, exist_ok=True)
    write_text_atomically(folder / MACHINE, json.dumps(machine, indent=1) + "\n")
    parts = [json.loads(line) for out in outs for line in (out / "parts.jsonl").read_text().splitlines()]
    before = read(folder / PARTS).get("parts", [])
    new = {part["part"] for part in parts}
    kept = [part for part in before if part["part"] not in new]
    write_text_atomically(folder / PARTS, json.dumps({"parts": [*kept, *parts]}) + "\n")
    for out in outs:
        for name in COPIED:
            if (out / name).exists():
                shutil.copyfile(out / name, folder / name)
        if (out / "tests.jsonl").exists():
            write_text_atomically(folder / TESTS, json.dumps(_tests(out / "tests.jsonl"), indent=1) + "\n")
    return folder


def _machine(out: Path) -> list[dict[str, Any]]:
    """What a call says of its machine; nothing if it did not run that part, where another call's words have to do."""
    if not (out / "parts.jsonl").exists():
        raise ValueError(f"OUTDIR: expected results of bench/gpu.sh, got {out}")
    if not (out / MACHINE).exists():
        return []
    found = json.loads((out / MACHINE).read_text())
    if found["rehearsal"]:
        raise ValueError(f"OUTDIR: expected results of a GPU, got those of a rehearsal: {out}")
    return [found]


def _tests(log: Path) -> dict[str, Any]:
    """Outcomes by test function, and every test that did not pass."""
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    ended = {line["test"]: line for line in lines if "test" in line}.values()
    counts = Counter((line["test"].partition("[")[0], line["outcome"]) for line in ended)
    return {
        "selected": sum(line["selected"] for line in lines if "selected" in line),
        "outcomes": [{"test": test, "outcome": outcome, "count": count} for (test, outcome), count in counts.items()],
        "not_passed": [line for line in ended if line["outcome"] != "passed"],
    }


def with_ceilings(text: str, folder: Path) -> str:
    """``machines.py`` with the figures that the run has measured, marked so."""
    machine, content = read(folder / MACHINE), read(folder / "kernels.json")
    if not content:
        return text
    found = dict(content["ceilings"])
    if share := _assembled(content["layers"]):
        found["assembled"] = share
    head, start, rest = text.partition(f'"{machine["architecture"]}": Machine(')
    block, end, tail = rest.partition("\n    ),\n")
    if not start:
        raise ValueError(f"machines.py: expected figures of {machine['architecture']}, found none")
    told = f"[M] {machine['device']}, {machine['date'][:10]}"
    for name, value in found.items():
        block = re.sub(rf"(\n +{name}=)[^,]+,.*", rf"\g<1>{_figure(value)},  # {told}", block)
    return head + start + block + end + tail


def _assembled(layers: list[dict[str, Any]]) -> float | None:
    """The rate of a product with an operand formed in registers, A and B low rank, over that of a plain one."""
    ratios = [
        row["over_frozen"][FORWARD]["fused"]["median"]
        for row in layers
        if row["shape"].startswith(LARGE) and row["path"] == "A lora, B lora"
    ]
    return len(ratios) / sum(ratios) if ratios else None


def _figure(value: float) -> str:
    """Three digits, with an exponent of three as ``machines.py`` has it."""
    exponent = 0 if 0.01 <= value < 1e6 else 12 if value >= 1e9 else 6 if value >= 1e6 else -6
    return f"{float(f'{value / 10.0**exponent:.3g}'):g}" + (f"e{exponent}" if exponent else "")


if __name__ == "__main__":
    sys.exit(main())
