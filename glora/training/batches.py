"""The batch of every step: which samples, and the random numbers that each is made with.

Both are functions of the seed and the step alone. So a run that was cut continues as if it had not been, with any
number of loading processes and of ranks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import count
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, TensorDataset

from ..dataset import Collate, joined
from ..distributed import share
from ..files import checksum
from ..processes import process_rank, world_size
from ..random_numbers import drawing_from, mix, seed_loader
from ..transfers import upload
from .recipe import Recipe

_CPU = torch.device("cpu")


class StepSampler(Sampler[list[int]]):
    """The indices of each step's batch: consecutive pieces of an endless sequence of shuffled epochs.

    The batch of step t depends on ``(size, batch_size, seed, t)`` alone, so that a resumed run
    continues without replaying the epochs before. Only ``part`` of each batch is yielded.
    """

    def __init__(self, size: int, batch_size: int, seed: int, start: int, stop: int, part: slice = slice(None)):
        self.size, self.batch_size, self.seed, self.start, self.stop = size, batch_size, seed, start, stop
        self.part = part

    def __len__(self) -> int:
        return self.stop - self.start

    def __iter__(self) -> Iterator[list[int]]:
        epoch, order = -1, []
        for step in range(self.start, self.stop):
            batch = []
            for position in range(step * self.batch_size, (step + 1) * self.batch_size):
                if position // self.size != epoch:
                    epoch = position // self.size
                    generator = torch.Generator().manual_seed(mix(self.seed, epoch))
                    order = torch.randperm(self.size, generator=generator).tolist()
                batch.append(order[position % self.size])
            yield batch[self.part]


class _Numbered(Sampler[list[tuple[int, int]]]):
    """The batches of a :class:`StepSampler` as pairs (index, number of the sample since step 0)."""

    def __init__(self, steps: StepSampler):
        self.steps = steps

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        first = self.steps.part.indices(self.steps.batch_size)[0]
        for step, batch in enumerate(self.steps, self.steps.start):
            number = step * self.steps.batch_size + first
            yield [(index, number + i) for i, index in enumerate(batch)]


class _Repeatable(Dataset):
    """``dataset``, each sample read with its own random numbers: functions of the seed and the sample's number."""

    def __init__(self, dataset: Dataset, seed: int):
        self.dataset, self.seed = dataset, seed

    def __getitem__(self, numbered: tuple[int, int]) -> Any:
        index, number = numbered
        with drawing_from(mix(mix(self.seed, -2), number)):
            return self.dataset[index]


def batches(
    dataset: Dataset | DataLoader,
    recipe: Recipe,
    start: int,
    workers: int = 0,
    device: torch.device = _CPU,
    collate: Collate = joined,
) -> Iterator[Any]:
    """This rank's share of the batch of each step from ``start`` on, for a model on ``device``.

    A ``DataLoader`` is read pass after pass as it is, with its own shuffling, seeded for every pass and batch.

    A ``TensorDataset`` is indexed a whole batch at once: on the device if it fits there, else by ``workers`` processes.
    That of a subclass is indexed in this process; what it draws at random comes from torch's generator. In other data
    sets each sample has its own generators, and ``workers`` processes read the samples. For a GPU they are pinned.
    """
    if isinstance(dataset, DataLoader):
        return _loaded(dataset, recipe.seed, start)
    part = share(recipe.batch_size)[0]
    size: int = len(dataset)  # type: ignore[arg-type]
    sampler = StepSampler(size, recipe.batch_size, recipe.seed, start, recipe.steps, part)
    # A generator of its own: without it the loader draws from torch's, which dropout uses.
    generator = torch.Generator().manual_seed(mix(recipe.seed, start))
    pins = device.type == "cuda" and not _is_on_gpu(dataset)
    load = partial(DataLoader, generator=generator, pin_memory=pins)
    steps: Iterator[Any]
    if type(dataset) is TensorDataset and _fits(dataset.tensors, device):
        steps = _indexed([tensor.to(device) for tensor in dataset.tensors], sampler)
    elif isinstance(dataset, TensorDataset):
        alone = type(dataset) is not TensorDataset
        steps = iter(load(dataset, batch_size=None, sampler=sampler, num_workers=0 if alone else workers))
    else:
        numbered = _Repeatable(dataset, recipe.seed)
        steps = iter(load(numbered, batch_sampler=_Numbered(sampler), num_workers=workers, collate_fn=collate))
    return steps if world_size() == 1 else _reseeded(steps, recipe.seed, start)


