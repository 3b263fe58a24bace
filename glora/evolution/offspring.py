"""Candidates of a search: random ones, and those that come from the best so far by crossover and mutation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch

from ..config import PathConfig
from ..sampling import PathSampler
from .settings import SearchSettings

_TRIES = 50
Key: TypeAlias = tuple[PathConfig, ...]


class Offspring:
    """Draws candidates that were not drawn before; fewer where the space has no more to give."""

    def __init__(self, sampler: PathSampler, settings: SearchSettings):
        self.sampler, self.settings = sampler, settings
        self.generator = torch.Generator().manual_seed(settings.seed)
        self.seen: set[Key] = set()

    def first(self) -> list[Key]:
        return self._fresh(self.settings.population, self._random)

    def next(self, parents: Sequence[Key]) -> list[Key]:
        crossed = self._fresh(self.settings.crossover, lambda: self._cross(parents))
        mutated = self._fresh(self.settings.mutation, lambda: self._mutate(parents))
        return crossed + mutated + self._fresh(self.settings.offspring - len(crossed) - len(mutated), self._random)

    def _fresh(self, count: int, draw: Callable[[], Key]) -> list[Key]:
        found: list[Key] = []
        for _ in range(_TRIES * count):
            if len(found) == count:
                break
            key = draw()
            if key not in self.seen:
                self.seen.add(key)
                found.append(key)
        return found

    def _random(self) -> Key:
        return tuple(self.sampler.sample(self.generator).values())

    def _cross(self, parents: Sequence[Key]) -> Key:
        one, other = (parents[self._index(len(parents))] for _ in range(2))
        coins = torch.rand(len(one), generator=self.generator).tolist()
        return self._legal(tuple(a if coin < 0.5 else b for a, b, coin in zip(one, other, coins)))

    def _mutate(self, parents: Sequence[Key]) -> Key:
        parent = parents[self._index(len(parents))]
        coins = torch.rand(len(parent), generator=self.generator).tolist()
        redrawn = (
            self.sampler.sample_layer(name, self.generator) if coin < self.settings.mutation_probability else path
            for name, path, coin in zip(self.sampler.layers, parent, coins)
        )
        return self._legal(tuple(redrawn))

    def _legal(self, key: Key) -> Key:
        return tuple(self.sampler.repair(dict(zip(self.sampler.layers, key)), self.generator).values())

    def _index(self, count: int) -> int:
        return int(torch.randint(count, (), generator=self.generator))
