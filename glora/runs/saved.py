"""The progress of runs on disk, in words: for the line that says what is continued, and the line after Ctrl-C."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from ..evolution.journal import count_scores
from ..training.state import checkpoint_steps
from .folder import ADAPTER, CHECKPOINT, JOURNAL, REFIT, SEARCHED, TRAINED


def saved_checkpoint(file: Path) -> str | None:
    """``"<file>, step 300 of 1000"``; None if the file does not exist."""
    steps = checkpoint_steps(file)
    return None if steps is None else f"{file}, step {steps[0]} of {steps[1]}"


def unfinished_training(folder: Path) -> str | None:
    """``"<folder>/checkpoint.pt, step 300 of 1000"``; None for a run without a checkpoint, or a trained one."""
    return None if (folder / TRAINED).is_file() else saved_checkpoint(folder / CHECKPOINT)


def unfinished_search(folder: Path) -> str | None:
    """``"<folder>/search.jsonl, 57 evaluations"``; None for a run without evaluations, or a searched one."""
    scores = 0 if (folder / SEARCHED).is_file() else count_scores(folder / JOURNAL)
    return f"{folder / JOURNAL}, {scores} evaluations" if scores else None


def unfinished_refit(folder: Path) -> str | None:
    """``"<folder>/refit/checkpoint.pt, step 40 of 200"``; None for a run without a refit, or with a finished one."""
    refit = folder / REFIT
    return None if (refit / ADAPTER).is_file() else saved_checkpoint(refit / CHECKPOINT)


def saved_trainings(folders: Sequence[Path]) -> str | None:
    """``"2 of 5 runs; <folder>/checkpoint.pt, step 300 of 1000"``: finished runs and others; None if there are none."""
    return _saved(folders, TRAINED, unfinished_training)


def saved_searches(folders: Sequence[Path]) -> str | None:
    """As :func:`saved_trainings`, for searches."""
    return _saved(folders, SEARCHED, unfinished_search)


def saved_refits(folders: Sequence[Path]) -> str | None:
    """As :func:`saved_trainings`, for refits."""
    return _saved(folders, f"{REFIT}/{ADAPTER}", unfinished_refit)


def _saved(folders: Sequence[Path], last: str, unfinished: Callable[[Path], str | None]) -> str | None:
    finished = sum((folder / last).is_file() for folder in folders)
    begun = [text for folder in folders if (text := unfinished(folder)) is not None]
    parts = [f"{finished} of {len(folders)} runs", *begun] if finished else begun
    return "; ".join(parts) or None
