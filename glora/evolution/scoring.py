"""The score of a candidate path of a model, merged; a layer is merged again only if its path changed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager

import torch
from torch import nn
from torch.utils.data import Subset

from ..arguments import type_of
from ..config import PathConfig
from ..dataset import Reading
from ..evaluation import MergedLayer, count, mergeable_layers, merged_under
from ..models.modules import evaluating
from ..objective import Objective

METRICS = ("accuracy", "loss", "perplexity")


class _Candidates:
    """Candidates of a model, one after another; each has the bits that it would have alone.

    Merged layers are kept from one candidate to the next, where a layer's path is the same.

    Args:
        model: its weights may not change meanwhile.

    Raises:
        ValueError: see :func:`glora.evaluation.mergeable_layers`.
    """

    def __init__(self, model: nn.Module):
        self.model, self.layers = model, mergeable_layers(model)
        self._merged: dict[str, MergedLayer] = {}

    def merged(self, paths: Mapping[str, PathConfig]) -> AbstractContextManager[nn.Module]:
        """A block with the model of plain layers under ``paths``."""
        return merged_under(self.model, self.layers, paths, self._merged)


class CandidateScorer(_Candidates):
    """Scores candidates on samples.

    Args:
        model: its weights may not change meanwhile.
        validation: how its samples are read.
        metric: ``"accuracy"``; or ``"loss"`` or ``"perplexity"``, both ranked by the negated loss: higher is better.
        order: indices of ``validation``; ``start`` and ``stop`` count in it. None: every call scores all samples.
        objective: what the loss is.

    Raises:
        ValueError: see :func:`glora.evaluation.mergeable_layers`.
    """

    def __init__(
        self,
        model: nn.Module,
        validation: Reading,
        metric: str,
        objective: Objective,
        order: Sequence[int] | None = None,
    ):
        super().__init__(model)
        self.validation, self.metric, self.objective, self.order = validation, metric, objective, order

    def __call__(self, paths: Mapping[str, PathConfig], start: int = 0, stop: int | None = None) -> float:
        """The sum of the scores of samples ``start`` to ``stop`` of ``order``; of all samples without an order.

        Where samples have several targets (tokens), the sum is the mean over those targets times the samples. Of a
        ``DataLoader``, which may have any number of samples, the score is the mean.

        Raises:
            ValueError: an accuracy is asked for, and targets are no classes.
        """
        read = self.validation
        if self.order is not None:
            read = read._replace(dataset=Subset(read.dataset, self.order[start:stop]))
        with self.merged(paths) as merged:
            totals = count(merged, read, self.objective, "validation")
        if math.isnan(totals.right) and self.metric == "accuracy":
            raise ValueError("metric: expected 'loss' where targets are no classes that logits choose, got 'accuracy'")
        score = totals.right if self.metric == "accuracy" else -totals.loss
        samples = 1 if read.loader is not None else totals.samples
        return float(score) * (samples / max(totals.targets, 1))


class OwnScorer(_Candidates):
    """Scores candidates by a function of the merged model.

    Args:
        score: ``score(model) -> number``, higher is better; the model is in eval mode, without gradients.
    """

    def __init__(self, model: nn.Module, score: Callable[[nn.Module], float]):
        super().__init__(model)
        self.score = score

    @torch.no_grad()
    def __call__(self, paths: Mapping[str, PathConfig]) -> float:
        """Raises TypeError for a score that is no number."""
        with self.merged(paths) as merged, evaluating(merged):
            score = self.score(merged)
        try:
            return float(score)
        except (TypeError, ValueError):
            raise TypeError(f"score: expected it to return a number, got {type_of(score)}") from None
