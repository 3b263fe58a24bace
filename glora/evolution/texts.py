"""What people read of a search: scores, and how long it takes."""

from __future__ import annotations

import math


def describe_score(metric: str | None, score: float | None) -> str:
    """A score as people read it: an accuracy in percent, a loss or perplexity (minus the mean loss), or a score."""
    if score is None or not math.isfinite(score):
        return "not finite"
    if metric == "accuracy":
        return f"{100 * score:.2f}%"
    if metric == "perplexity":
        return f"perplexity {math.exp(min(-score, 700)):.3f}"
    return f"loss {-score:.4f}" if metric == "loss" else f"score {score:.4f}"


def describe_estimate(candidates: int, scored_before: int, seconds: float) -> str:
    """How long a search will take, such as ``search: 1,050 candidates, about 17 min``.

    Args:
        candidates: of the whole search.
        scored_before: those among them that the journal has scores of.
        seconds: what the others will take.
    """
    before = f", {scored_before:,} of them scored before" if scored_before else ""
    return f"search: {candidates:,} candidates{before}, about {_duration(seconds)}"


def _duration(seconds: float) -> str:
    """In seconds, minutes or hours, with two digits that count: 40 s, 17 min, 3 h 20 min, 52 h."""
    if seconds < 90:
        return f"{max(round(seconds), 1)} s"
    if seconds < 90 * 60:
        return f"{round(seconds / 60)} min"
    if seconds > 24 * 3600:
        return f"{round(seconds / 3600)} h"
    hours, tens = divmod(round(seconds / 600), 6)
    return f"{hours} h {10 * tens} min" if tens else f"{hours} h"
