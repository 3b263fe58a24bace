"""Parts of a validation split for successive halving: which samples, and how many of them at each rung."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Subset, TensorDataset

from ..dataset import Collate, Reading, batch_at, joined


def rung_ends(shares: Sequence[float], samples: int) -> list[int]:
    """Where each rung ends: after rung ``i`` a candidate has been scored on the first ``ends[i]`` samples.

    Raises:
        ValueError: a rung without a sample of its own.
    """
    ends = [round(share * samples) for share in shares]
    if any(end <= start for start, end in zip([0, *ends], ends)):
        raise ValueError(f"halving: expected rungs of at least one sample each, got {shares} of {samples} samples")
    return ends


def balanced_order(classes: Sequence[int], seed: int) -> list[int]:
    """An order of all samples. Any beginning of it has the classes in proportion (equal classes: to within a sample).

    Sample ``j`` of the ``n`` of its class (in a random order) comes at the place ``(j + 0.5) / n``; those of the same
    place are in a random order.
    """
    labels = torch.as_tensor(classes)
    shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    places = torch.empty(len(labels), dtype=torch.float64)
    for label in labels.unique():
        members = shuffled[labels[shuffled] == label]
        places[members] = (torch.arange(len(members), dtype=torch.float64) + 0.5) / len(members)
    return shuffled[places[shuffled].argsort(stable=True)].tolist()


def classes_of(dataset: Any, collate: Collate = joined) -> list[int]:
    """The class of every sample, from the data set's tensors or ``targets`` if it has them; else each is read.

    Samples without one class each, such as texts with a target for every token, count as of one class.
    """
    if isinstance(dataset, Subset):
        classes = classes_of(dataset.dataset, collate)
        return [classes[index] for index in dataset.indices]
    if isinstance(dataset, TensorDataset):
        column = dataset.tensors[1]
        return column.tolist() if _are_classes(column) else [0] * len(dataset)
    if hasattr(dataset, "targets"):
        return [int(target) for target in dataset.targets]
    targets = [batch_at("validation", dataset, index, collate).target for index in range(len(dataset))]
    known = [target for target in targets if target is not None and _are_classes(target)]
    return [int(target) for target in known] if len(known) == len(targets) else [0] * len(targets)


def _are_classes(targets: Tensor) -> bool:
    return targets.dim() == 1 and not targets.is_floating_point()


def search_order(validation: Reading, seed: int) -> list[int]:
    """The order in which a search with halving reads its validation split."""
    return balanced_order(classes_of(validation.dataset, validation.collate), seed)
