"""A run's data as a model reads them: images from files or from memory, texts as tokens."""

from __future__ import annotations

import os

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..dataset import LABELS, joined, require_batch
from ..processes import is_first
from ..protocols import ImageList, Samples, Splits, preload
from .spec import RunSpec
from .text_models import load_tokenizer, tokenized

_USUAL_MEMORY = 16 * 2**30


def open_splits(spec: RunSpec) -> Splits:
    """The run's data; the test list is read only when the test split is opened."""
    return spec.protocol.open(spec.data, spec.dataset, shots=spec.shots, seed=spec.seed, images=spec.recipe.images)


def ready(samples: Samples, spec: RunSpec) -> Dataset:
    """For one reading: images as they are, decoded when they are read; texts as tokens."""
    if isinstance(samples, ImageList):
        return samples
    assert spec.recipe.texts is not None  # RunRecipe
    return tokenized(samples, load_tokenizer(spec.recipe.model.name), spec.recipe.texts.max_length)


def in_memory(samples: Samples, spec: RunSpec, progress: bool) -> Dataset:
    """For many readings: images without random transforms are decoded once, if they fit into memory."""
    if not isinstance(samples, ImageList) or samples.random:
        return ready(samples, spec)
    assert spec.recipe.images is not None  # RunRecipe
    size = len(samples) * 3 * spec.recipe.images.size**2 * 4
    return preload(samples, progress=progress and is_first()) if size <= _memory_for_images() else samples


def loading_processes(spec: RunSpec) -> int:
    """The recipe's number of loading processes, but no more than there are cores."""
    return min(spec.recipe.training.workers, os.cpu_count() or 1)


def first_inputs(dataset: Dataset, count: int, device: torch.device) -> Tensor | dict[str, Tensor]:
    """The inputs of a model for the first ``count`` samples, or all of them if there are fewer; without labels."""
    size = min(count, len(dataset))  # type: ignore[arg-type]
    batch = require_batch("dataset", joined([dataset[index] for index in range(size)])).to(device)
    if isinstance(batch.inputs, Tensor):
        return batch.inputs
    return {name: tensor for name, tensor in batch.inputs.items() if name != LABELS}


def _memory_for_images() -> int:
    """A quarter of this machine's memory, in bytes, shared by the processes on it."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else _USUAL_MEMORY
    return memory // 4 // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
