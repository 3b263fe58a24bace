"""Results of a run: as JSON for programs, as tables and pictures for people.

python -m bench.report results.json     # table and pictures again, beside it
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

from glora.files import write_text_atomically

from .environment import environment
from .section import Section
from .settings import Settings
from .targets import judged, merged_as_fast
from .timing import WHOLE

FORMAT = 1
JSON, TABLE = "results.json", "table.md"


def results(sections: list[Section], settings: Settings, failures: int, interrupted: bool) -> dict[str, Any]:
    """The results as plain data. ``failures`` are tests that failed; figures of such a run may not be quoted."""
    found = [section.to_dict() for section in sections]
    reference = settings.device == "cpu" and str(settings.dtype) == "torch.float32"
    return {
        "format": FORMAT,
        "environment": environment(settings.device),
        "dtype": str(settings.dtype).removeprefix("torch."),
        "rounds": settings.rounds,
        "clock": settings.clock if settings.device == "cpu" else "CUDA events",
        "threads": settings.threads if settings.device == "cpu" else None,
        "failures": failures,
        "interrupted": interrupted,
        "targets": judged(found) if reference else [],
        "sections": found,
    }


def write(content: dict[str, Any], folder: Path, pictures: bool = True) -> list[Path]:
    """``results.json``, ``table.md`` and, where matplotlib is installed, the pictures; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {folder / JSON: json.dumps(content, indent=1) + "\n", folder / TABLE: table(content)}
    for file, text in files.items():
        write_text_atomically(file, text)
    if not pictures:
        return list(files)
    try:
        from .plots import save_plots
    except ModuleNotFoundError:  # benchmarks do not need matplotlib
        return list(files)
    return [*files, *save_plots(content, folder)]


def load(file: Path) -> dict[str, Any]:
    """Read what :func:`write` wrote.

    Raises:
        ValueError: another format.
    """
    content = json.loads(file.read_text())
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"file: expected results of format {FORMAT}, got something else in {file}")
    return content


def summary(sections: list[dict[str, Any]]) -> str:
    """The ratios of whole steps as text, for a terminal."""
    lines = []
    for section in sections:
        rows = _whole(section)
        if rows:
            lines += ["", section["title"]]
            width = max(len(_pair(row)) for row in rows)
            lines += [f"  {_pair(row):{width}}  {_spread(row)}  {_milliseconds(row)}" for row in rows]
        lines += [f"  NOT TIMED  {name}: {reason}" for name, reason in section["refused"].items()]
    return "\n".join(lines)


def table(content: dict[str, Any]) -> str:
    """Everything as markdown."""
    lines = [f"# {describe(content)}", ""]
    if content["failures"]:
        lines += [f"**{content['failures']} tests failed: not to be quoted.**", ""]
    if content["interrupted"]:
        lines += ["The run was cut short: these groups were measured before, each as a whole.", ""]
    lines += _target_lines(content["targets"])
    for section in content["sections"]:
        lines += [f"## {section['title']}", ""]
        lines += [f"*{name} was not timed: {reason}*" for name, reason in section["refused"].items()]
        lines += [f"*{name} did not take part: {reason}*" for name, reason in section["missing"].items()]
        if section["errors"]:
            worst = max(section["errors"].values())
            mine = [error for name, error in section["errors"].items() if name.startswith(("ours", "merged"))]
            least = f"; of ours {max(mine):.2g}, allowed {section['tolerance']:g}" if mine else ""
            lines += [f"Largest error against fp64 ({section['unit']}): {worst:.2g}{least}.", ""]
        if section["group"] == "latency":
            verdict = "equal within noise" if merged_as_fast(section) else "NOT equal within noise"
            lines += [f"Merged and original are {verdict}.", ""]
        lines += _ratio_lines(section) + _time_lines(section)
    return "\n".join(lines).rstrip() + "\n"


