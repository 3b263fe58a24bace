"""The targets of the benchmarks, on a CPU in fp32, and whether a run meets them."""

from __future__ import annotations

from typing import Any, NamedTuple

from .entrants.names import FROZEN, GLORA, LORA, OFFICIAL, OURS
from .measurements.inference import CONTROL, MERGED, ORIGINAL
from .measurements.layer import KIND_PAIRS
from .timing import WHOLE

TIME, SAVED = "time", "saved_bytes"


class Target(NamedTuple):
    """A ratio that is to be at most ``at_most``, in the section of this group and name."""

    group: str
    section: str
    quantity: str
    candidate: str
    baseline: str
    at_most: float


NOT_LOW_RANK = [name for name, (a, _) in KIND_PAIRS.items() if a != "lora"]
LAYERS = ("vit_b fc1", "vit_b fc2", "square 2048")
TARGETS = (
    *(
        Target("model", "vit_b step", TIME, OURS, baseline, at_most)
        for baseline, at_most in ((OFFICIAL, 0.82), (GLORA, 0.48), (LORA, 1.05), (FROZEN, 1.20))
    ),
    Target("model", "vit_b step", SAVED, OURS, LORA, 0.90),
    Target("model", "vit_b step", SAVED, OURS, GLORA, 0.52),
    *(Target("layer", layer, TIME, name, LORA, 1.03) for layer in LAYERS for name in NOT_LOW_RANK),
)


def judged(sections: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every target for which the run has both times: the ratio found, and whether the target is met."""
    by_name = {(section["group"], section["name"]): section for section in sections}
    rows = []
    for target in TARGETS:
        section = by_name.get((target.group, target.section))
        found = None if section is None else _found(section, target)
        if found is not None:
            rows.append({**target._asdict(), "found": found, "met": found <= target.at_most})
    return rows


def _found(section: dict[str, Any], target: Target) -> float | None:
    if target.quantity == TIME:
        pair = (WHOLE, target.candidate, target.baseline)
        ratios = {(row["phase"], row["candidate"], row["baseline"]): row["median"] for row in section["ratios"]}
        return ratios.get(pair)
    facts = section["facts"]
    if target.candidate not in facts or target.baseline not in facts:
        return None
    return facts[target.candidate][target.quantity] / facts[target.baseline][target.quantity]


def merged_as_fast(section: dict[str, Any]) -> bool:
    """Whether merged over original is 1 within noise: its interval holds 1, or overlaps that of two equal models."""
    ratios = {row["candidate"]: row for row in section["ratios"] if row["baseline"] == ORIGINAL}
    merged, control = ratios[MERGED], ratios[CONTROL]
    holds_one = merged["lower"] <= 1 <= merged["upper"]
    return holds_one or (merged["lower"] <= control["upper"] and control["lower"] <= merged["upper"])
