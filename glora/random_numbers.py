"""Random numbers that are functions of a seed, beside the generators that a run goes on with."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader


def mix(seed: int, index: int) -> int:
    """A seed for the ``index``-th use of ``seed``."""
    return (seed * 1_000_003 + index * 7_919 + 12_345) % 2**63


@contextmanager
def drawing_from(seed: int) -> Iterator[None]:
    """Seed Python's, numpy's and torch's global generators (on the CPU) with ``seed``; restore them after the block."""
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])


def seed_loader(loader: DataLoader, seed: int, turn: int) -> list[tuple[torch.Generator, Tensor]]:
    """Seed the generators that ``loader`` and its samplers have of their own, for pass number ``turn``.

    Samplers that ask for the number of the pass (``set_epoch``) get it.

    Returns:
        The generators, with their states before.
    """
    inner = getattr(loader.batch_sampler, "sampler", None)
    owners: list[Any] = [loader, loader.sampler, loader.batch_sampler, inner]
    generators = {id(own): own for owner in owners if (own := getattr(owner, "generator", None)) is not None}
    before = [(generator, generator.get_state()) for generator in generators.values()]
    for generator, _ in before:
        generator.manual_seed(seed)
    for owner in owners:
        if hasattr(owner, "set_epoch"):
            owner.set_epoch(turn)
    return before


@contextmanager
def repeatable(loader: DataLoader) -> Iterator[DataLoader]:
    """A block in which a pass over ``loader`` is always the same, and after which all generators go on as before."""
    before = seed_loader(loader, 0, 0)
    try:
        with drawing_from(0):
            yield loader
    finally:
        for generator, state in before:
            generator.set_state(state)
