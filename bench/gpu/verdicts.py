"""What a call has found, in a few lines: its parts, and the thresholds that were set (docs/gpu-day.md)."""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..entrants.names import FROZEN, GLORA, LORA, OURS
from ..measurements.inference import MERGED, ORIGINAL
from ..measurements.layer import RANDOM
from ..targets import merged_as_fast
from ..timing import WHOLE
from ..workloads import FORWARD
from .running import PASSED, Outcome, line_of

VIT, LLAMA = "vit_b ", "llama7b "
FORWARD_AT_MOST = 1.06  # forward as dispatched over the frozen layer's, one dense product
LAYER_OVER_FROZEN = {VIT: 1.40, LLAMA: 1.25}
LAYER_OVER_LORA = 0.75
STEPS = ("steps", "compiled_steps")
SELECTED, SHOWN = "selected", 12  # of the log of tests; how many failures are named
STEP_OVER = {LORA: 0.90, GLORA: 0.45}


class Verdict(NamedTuple):
    """A ratio of times, the largest that was allowed, and where it was found."""

    what: str
    found: float
    at_most: float

    @property
    def met(self) -> bool:
        return self.found <= self.at_most

    def __str__(self) -> str:
        return f"{'met   ' if self.met else 'MISSED'} {self.found:6.3f} (at most {self.at_most:.2f})  {self.what}"


def judged(out: Path) -> list[Verdict]:
    """The thresholds for which the folder has figures; of several shapes the worst is named."""
    kernels, layers, inference = (read(out / f"{name}.json") for name in ("kernels", "layers", "inference"))
    steps = [section for name in STEPS for section in read(out / f"{name}.json").get("sections", ())]
    return [*_of_kernels(kernels), *_of_layers(layers), *_of_steps(steps), *_of_inference(inference)]


def read(file: Path) -> dict[str, Any]:
    """Nothing if the file is not there, or if its writer was cut off."""
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError):
        return {}


def summary(outcomes: Sequence[Outcome], out: Path) -> str:
    """The last lines of a call."""
    lines = ["", "parts:"]
    for outcome in outcomes:
        lines += [line_of(outcome), *(f"    {told}" for told in outcome.told)]
    if verdicts := judged(out):
        lines += ["thresholds:", *map(str, verdicts)]
    lines += _tests(out / "tests.jsonl")
    asked, compiled = (sum(getattr(outcome, key) for outcome in outcomes) for key in ("asked", "compiled"))
    bad = [outcome.part for outcome in outcomes if outcome.status != PASSED]
    lines.append(f"builds: {asked} asked for, {compiled} compiled here")
    lines.append(
        f"parts: {len(outcomes) - len(bad)} passed, {len(bad)} failed" + (f": {', '.join(bad)}" if bad else "")
    )
    return "\n".join(lines)


def _tests(log: Path) -> list[str]:
    """How many tests were selected and how they ended, and the first that failed."""
    if not log.exists():
        return []
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    selected = sum(line[SELECTED] for line in lines if SELECTED in line)
    outcomes = {line["test"]: line["outcome"] for line in lines if "test" in line}
    counts = Counter(outcomes.values())
    told = ", ".join(f"{count} {outcome}" for outcome, count in sorted(counts.items()))
    failures = [test for test, outcome in outcomes.items() if outcome == "failed"]
    return [
        *(f"FAILED {test}" for test in failures[:SHOWN]),
        f"tests: {selected} selected: {told or 'none ended'}; {selected - len(outcomes)} not run",
    ]


def _of_kernels(content: dict[str, Any]) -> Iterator[Verdict]:
    for start in ("ViT-B", "LLaMA-7B 8192"):
        rows = [
            (row["over_frozen"][FORWARD]["as dispatched"]["median"], f"{row['shape']}, {row['path']}")
            for row in content.get("layers", ())
            if row["shape"].startswith(start)
        ]
        yield from _worst("forward over one dense product", rows, FORWARD_AT_MOST)


def _of_layers(content: dict[str, Any]) -> Iterator[Verdict]:
    for start, at_most in LAYER_OVER_FROZEN.items():
        yield from _worst("layer step over frozen", _ratios(content, "layer", start, OURS + RANDOM, FROZEN), at_most)
    rows = _ratios(content, "layer", VIT, OURS + RANDOM, LORA)
    yield from _worst("layer step over PEFT LoRA's", rows, LAYER_OVER_LORA)


def _of_steps(sections: list[dict[str, Any]]) -> Iterator[Verdict]:
    """Each at its fastest way of taking a step: medians of its own runs."""
    for title in dict.fromkeys(section["name"] for section in sections):
        runs = [section["phases"].get(WHOLE, {}) for section in sections if section["name"] == title]
        times = {name: statistics.median(found) for run in runs for name, found in run.items()}

        def fastest(who: str, times: dict[str, float] = times) -> tuple[float, str]:
            return min(((found, name) for name, found in times.items() if name.startswith(who)), default=(0.0, ""))

        ours, own_way = fastest(OURS)
        for peer, at_most in STEP_OVER.items():
            theirs, way = fastest(peer)
            if own_way and way:
                yield Verdict(f"step over {peer}'s, {title}: {own_way} over {way}", ours / theirs, at_most)


def _of_inference(content: dict[str, Any]) -> Iterator[Verdict]:
    for section in content.get("sections", ()):
        if section["group"] == "latency":
            (row,) = (row for row in section["ratios"] if (row["candidate"], row["baseline"]) == (MERGED, ORIGINAL))
            noise = "" if merged_as_fast(section) else ", more than noise"
            at_most = max(1.0, row["median"]) if merged_as_fast(section) else 1.0
            yield Verdict(f"merged over original, {section['name']}{noise}", row["median"], at_most)


def _ratios(content: dict[str, Any], group: str, start: str, candidate: str, baseline: str) -> list[tuple[float, str]]:
    return [
        (row["median"], section["name"])
        for section in content.get("sections", ())
        if section["group"] == group and section["name"].startswith(start)
        for row in section["ratios"]
        if (row["phase"], row["candidate"], row["baseline"]) == (WHOLE, candidate, baseline)
    ]


def _worst(what: str, rows: list[tuple[float, str]], at_most: float) -> Iterator[Verdict]:
    if rows:
        found, where = max(rows)
        yield Verdict(f"{what}, {where}", found, at_most)
