"""The score of a candidate path of a model, merged; a layer is merged again only if its path changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn
from torch.utils.data import Dataset, Subset

from ..config import PathConfig
from ..evaluation import MergedLayer, count, mergeable_layers, merged_under

METRICS = ("accuracy", "loss")


class CandidateScorer:
    """Scores candidates one after another; each has the bits that it would have alone.

    Merged layers are kept from one candidate to the next, where a layer's path is the same.

    Args:
        model: its weights may not change meanwhile.
        validation: pairs of input and class.
        metric: ``"accuracy"``, or ``"loss"``, negated: higher is better.
        order: indices of ``validation``; ``start`` and ``stop`` count in it. None: every call scores all samples.
        workers: processes that read ``validation``.

    Raises:
        ValueError: see :func:`glora.evaluation.mergeable_layers`.
    """

    def __init__(
        self,
        model: nn.Module,
        validation: Dataset,
        metric: str,
        batch_size: int,
        order: Sequence[int] | None = None,
        workers: int = 0,
    ):
        self.model, self.validation, self.metric, self.batch_size = model, validation, metric, batch_size
        self.order, self.workers = order, workers
        self.layers = mergeable_layers(model)
        self._merged: dict[str, MergedLayer] = {}

    def __call__(self, paths: Mapping[str, PathConfig], start: int, stop: int) -> float:
        """The sum of the scores of samples ``start`` to ``stop`` of ``order``; of all samples without an order."""
        dataset = self.validation if self.order is None else Subset(self.validation, self.order[start:stop])
        with merged_under(self.model, self.layers, paths, self._merged) as merged:
            totals = count(merged, dataset, self.batch_size, self.workers)
        return float(totals.right) if self.metric == "accuracy" else -totals.loss
