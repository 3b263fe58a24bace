"""What a training run reports: a progress bar's text, and a CSV file with a line per step."""

from __future__ import annotations

import csv
import io
import math
import os
import time
from collections import deque
from collections.abc import Iterable, Mapping

from ..files import write_atomically
from ..objective import Metrics
from ..processes import from_first
from .state import StepRecord, TrainingState

COLUMNS = ("step", "epoch", "lr", "loss", "accuracy")
VALIDATION_COLUMNS = ("validation_loss", "validation_accuracy")


def save_log(state: TrainingState, file: str | os.PathLike) -> None:
    """Write every step so far, atomically: a run that was cut and resumed has one log without gaps.

    ``step`` counts from 1; ``epoch`` is the number of passes over the data after the step, empty for data without a
    length. Accuracy is that of the batch, and empty if targets are not classes. A run with validation data has two more
    columns, which are empty but for the steps after which the model was scored on them.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    validated = bool(state.validations)
    writer.writerow(COLUMNS + VALIDATION_COLUMNS * validated)
    for step, record in enumerate(state.records, 1):
        epoch = "" if state.epochs_per_step is None else f"{float(step * state.epochs_per_step):.4f}"
        row = [step, epoch, f"{record.lr:.6g}", *_loss_and_accuracy(record)]
        if validated:
            row += _loss_and_accuracy(state.validations[step]) if step in state.validations else ("", "")
        writer.writerow(row)
    content = text.getvalue().encode()
    from_first(lambda: write_atomically(file, lambda stream: stream.write(content), "log"))


def _loss_and_accuracy(found: StepRecord | Metrics) -> tuple[str, str]:
    return f"{found.loss:.6g}", "" if math.isnan(found.accuracy) else f"{found.accuracy:.6g}"


class Meter:
    """Running loss, accuracy and speed for the progress bar, over the last 50 steps; and the last validation.

    Args:
        batch_size: None if batches have several sizes: then no speed is shown.
    """

    def __init__(self, batch_size: int | None):
        self.batch_size = batch_size
        self.recent: deque[tuple[float, float, float]] = deque(maxlen=50)

    def update(self, records: Iterable[StepRecord]) -> None:
        self.recent.extend((time.perf_counter(), record.loss, record.accuracy) for record in records)

    def text(self, validations: Mapping[int, Metrics]) -> str:
        if not self.recent:
            return ""
        times, losses, accuracies = zip(*self.recent)
        steps, elapsed = len(times) - 1, times[-1] - times[0]
        speed = f", {steps * self.batch_size / elapsed:.0f} samples/s" if elapsed and self.batch_size else ""
        accuracy = sum(accuracies) / len(accuracies)
        right = "" if math.isnan(accuracy) else f", accuracy {accuracy:.1%}"
        return f"loss {sum(losses) / len(losses):.3f}{right}{speed}{_of_last(validations)}"


def _of_last(validations: Mapping[int, Metrics]) -> str:
    if not validations:
        return ""
    last = validations[max(validations)]
    right = "" if math.isnan(last.accuracy) else f", accuracy {last.accuracy:.1%}"
    return f"; validation loss {last.loss:.3f}{right}"
