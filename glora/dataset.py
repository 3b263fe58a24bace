"""What a data set has to hold, with messages that say what to pass instead.

The data set itself is checked before any work, its samples when they are read, in the processes that read them.
"""

from __future__ import annotations

from collections.abc import Sized
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, TensorDataset, default_collate

from .arguments import type_of


def require_data(argument: str, dataset: Any) -> int:
    """How many samples a map-style data set has.

    Raises:
        TypeError: anything else, such as a ``DataLoader``.
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
    return len(dataset)


def collate(samples: list[Any]) -> Any:
    """The batch of ``samples``, if that is a pair of tensors; else the first one, for :func:`require_pair` to name."""
    try:
        batch = default_collate(samples)
    except TypeError:
        return samples[0]
    return batch if _is_pair(batch) else samples[0]


def require_pair(argument: str, batch: Any) -> None:
    """Raise TypeError unless ``batch``, as :func:`collate` returns it, is a pair of tensors."""
    if not _is_pair(batch):
        raise TypeError(
            f"{argument}: expected samples (input, target) of tensors, arrays or numbers, got {_form(batch)}; wrap it "
            "in a data set whose __getitem__ returns such a pair"
        )


def pair_at(argument: str, dataset: Any, index: int) -> Any:
    """The sample at ``index``. Raises TypeError unless it is a pair of tensors, arrays or numbers."""
    sample = dataset[index]
    require_pair(argument, collate([sample]))
    return sample


def _is_pair(batch: Any) -> bool:
    return isinstance(batch, (tuple, list)) and len(batch) == 2 and all(isinstance(part, Tensor) for part in batch)


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
