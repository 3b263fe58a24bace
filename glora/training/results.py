"""Loss and accuracy of the steps, read from the device without making it wait."""

from __future__ import annotations

import math
from collections import deque

from torch import Tensor

from ..transfers import Download
from .state import StepRecord


class Results:
    """Appends the results of each step to ``records``, in order.

    Args:
        records: those of the steps before.
        late: leave the results of the last step on their way, so that a GPU has work while the host waits for those
            of the step before it.
    """

    def __init__(self, records: list[StepRecord], late: bool):
        self._records, self._late = records, late
        self._waiting: deque[Download] = deque()

    def add(self, lr: float, loss: Tensor | float, accuracy: Tensor | float | None) -> None:
        """Send a step's results on their way; an accuracy of None is written as NaN."""
        self._waiting.append(Download(lr, loss, math.nan if accuracy is None else accuracy))

    def read(self, every: bool = False) -> list[StepRecord]:
        """The new records: those of all steps added so far, but the last one if ``late`` and not ``every``.

        Raises:
            ValueError: a loss that is not finite.
        """
        new = []
        while len(self._waiting) > (self._late and not every):
            record = StepRecord(*self._waiting.popleft().wait())
            if not math.isfinite(record.loss):
                step = len(self._records)
                raise ValueError(f"loss: expected a finite value, got {record.loss} at step {step}; try a smaller lr")
            self._records.append(record)
            new.append(record)
        return new
