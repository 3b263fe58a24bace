"""Pictures of a run: ratios of times with their intervals, the roofline, memory."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .entrants.names import FROZEN
from .measurements.inference import ORIGINAL
from .measurements.roofline import COPY, PRODUCT
from .timing import WHOLE

OURS_COLOUR, PEER_COLOUR, EVEN = "#1b6ca8", "#b0b7bf", "#444444"
RATIO_GROUPS = ("layer", "compiled layer", "replayed layer", "model", "step modes", "inference", "latency", "search")


def save_plots(content: dict[str, Any], folder: Path) -> list[Path]:
    """Save a picture of ratios for each section that has some, the roofline and memory; as PNG and SVG."""
    figures: dict[str, Figure] = {}
    for section in content["sections"]:
        if section["group"] in RATIO_GROUPS and section["phases"]:
            figures[f"ratios-{_slug(section)}"] = ratios(section)
        if any("saved_bytes" in found for found in section["facts"].values()):
            figures[f"memory-{_slug(section)}"] = memory(section)
    if any(section["group"] == "roofline" and section["name"] == "ceilings" for section in content["sections"]):
        figures["roofline"] = roofline(content)
    files = []
    for name, figure in figures.items():
        for kind in ("png", "svg"):
            files.append(folder / f"{name}.{kind}")
            figure.savefig(files[-1], dpi=130, bbox_inches="tight")
        plt.close(figure)
    return files


def ratios(section: dict[str, Any]) -> Figure:
    """Times over the time of the frozen or original model, with median and interval; shorter is better."""
    from .timing import ratio

    times = section["phases"][WHOLE]
    baseline = next((name for name in (FROZEN, ORIGINAL) if name in times), next(reversed(times)))
    rows = {name: ratio(times, name, baseline) for name in times if name != baseline}
    rows = dict(sorted(rows.items(), key=lambda item: item[1].median, reverse=True))
    figure, axes = plt.subplots(figsize=(8, 1.2 + 0.28 * len(rows)))
    for position, (name, row) in enumerate(rows.items()):
        colour = OURS_COLOUR if name.startswith(("ours", "merged")) else PEER_COLOUR
        spread = [[row.median - row.lower], [row.upper - row.median]]
        axes.barh(position, row.median, color=colour, xerr=spread, ecolor=EVEN, capsize=2, error_kw={"lw": 1})
        axes.text(row.upper, position, f"  {row.median:.2f}", va="center", fontsize=8)
    axes.axvline(1, color=EVEN, lw=1, ls="--")
    axes.set_yticks(range(len(rows)), list(rows), fontsize=8)
    axes.set_xlabel(f"time / time of {baseline!r} (median of paired rounds, interval of the median)")
    axes.set_title(section["title"], fontsize=10)
    axes.margins(x=0.12, y=0.02)
    _bare(axes)
    return figure


def memory(section: dict[str, Any]) -> Figure:
    """The bytes kept for backward, and how far memory rises in a step."""
    facts = {name: found for name, found in section["facts"].items() if "saved_bytes" in found}
    names = sorted(facts, key=lambda name: facts[name]["peak_bytes"], reverse=True)
    figure, axes = plt.subplots(figsize=(8, 1.2 + 0.28 * len(names)))
    for position, name in enumerate(names):
        colour = OURS_COLOUR if name.startswith("ours") else PEER_COLOUR
        peak, saved = (facts[name][key] / 2**20 for key in ("peak_bytes", "saved_bytes"))
        axes.barh(position, peak, color=colour, alpha=0.35)
        axes.barh(position, saved, color=colour)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set_xlabel("MiB: saved for backward (dark), highest rise during a step (light)")
    axes.set_title(section["title"], fontsize=10)
    _bare(axes)
    return figure


def roofline(content: dict[str, Any]) -> Figure:
    """Achieved operations per second over operations per byte, under the measured ceilings."""
    sections = [section for section in content["sections"] if section["group"] == "roofline"]
    facts = {section["name"]: section["facts"] for section in sections}
    top = facts["ceilings"][PRODUCT]["flops_per_second"]
    slope = facts["ceilings"][COPY]["bytes_per_second"]
    points = [
        (name, operation, found["flops"] / found["bytes"], found["flops_per_second"])
        for name, section in facts.items()
        if name != "ceilings"
        for operation, found in section.items()
    ]
    figure, axes = plt.subplots(figsize=(8, 5))
    colours = {name: f"C{index}" for index, name in enumerate(dict.fromkeys(point[0] for point in points))}
    marks = dict(zip(dict.fromkeys(point[1].split(",")[0] for point in points), "o^s"))
    for name, operation, intensity, rate in points:
        axes.plot(intensity, rate / 1e9, marks[operation.split(",")[0]], color=colours[name], ms=6, alpha=0.8)
    low, high = min([point[2] for point in points], default=1) / 2, max([point[2] for point in points], default=1) * 2
    low, high = min(low, top / slope / 2), max(high, top / slope * 2)
    bend = top / slope
    axes.plot([low, bend, high], [low * slope / 1e9, top / 1e9, top / 1e9], color=EVEN, lw=1.5)
    axes.text(low, low * slope / 1e9 * 1.6, f"{slope / 1e9:,.0f} GB/s", fontsize=8, rotation=0)
    axes.text(high, top / 1e9 * 1.12, f"{top / 1e9:,.0f} GFLOP/s", fontsize=8, ha="right")
    for name, colour in colours.items():
        axes.plot([], [], "o", color=colour, label=name)
    for operation, mark in marks.items():
        axes.plot([], [], mark, color="grey", label=operation)
    axes.legend(fontsize=8, loc="lower right")
    axes.set(xscale="log", yscale="log", xlabel="operations a byte (bytes that cannot be avoided)", ylabel="GFLOP/s")
    machine = f"{content['environment']['device']}, {content['dtype']}"
    axes.set_title(f"{machine}: ours under the measured ceilings", fontsize=10)
    _bare(axes)
    return figure


def _bare(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)


def _slug(section: dict[str, Any]) -> str:
    return re.sub(r"[^a-z0-9]+", "-", f"{section['group']} {section['name']}".lower()).strip("-")
