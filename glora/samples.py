"""What a data set has to hold: checked before any work, with messages that say what to pass instead."""

from __future__ import annotations

from collections.abc import Sized
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, TensorDataset, default_collate

from .arguments import type_of
from .batches import drawing_from


def require_data(argument: str, dataset: Any) -> int:
    """How many samples a map-style data set of ``(input, target)`` has; its first one is read.

    Raises:
        TypeError: anything else, such as a ``DataLoader`` or samples that are dictionaries.
        ValueError: no sample.
    """
    wanted = f"{argument}: expected a map-style data set of (input, target)"
    if isinstance(dataset, DataLoader):
        raise TypeError(f"{wanted}, got a DataLoader; pass its .dataset, and the batch size by its own argument")
    if isinstance(dataset, Tensor) or (
        isinstance(dataset, (tuple, list)) and dataset and all(isinstance(part, Tensor) for part in dataset)
    ):
        raise TypeError(f"{wanted}, got tensors; pass torch.utils.data.TensorDataset(inputs, targets)")
    if isinstance(dataset, dict):
        raise TypeError(f"{wanted}, got a dictionary with the keys {list(dataset)}; pass one of its values")
    sized = isinstance(dataset, Sized) and hasattr(dataset, "__getitem__")
    if not sized or isinstance(dataset, (IterableDataset, str)):
        raise TypeError(f"{wanted}, with a length and an index, got {type_of(dataset)}")
    if not len(dataset):
        raise ValueError(f"{argument}: expected at least one sample, got none")
    if type(dataset) is TensorDataset:
        require_pair(argument, dataset.tensors)
    elif not isinstance(dataset, TensorDataset):  # of which a subclass may know whole batches alone, as train reads it
        _require_first_pair(argument, dataset)
    return len(dataset)


def _require_first_pair(argument: str, dataset: Any) -> None:
    with drawing_from(0):
        sample = dataset[0]
    try:
        batch = default_collate([sample])
    except TypeError:
        batch = sample
    require_pair(argument, batch, sample)


def require_pair(argument: str, batch: Any, sample: Any = None) -> None:
    """Raise TypeError unless a collated batch is a pair of tensors; the message shows ``sample``, if given."""
    pair = isinstance(batch, (tuple, list)) and len(batch) == 2
    if not pair or not all(isinstance(part, Tensor) for part in batch):
        shown = batch if sample is None else sample
        raise TypeError(
            f"{argument}: expected samples (input, target) of tensors, arrays or numbers, got {_form(shown)}; wrap it "
            "in a data set whose __getitem__ returns such a pair"
        )


def require_output(output: Any, remedy: str = "") -> None:
    """Raise TypeError unless what a model returned is a tensor."""
    expected = f"to return a tensor of logits; wrap it in a module that does{remedy}"
    if not isinstance(output, Tensor):
        raise TypeError(f"model: expected it {expected}; got {type_of(output)}")


def _form(sample: Any) -> str:
    if isinstance(sample, dict):
        return f"a dictionary with the keys {list(sample)}"
    if isinstance(sample, (tuple, list)):
        return f"({', '.join(map(type_of, sample))})"
    return type_of(sample)