def _loaded(loader: DataLoader, seed: int, start: int) -> Iterator[Any]:
    """The batches of ``loader`` from step ``start`` on. Those before it in the same pass are read and left out."""
    length = batches_in(loader)
    # without a length, the passes are counted from the first
    passed, before = (0, start) if length is None else divmod(start, length)
    step = start - before
    while True:
        own = mix(mix(seed, -4), passed)
        seed_loader(loader, own, passed)
        with drawing_from(own):
            turn = iter(loader)
        first = step
        while True:
            with drawing_from(mix(mix(seed, -5), step)):
                batch = next(turn, None)
            if batch is None:
                break
            if step >= start:
                yield batch
            step += 1
        if step == first:
            raise ValueError("dataset: expected a DataLoader with at least one batch, got none")
        passed += 1


def batches_in(loader: DataLoader) -> int | None:
    """How many batches a pass over ``loader`` has; None if it may be another number each time."""
    if isinstance(loader.dataset, IterableDataset):  # several processes may read more or less than its length
        return None
    try:
        return len(loader) or None
    except TypeError:  # a sampler without a length
        return None


def _is_on_gpu(dataset: Dataset) -> bool:
    """Whether a data set of tensors holds some on a GPU, which need not and cannot be pinned."""
    return isinstance(dataset, TensorDataset) and any(tensor.is_cuda for tensor in dataset.tensors)


def _fits(tensors: Iterable[Tensor], device: torch.device) -> bool:
    """Whether tensors may be kept on the device: on a GPU if they take at most a quarter of what is free there."""
    if device.type != "cuda":
        return device.type == "cpu"
    free, _ = torch.cuda.mem_get_info(device)
    return sum(tensor.nbytes for tensor in tensors if tensor.device != device) <= free // 4


def _indexed(tensors: Sequence[Tensor], sampler: StepSampler) -> Iterator[Any]:
    """The batches of tensors, on their device; the host waits for none of them."""
    for batch in sampler:
        index = upload(torch.tensor(batch, device=_CPU), tensors[0].device)
        yield tuple(tensor.index_select(0, index) for tensor in tensors)


def _reseeded(steps: Iterator[tuple[Tensor, Tensor]], seed: int, start: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Reseed torch's generator for each step: ranks draw different numbers, and a resumed run needs no saved state."""
    for step in count(start):
        torch.manual_seed(mix(mix(seed, step), process_rank()))
        yield next(steps)


def fingerprint(dataset: Dataset | DataLoader) -> int | None:
    """Tells ``dataset`` from others of its length: a checksum of its first, middle and last sample, with a fixed seed.

    None if two readings differ, or hold other things than tensors, arrays, numbers and texts.
    """
    if isinstance(dataset, DataLoader):
        dataset = dataset.dataset
    try:
        size: int = len(dataset)  # type: ignore[arg-type]
        first, second = (_checksum_of_samples(dataset, sorted({0, size // 2, size - 1})) for _ in range(2))
    except Exception:  # reading the sample in a step will raise it
        return None
    return first if first == second else None


def _checksum_of_samples(dataset: Dataset, indices: Iterable[int]) -> int:
    with drawing_from(0):
        return checksum(part for index in indices for part in _parts(dataset[index]))


def _parts(sample: Any) -> Iterator[Tensor]:
    """A sample as tensors and texts; numbers become the tensors that a loader makes of them."""
    if isinstance(sample, Tensor | np.ndarray | np.generic | int | float):
        tensor = torch.as_tensor(sample)
        yield from (_text(f"{tensor.dtype} {tuple(tensor.shape)}"), tensor)
    elif isinstance(sample, Mapping):
        for key, value in sample.items():
            yield from (*_parts(key), *_parts(value))
    elif isinstance(sample, list | tuple):
        yield _text(f"{len(sample)} parts")
        for part in sample:
            yield from _parts(part)
    elif isinstance(sample, str | bytes | None):
        yield _text(repr(sample))
    else:
        raise TypeError(f"cannot tell {type(sample).__name__} from another")


def _text(text: str) -> Tensor:
    return torch.tensor(list(text.encode()), dtype=torch.uint8)
