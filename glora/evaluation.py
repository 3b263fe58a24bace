"""Loss and accuracy of a model, and of a candidate path at merged speed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from .arguments import require_integer
from .config import PathConfig
from .dataset import Collate, Reading, collate_or_joined, reading, require_batch
from .distributed import require_whole
from .layers.base import GLoRALayer
from .merging import require_mergeable
from .models.modules import evaluating, replaced_modules, require_layers, require_model
from .objective import Loss, Metrics, Objective, Outputs, Totals
from .paths import paths_of, using_paths
from .progress import progress_bar
from .random_numbers import repeatable


def evaluate(
    model: nn.Module,
    dataset: Dataset | DataLoader,
    batch_size: int = 256,
    *,
    workers: int = 0,
    progress: bool = False,
    loss_fn: Loss | None = None,
    outputs: Outputs = None,
    collate: Collate | None = None,
) -> Metrics:
    """Mean loss and accuracy of ``model``, in eval mode; for language models the perplexity too (``.perplexity``).

    Means are over samples, or over the tokens that count. A loss that the model or ``loss_fn`` gives as a mean over a
    batch counts as often as the batch has targets; if that mean is weighted, it depends on the batch size.

    Args:
        dataset: samples ``(input, target)``, or dictionaries of the model's arguments with the targets under
            ``labels``; or a ``DataLoader`` of either, which is read as it is.
        workers: processes that read the data set; 0 reads it in this one.
        progress: show a bar.
        loss_fn: ``(output, target) -> scalar``, a mean over the targets. None: the model's own loss, or cross-entropy.
        outputs: where the logits are in the model's output, as for :func:`glora.train`.
        collate: makes a batch of a list of samples, such as transformers' data collators.

    Raises:
        ValueError: an empty data set.
        TypeError: anything else than these, with what to pass instead.

    Example:
        >>> metrics = glora.evaluate(language_model, validation, 8)  # dictionaries with input_ids and labels
        >>> metrics.loss, metrics.perplexity
    """
    require_model(model)
    require_integer("batch_size", batch_size, 1)
    require_integer("workers", workers, 0)
    if isinstance(dataset, IterableDataset):
        read = Reading(dataset, batch_size, workers, collate_or_joined(collate))
    else:
        read = reading("dataset", dataset, batch_size, workers, collate)
    return count(model, read, Objective(model, loss_fn, outputs), shown=progress).means


@torch.no_grad()
def count(
    model: nn.Module, read: Reading, objective: Objective, argument: str = "dataset", shown: bool = False
) -> Totals:
    """As :func:`evaluate`, but as sums; errors name ``argument``. Nothing is drawn from generators that go on."""
    device = next(model.parameters()).device
    totals = Totals(0.0, 0, 0, 0)
    loader = read.batches()
    with evaluating(model), repeatable(loader):
        for found in progress_bar(loader, desc="test", unit="batch", shown=shown):
            batch = require_batch(argument, found).to(device)
            totals = totals.plus(objective.totals(objective.output(model, batch), batch))
    if not totals.samples:
        raise ValueError(f"{argument}: expected at least one sample, got none")
    return totals


def evaluate_merged(
    model: nn.Module,
    paths: Mapping[str, PathConfig] | PathConfig,
    dataset: Dataset | DataLoader,
    batch_size: int = 256,
    **how: Any,
) -> Metrics:
    """As :func:`evaluate`, with every layer merged under ``paths`` for the time of the call.

    Each W_eff is assembled once, not once per batch; layers with a quantised base are used unmerged. The
    model and its paths are left as they are.

    Args:
        how: the other arguments of :func:`evaluate`.

    Raises:
        ValueError: an empty data set, paths of another model, or sharded parameters.
    """
    with merged_under(model, mergeable_layers(model), paths, {}) as merged:
        return evaluate(merged, dataset, batch_size, **how)


class MergedLayer(NamedTuple):
    """A plain layer, and the path that it was merged under."""

    path: PathConfig
    plain: nn.Module


def mergeable_layers(model: nn.Module) -> dict[str, GLoRALayer]:
    """The adapted layers by name. Raises ValueError if one has hooks, or parameters that are sharded or on meta."""
    require_whole(model)
    layers = require_layers(model)
    require_mergeable(layers)
    return layers


@contextmanager
def merged_under(
    model: nn.Module,
    layers: Mapping[str, GLoRALayer],
    paths: Mapping[str, PathConfig] | PathConfig,
    kept: dict[str, MergedLayer],
) -> Iterator[nn.Module]:
    """For a ``with`` block, a model of plain layers that computes what ``model`` does under ``paths``.

    Args:
        layers: :func:`mergeable_layers` of ``model``.
        kept: plain layers of the previous call by name. Those with an equal path are used again, the others replaced.

    Raises:
        ValueError: paths of another model.
    """
    paths = paths_of(layers, paths)
    exact = {name: layer for name, layer in layers.items() if layer.merges_exactly}
    for name, layer in exact.items():
        if name not in kept or kept[name].path != paths[name]:
            kept.pop(name, None)  # first: both might not fit into memory
            kept[name] = MergedLayer(paths[name], layer.merge(paths[name], safe=False))
    replacements: dict[nn.Module, nn.Module] = {layer: kept[name].plain for name, layer in exact.items()}
    unmerged = using_paths(model, paths) if len(exact) < len(layers) else nullcontext()
    with unmerged, replaced_modules(model, replacements):
        yield replacements.get(model, model)
