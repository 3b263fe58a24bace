"""The loss and the learning rate of a training run, from its log."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ..drawing import COLOURS, new_figure, set_title
from ..runs import Run

_WINDOWS = 100


class Log(NamedTuple):
    """The columns of ``log.csv``; ``validation`` has the steps with a validation loss, and that loss."""

    steps: list[float]
    rates: list[float]
    losses: list[float]
    validation: list[tuple[float, float]]


def read_log(file: Path) -> Log:
    """Raises ValueError, naming file and line, for anything but numbers under step, lr and loss."""
    log = Log([], [], [], [])
    columns = {"step": log.steps, "lr": log.rates, "loss": log.losses}
    with open(file, encoding="utf-8", newline="") as stream:
        reader = csv.DictReader(stream)
        if not set(columns) <= set(reader.fieldnames or ()):
            raise ValueError(f"{file}: expected the columns {', '.join(columns)}, got {reader.fieldnames}")
        for row in reader:
            where = f"{file}: line {reader.line_num}"
            for name, values in columns.items():
                values.append(_number(where, name, row))
            if row.get("validation_loss"):
                log.validation.append((log.steps[-1], _number(where, "validation_loss", row)))
    return log


def _number(where: str, name: str, row: Mapping[str, str]) -> float:
    try:
        return float(row[name])
    except (TypeError, ValueError):
        raise ValueError(f"{where}: {name}: expected a number, got {row[name]!r}") from None


def training_figure(run: Run) -> Any | None:
    """The loss of each step with a running mean, and that on validation data if there is one, above the learning rate.

    None without a log or without steps.
    """
    log = read_log(run.log) if run.log else None
    if log is None or not log.steps:
        return None
    window = max(1, len(log.steps) // _WINDOWS)
    figure = new_figure(8, 5)
    losses, rates = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    losses.plot(log.steps, log.losses, color="#bbbbbb", linewidth=0.7, label="each step")
    losses.plot(
        log.steps[window - 1 :],
        running_mean(log.losses, window),
        color=COLOURS[0],
        label=f"mean of the last {window}" if window > 1 else None,
    )
    if log.validation:
        losses.plot(*zip(*log.validation), color=COLOURS[2], marker="o", markersize=4, label="validation")
    losses.set_ylabel("loss" if log.validation else "training loss")
    losses.legend(fontsize=9)
    rates.plot(log.steps, log.rates, color=COLOURS[4])
    rates.set_ylabel("learning rate")
    rates.set_xlabel("step")
    for axes in (losses, rates):
        axes.grid(alpha=0.3)
    set_title(figure, f"Training of {run.title} ({run.setting.method})")
    return figure


def running_mean(values: list[float], window: int) -> list[float]:
    """The mean of each value and the ``window - 1`` values before it; starts where there are that many."""
    import numpy as np

    return np.convolve(values, np.full(window, 1 / window), mode="valid").tolist()
