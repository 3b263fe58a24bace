"""Loss and accuracy on data that nothing is trained on, at the end of each epoch."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from ..config import PathConfig
from ..dataset import Collate, reading
from ..distributed import holds_shards
from ..evaluation import count
from ..objective import Metrics, Objective
from ..paths import using_paths
from ..processes import from_first, together, world_size
from .state import TrainingState


class Validation:
    """Scores the model of a run, in eval mode, and draws from none of the generators that the run depends on.

    Args:
        state: of the run; the results go into its ``validations``.
        data: None for no validation; otherwise as for :func:`glora.evaluate`.
        paths: of every adapted layer, under which the model is scored.
        workers, collate: as for :func:`glora.train`; batches are as large as in training, and tensors in memory are
            read in this process.

    Raises:
        TypeError, ValueError: ``data`` are no samples, or none.
    """

    def __init__(
        self,
        state: TrainingState,
        data: Dataset | DataLoader | None,
        objective: Objective,
        paths: Mapping[str, PathConfig],
        workers: int,
        collate: Collate | None,
    ):
        self._state, self._objective, self._paths = state, objective, paths
        size, workers = state.recipe.batch_size, 0 if isinstance(data, TensorDataset) else workers
        self._read = None if data is None else reading("validation", data, size, workers, collate)

    @property
    def is_due(self) -> bool:
        """Whether the step just taken was the last, or that an epoch ended with."""
        step, rate = self._state.step, self._state.epochs_per_step
        if self._read is None:
            return False
        return step == self._state.recipe.steps or (rate is not None and step * rate // 1 > (step - 1) * rate // 1)

    def run(self) -> None:
        """Score the model, on rank 0; if its parameters are sharded, on every rank, which all have to take part."""
        everywhere = world_size() > 1 and holds_shards(self._state.model)
        self._state.validations[self._state.step] = (together if everywhere else from_first)(self._score)

    def _score(self) -> Metrics:
        assert self._read is not None  # is_due
        model: Any = self._state.inner if world_size() > 1 else self._state.model
        with _under(self._state.inner, self._paths):
            return count(model, self._read, self._objective, "validation").means


def _under(model: nn.Module, paths: Mapping[str, PathConfig]) -> AbstractContextManager:
    return using_paths(model, paths) if paths else nullcontext()