def describe(content: dict[str, Any]) -> str:
    """Device, clock, dtype, versions, date and commit in one line."""
    found = content["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items() if version)
    threads = f", {content['threads']} thread" + ("s" if content["threads"] != 1 else "") if content["threads"] else ""
    clock = {"wall": "", "cpu": ", CPU time"}.get(content["clock"], f", {content['clock']}")
    machine = f"{found['device']}{threads}{clock}, {content['dtype']}"
    return f"{machine}; {versions}; {found['date'][:10]}, commit {found['commit']}"


def _target_lines(targets: list[dict[str, Any]]) -> list[str]:
    if not targets:
        return []
    lines = ["| set out to show | at most | found | |", "|---|---|---|---|"]
    for row in targets:
        what = f"{row['group']} {row['section']}, {row['quantity'].replace('_', ' ')}"
        pair, verdict = _pair(row), "met" if row["met"] else "**missed**"
        lines.append(f"| {what}: {pair} | {row['at_most']:.2f} | {row['found']:.3f} | {verdict} |")
    return [*lines, ""]


def _ratio_lines(section: dict[str, Any]) -> list[str]:
    rows = _whole(section)
    if not rows:
        return []
    lines = ["| ratio of times | median | interval of the median | smallest to largest |", "|---|---|---|---|"]
    lines += [
        f"| {_pair(row)} | {row['median']:.3f} | {row['lower']:.3f} to {row['upper']:.3f} ({row['confidence']:.0%}) "
        f"| {row['low']:.3f} to {row['high']:.3f} |"
        for row in rows
    ]
    return [*lines, ""]


def _time_lines(section: dict[str, Any]) -> list[str]:
    """Lines with the median milliseconds of every part, what is done per second, and what was counted."""
    phases, units = section["phases"], section["units"]
    if not phases:
        return []
    facts = sorted({key for found in section["facts"].values() for key in found})
    heads = [*(f"{phase}, ms" for phase in phases), *(f"{unit}/s" for unit in units), *(_heading(key) for key in facts)]
    lines = ["| | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    for name in next(iter(phases.values())):
        medians = {phase: statistics.median(times[name]) for phase, times in phases.items()}
        whole = medians[WHOLE]
        cells = [f"{1e3 * seconds:.3f}" for seconds in medians.values()]
        cells += [f"{count / whole:,.1f}" for count in units.values()]
        cells += [_amount(key, section["facts"].get(name, {}).get(key)) for key in facts]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return [*lines, ""]


UNITS = {
    "saved_bytes": ("saved for backward, MiB", 2**20),
    "peak_bytes": ("peak memory, MiB", 2**20),
    "flops": ("GFLOP", 1e9),
    "bytes": ("MB", 1e6),
    "flops_per_second": ("GFLOP/s", 1e9),
    "bytes_per_second": ("GB/s", 1e9),
    "parameters": ("parameters", 1),
}


def _heading(key: str) -> str:
    return UNITS[key][0]


def _amount(key: str, value: float | None) -> str:
    if value is None:
        return ""
    scaled = value / UNITS[key][1]
    return f"{scaled:,.0f}" if key == "parameters" else f"{scaled:,.3f}"


def _whole(section: dict[str, Any]) -> list[dict[str, Any]]:
    return [row for row in section["ratios"] if row["phase"] == WHOLE]


def _pair(row: dict[str, Any]) -> str:
    return f"{row['candidate']} / {row['baseline']}"


def _spread(row: dict[str, Any]) -> str:
    return f"{row['median']:6.3f} [{row['lower']:.3f}, {row['upper']:.3f}]"


def _milliseconds(row: dict[str, Any]) -> str:
    return f"{1e3 * row['candidate_seconds']:9.2f} / {1e3 * row['baseline_seconds']:.2f} ms"


def main() -> None:
    if len(sys.argv) != 2:
        raise SystemExit("usage: python -m bench.report results.json")
    file = Path(sys.argv[1])
    if not file.is_file():
        raise SystemExit(f"expected a file of results, got {file}")
    print("\n".join(str(written) for written in write(load(file), file.parent)))


if __name__ == "__main__":
    main()
