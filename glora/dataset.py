"""What a data set has to hold, and what a batch of it is, with messages that say what to pass instead.

The data set itself is checked before any work, its samples when they are read, in the processes that read them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sized
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset, default_collate

from .arguments import require_function, type_of

LABELS = "labels"
LABEL_NAMES = (LABELS, "label", "label_ids")  # transformers' collators turn the others into the first
Collate = Callable[[list[Any]], Any]


class Batch(NamedTuple):
    """A batch: what the model is given, and what its output is held against.

    Attributes:
        inputs: the argument of the model; or its arguments by name, the labels among them.
        target: the second half of a pair; of named inputs, those called as in :data:`LABEL_NAMES`, or None.
    """

    inputs: Tensor | dict[str, Any]
    target: Tensor | None

    @property
    def named(self) -> bool:
        return isinstance(self.inputs, dict)

    @property
    def size(self) -> int:
        """How many samples it has."""
        tensors = self.inputs.values() if isinstance(self.inputs, dict) else (self.inputs,)
        return next(len(tensor) for tensor in tensors if isinstance(tensor, Tensor) and tensor.dim())

    def to(self, device: torch.device) -> Batch:
        """The batch on ``device``. Nobody waits for what is copied from pinned memory."""
        inputs, target = self.inputs, self.target
        if isinstance(inputs, Tensor):
            assert target is not None
            return Batch(inputs.to(device, non_blocking=True), target.to(device, non_blocking=True))
        moved = {name: tensor.to(device, non_blocking=True) for name, tensor in inputs.items()}
        key = label_key(inputs)
        if key is not None:
            return Batch(moved, moved[key])
        return Batch(moved, None if target is None else target.to(device, non_blocking=True))


def label_key(inputs: Mapping[str, Any]) -> str | None:
    """The name of the labels among named inputs; None if there are none."""
    return next((name for name in LABEL_NAMES if name in inputs), None)


class Reading(NamedTuple):
    """How a data set is read in order.

    Attributes:
        batch_size: samples that ``collate`` joins at a time.
        workers: processes that read them.
        loader: reads the data set in place of all that, as it is.
    """

    dataset: Dataset
    batch_size: int | None
    workers: int
    collate: Collate
    loader: DataLoader | None = None

    @property
    def samples(self) -> int | None:
        """How many samples are read; None if a loader decides."""
        return len(self.dataset) if self.loader is None else None  # type: ignore[arg-type]

    def batches(self) -> DataLoader:
        """What reads the batches."""
        if self.loader is not None:
            return self.loader
        # a generator of its own: without it the loader draws from torch's, which dropout uses
        return DataLoader(
            self.dataset,
            self.batch_size,
            num_workers=self.workers,
            collate_fn=self.collate,
            generator=torch.Generator(),
        )


def require_data(argument: str, dataset: Any) -> int:
    """How many samples a map-style data set has.

    Raises:
        TypeError: anything else.
        ValueError: no sample.
    """
    wanted = f"{argument}: expected a map-style data set of (input, target) or of dictionaries, or a DataLoader"
    if isinstance(dataset, Tensor) or (
        isinstance(dataset, (tuple, list)) and dataset and all(isinstance(part, Tensor) for part in dataset)
    ):
        raise TypeError(f"{wanted}, got tensors; pass torch.utils.data.TensorDataset(inputs, targets)")
    if isinstance(dataset, Mapping):
        raise TypeError(f"{wanted}, got a dictionary with the keys {list(dataset)}; pass one of its values")
    sized = isinstance(dataset, Sized) and hasattr(dataset, "__getitem__")
    if not sized or isinstance(dataset, (IterableDataset, str)):
        raise TypeError(f"{wanted}, with a length and an index, got {type_of(dataset)}")
    if not len(dataset):
        raise ValueError(f"{argument}: expected at least one sample, got none")
    if type(dataset) is TensorDataset:
        require_batch(argument, dataset.tensors)
    return len(dataset)


def reading(argument: str, dataset: Any, batch_size: int, workers: int = 0, collate: Collate | None = None) -> Reading:
    """How ``dataset`` is read for scores: a map-style data set in order, a ``DataLoader`` as it is.

    Raises:
        TypeError, ValueError: as :func:`require_data`; TypeError also for a ``collate`` that is no function.
    """
    join = collate_or_joined(collate)
    if isinstance(dataset, DataLoader):
        return Reading(dataset.dataset, None, 0, join, dataset)
    require_data(argument, dataset)
    return Reading(dataset, batch_size, workers, join)


def collate_or_joined(collate: Collate | None) -> Collate:
    """``collate``, or :func:`joined` for None. Raises TypeError if it is no function."""
    if collate is None:
        return joined
    require_function("collate", collate, "a function of a list of samples, or None")
    return collate


class Unjoined(NamedTuple):
    """Samples that are no batch, of which the first is shown: :func:`require_batch` says what is wrong with it."""

    first: Any


def joined(samples: list[Any]) -> Any:
    """The batch of ``samples``, a pair or tensors by name; or :class:`Unjoined`."""
    try:
        batch = _joined(samples)
    except (KeyError, RuntimeError, TypeError, ValueError):
        return Unjoined(samples[0])
    return batch if _is_batch(batch) else Unjoined(samples[0])


def _joined(samples: list[Any]) -> Any:
    first = samples[0]
    if isinstance(first, Mapping):
        return _joined_by_name(samples)
    if isinstance(first, (tuple, list)) and len(first) == 2 and isinstance(first[0], Mapping):
        return _joined_by_name([sample[0] for sample in samples]), default_collate([sample[1] for sample in samples])
    return default_collate(samples)


def _joined_by_name(samples: list[Mapping[str, Any]]) -> dict[str, Tensor]:
    """Lists of numbers, as a tokenizer gives them, become tensors. Raises ValueError for different names or shapes."""
    columns = {name: [_as_tensor(sample[name]) for sample in samples] for name in samples[0]}
    if any(sample.keys() != columns.keys() for sample in samples) or any(
        len({tensor.shape for tensor in column}) > 1 for column in columns.values()
    ):
        raise ValueError("samples of different names or shapes")
    return {name: torch.stack(column) for name, column in columns.items()}


def _as_tensor(value: Any) -> Tensor:
    if isinstance(value, np.ndarray) and not value.flags.writeable:
        value = value.copy()
    return torch.as_tensor(value)


def require_batch(argument: str, batch: Any) -> Batch:
    """``batch``, as :func:`joined` or a loader returns it, as a :class:`Batch`. Raises TypeError if it is none."""
    if not _is_batch(batch):
        raise TypeError(f"{argument}: {_fault(batch.first if isinstance(batch, Unjoined) else batch)}")
    if isinstance(batch, Mapping):
        inputs, key = dict(batch), label_key(batch)
        return Batch(inputs, None if key is None else inputs[key])
    inputs, target = batch
    return Batch(dict(inputs) if isinstance(inputs, Mapping) else inputs, target)


def batch_at(argument: str, dataset: Any, index: int, collate: Collate = joined) -> Batch:
    """The sample at ``index``, as a batch of one. Raises TypeError unless it can be one."""
    return require_batch(argument, collate([dataset[index]]))


def tensors_at(argument: str, dataset: Any, index: int, collate: Collate = joined) -> Iterator[Tensor]:
    """The tensors of the sample at ``index``."""
    yield from tensors_of_batch(batch_at(argument, dataset, index, collate))


def tensors_of_batch(batch: Batch) -> Iterator[Tensor]:
    """Its tensors, each once, in an order of their names."""
    inputs, target = batch
    if isinstance(inputs, dict):
        yield from (inputs[name] for name in sorted(inputs))
        target = target if label_key(inputs) is None else None
    else:
        yield inputs
    if target is not None:
        yield target


def _is_batch(batch: Any) -> bool:
    if isinstance(batch, Mapping):
        return _is_by_name(batch)
    if not isinstance(batch, (tuple, list)) or len(batch) != 2 or not isinstance(batch[1], Tensor):
        return False
    return isinstance(batch[0], Tensor) or (isinstance(batch[0], Mapping) and _is_by_name(batch[0]))


def _is_by_name(inputs: Mapping) -> bool:
    return bool(inputs) and all(
        isinstance(name, str) and isinstance(value, Tensor) and value.dim() for name, value in inputs.items()
    )


def _fault(sample: Any) -> str:
    """What is wrong with a sample or batch, and what to do about it."""
    if isinstance(sample, Mapping):
        odd = {name: type_of(value) for name, value in sample.items() if not _is_numeric(value)}
        if odd:
            told = ", ".join(f"{kind} under {name!r}" for name, kind in odd.items())
            return (
                f"expected tensors, arrays or numbers under every key, got {told}; remove such a column "
                f"(datasets: dataset.remove_columns({list(odd)})), or make tensors of it in the data set or by collate="
            )
        return (
            f"expected samples of one shape under every key, and with the same keys, got others; the first has "
            f"{list(sample)}; pad them by collate=, such as transformers.DataCollatorWithPadding(tokenizer)"
        )
    if isinstance(sample, (tuple, list)) and len(sample) == 2 and all(map(_is_numeric, sample)):
        return "expected inputs of one shape and targets of one shape, got others; make them alike, or pad by collate="
    form = f"({', '.join(map(type_of, sample))})" if isinstance(sample, (tuple, list)) else type_of(sample)
    return (
        f"expected samples (input, target) or dictionaries, of tensors, arrays or numbers, got {form}; wrap it in a "
        "data set whose __getitem__ returns such a pair"
    )


def _is_numeric(value: Any) -> bool:
    try:
        _as_tensor(value)
    except (TypeError, ValueError, RuntimeError):
        return False
    return True
