"""The score of a candidate path of a model: merged, and with what it shares with the candidate before it reused."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial

from torch import nn
from torch.utils.data import Dataset, Subset

from ..config import PathConfig
from ..evaluation import MergedLayer, Totals, count, merged_under
from .prefix_reuse import PrefixReuse

METRICS = ("accuracy", "loss")


class CandidateScorer:
    """Scores candidates one after another; each has the bits that it would have alone.

    Kept from one to the next are merged layers (where a layer's path is the same) and the outputs of the first
    children of Sequentials (:mod:`glora.evolution.prefix_reuse`), for as long as this object lives.

    Args:
        model: its weights may not change meanwhile.
        validation: pairs of input and class.
        metric: ``"accuracy"``, or ``"loss"``, negated: higher is better.
        order: indices of ``validation``; ``start`` and ``stop`` count in it. None: its own order.
        reuse_bytes: of outputs that may be kept; 0 keeps none.
        workers: processes that read ``validation``.
    """

    def __init__(
        self,
        model: nn.Module,
        validation: Dataset,
        metric: str,
        batch_size: int,
        order: Sequence[int] | None = None,
        reuse_bytes: int = 0,
        workers: int = 0,
    ):
        self.model, self.validation, self.metric, self.batch_size = model, validation, metric, batch_size
        self.order, self.workers = order, workers
        self.reuse = PrefixReuse(model, reuse_bytes) if reuse_bytes else None
        self._merged: dict[str, MergedLayer] = {}
        self._part: tuple[int, int] | None = None

    def __call__(self, paths: Mapping[str, PathConfig], start: int, stop: int) -> float:
        """The sum of the scores of the samples ``start`` to ``stop``."""
        dataset = self.validation if self.order is None else Subset(self.validation, self.order[start:stop])
        if self.reuse is not None and self._part != (start, stop):
            self.reuse.forget()
        self._part = start, stop
        totals = self._count(paths, dataset, math.ceil((stop - start) / self.batch_size))
        return float(totals.right) if self.metric == "accuracy" else -totals.loss

    def _count(self, paths: Mapping[str, PathConfig], dataset: Dataset, batches: int) -> Totals:
        with merged_under(self.model, paths, self._merged) as merged:
            if self.reuse is None:
                return count(merged, dataset, self.batch_size, workers=self.workers)
            with self.reuse.running(paths, batches) as call:
                forward = partial(call, merged)
                return count(merged, dataset, self.batch_size, forward, workers=self.workers)
