"""What a run on a GPU has shown, as markdown, from the folder that ``landing.py`` commits; what has not run is said."""

from __future__ import annotations

import statistics
from collections import Counter
from pathlib import Path
from typing import Any

from ..measurements.step_modes import ENTRIES
from ..timing import WHOLE
from ..workloads import FORWARD
from .builds import name_of
from .running import PASSED
from .verdicts import STEPS, judged, read

MACHINE, PARTS = "machine.json", "parts.json"  # written by landing.py
NOT_YET = "*No run on a GPU yet.*"
PEAK = "peak_bytes"


def folders(results: Path) -> list[Path]:
    """The committed runs."""
    return sorted(path.parent for path in results.glob(f"gpu-*/{MACHINE}"))


def speeds(results: Path) -> str:
    """Thresholds, and the steps of whole models."""
    return "\n\n".join(_speeds(folder) for folder in folders(results)) or NOT_YET


def _speeds(folder: Path) -> str:
    rows = [
        f"| {one.what} | {one.found:.3f} | {one.at_most:.2f} | {'' if one.met else '**missed**'} |"
        for one in judged(folder)
    ]
    parts = [f"*{_machine(folder)}*", "\n".join(["| time over time | found | at most | |", "|---|---|---|---|", *rows])]
    parts += [_steps(section) for name in STEPS for section in read(folder / f"{name}.json").get("sections", ())]
    return "\n\n".join(parts)


def _steps(section: dict[str, Any]) -> str:
    """Images a second and memory, of every way to take a step that was timed or refused."""
    lines = [f"| {section['title']} | images/s | peak memory |", "|---|---|---|"]
    for name in ENTRIES:
        if name in section["refused"]:
            lines.append(f"| {name} | *refused* | |")
        elif seconds := section["phases"].get(WHOLE, {}).get(name):
            peak = section["facts"].get(name, {}).get(PEAK)
            memory = "" if peak is None else f"{peak / 2**30:.2f} GiB"
            lines.append(f"| {name} | {section['units']['images'] / statistics.median(seconds):,.0f} | {memory} |")
    return "\n".join(lines)


def builds(results: Path) -> str:
    """How many of the builds that are shipped have run on a GPU, in parts whose tests passed, by kernel."""
    return "\n\n".join(_builds(folder) for folder in folders(results)) or NOT_YET


def _builds(folder: Path) -> str:
    from glora_kernels._triton.shipped import shipped

    architecture = read(folder / MACHINE)["architecture"]
    ran = {name for part in read(folder / PARTS)["parts"] if part["status"] == PASSED for name in part["builds"]}
    listed = [(build.kernel, name_of(build) in ran) for build in shipped(architecture)]
    of_all, of_these = Counter(kernel for kernel, _ in listed), Counter(kernel for kernel, has_run in listed if has_run)
    lines = [f"*{_machine(folder)}*", "", f"| builds for {architecture} | shipped | run |", "|---|---|---|"]
    lines += [f"| {kernel} | {count} | {of_these[kernel]} |" for kernel, count in of_all.items()]
    return "\n".join([*lines, f"| all | {of_all.total()} | {of_these.total()} |"])


def predictions(results: Path) -> str:
    """Measured seconds of a layer over the predicted ones, for each strategy, and which of the two was faster."""
    return "\n\n".join(_predictions(folder) for folder in folders(results)) or NOT_YET


def _predictions(folder: Path) -> str:
    lines = [
        f"*{_machine(folder)}*",
        "",
        "| measured over predicted | assemble, forward | step | fused, forward | step | said faster | is faster |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in read(folder / "kernels.json").get("layers", ()):
        seconds = {
            (strategy, phase): row["over_frozen"][phase][strategy]["candidate_seconds"]
            for strategy in row["predicted_seconds"]
            for phase in (FORWARD, WHOLE)
        }
        cells = [f"{found / row['predicted_seconds'][who][phase]:.2f}" for (who, phase), found in seconds.items()]
        predicted = min(row["predicted_seconds"], key=lambda who: row["predicted_seconds"][who][WHOLE])
        was = min(row["predicted_seconds"], key=lambda who: seconds[who, WHOLE])
        lines.append(f"| {row['shape']}, {row['path']} | {' | '.join(cells)} | {predicted} | {was} |")
    return "\n".join(lines)


def _machine(folder: Path) -> str:
    found = read(folder / MACHINE)
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items() if version)
    driver = found["nvidia_smi"].get("driver_version", "unknown")
    return f"{found['device']}, driver {driver}; {versions}; {found['date'][:10]}, commit {found['commit']}"
