"""Evolutionary search for the best path of every layer under a parameter limit (arXiv 2306.07967, Appendix B).

A population of random paths is scored; then, generation after generation, the best so far are
crossed and mutated, and the offspring scored. Beyond the official code: every candidate that was
scored counts, the last generation too; none is scored twice; the limit is checked for feasibility
first and can neither hang nor be broken; and every score is in a journal as soon as it is known.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.data import Dataset, TensorDataset
from tqdm.auto import tqdm

from .checksum import checksum
from .config import LayerShape, PathConfig, SearchSpace
from .distributed import holds_replica, require_whole
from .evaluation import evaluate_merged
from .files import write_atomically
from .journal import Journal, Scores
from .modules import require_layers
from .paths import Paths, sampler_for
from .ranks import is_first, require_agreement, require_group, together, world_size
from .sampling import PathSampler

_TRIES = 50
Key = tuple[PathConfig, ...]
Evaluate = Callable[[Paths], float]


@dataclass(frozen=True)
class SearchSettings:
    """The evolution's settings; the defaults are the paper's.

    Args:
        population: candidates of the first generation, all random.
        top: the best so far, from which offspring come.
        crossover: offspring a generation that take each layer's path from one of two parents.
        mutation: offspring a generation that redraw some layers' paths of one parent.
        mutation_probability: the chance of each layer to be redrawn.
        generations: generations of offspring after the first.
        seed: of every draw.

    Raises:
        ValueError: a value out of range.
    """

    population: int = 50
    top: int = 10
    crossover: int = 25
    mutation: int = 25
    mutation_probability: float = 0.2
    generations: int = 20
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("population", 1), ("top", 1), ("crossover", 0), ("mutation", 0), ("generations", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{name}: expected an integer from {least}, got {value!r}")
        probability = self.mutation_probability
        if not isinstance(probability, (int, float)) or not 0 < probability <= 1:
            raise ValueError(f"mutation_probability: expected a number above 0 and up to 1, got {probability!r}")


class Candidate(NamedTuple):
    """A scored path of the whole model."""

    paths: Paths
    score: float
    parameters: int
    generation: int


@dataclass(frozen=True)
class SearchResult:
    """What a search found.

    Attributes:
        best: the candidate of the highest score; of equals the smaller, then the earlier.
        history: every candidate, in the order of evaluation.
        evaluated: evaluations made by this call; the others were in the journal.
        seconds: of this call.
        limit: the parameter limit, or None.
    """

    best: Candidate
    history: tuple[Candidate, ...]
    evaluated: int
    seconds: float
    limit: int | None

    def to_dict(self) -> dict:
        """Plain data for JSON."""
        return {
            "best": _describe(self.best),
            "limit": self.limit,
            "evaluations": len(self.history),
            "evaluated_now": self.evaluated,
            "seconds": self.seconds,
            "history": [[c.generation, c.parameters, c.score] for c in self.history],
        }

    def save(self, file: str | os.PathLike) -> None:
        """Write :meth:`to_dict` as JSON, atomically."""
        content = json.dumps(self.to_dict(), indent=1).encode()
        write_atomically(file, lambda stream: stream.write(content))


def _describe(candidate: Candidate) -> dict:
    paths = {name: path.to_dict() for name, path in candidate.paths.items()}
    return {**candidate._asdict(), "paths": paths}


def search(
    model: nn.Module,
    space: SearchSpace,
    validation: Dataset,
    *,
    limit: int | None = None,
    settings: SearchSettings = SearchSettings(),
    metric: str = "accuracy",
    journal: str | os.PathLike | None = None,
    progress: bool = True,
    batch_size: int = 256,
) -> SearchResult:
    """The best path of every layer of a trained supernet, by its score on ``validation`` alone.

    Every candidate is merged into plain layers for its evaluation. ``model`` is left as it is; call
    ``set_paths(model, result.best.paths)`` to take the result.

    Of several processes (see :func:`glora.train`) every one calls it with the same arguments. Each evaluates its
    part of the candidates; the result is the same on all of them, for any number of them.

    Args:
        space: what each tensor may be.
        validation: pairs of input and class; never the test split.
        limit: the most support parameters a path may read.
        metric: ``"accuracy"``, or ``"loss"`` where few samples make accuracy too coarse.
        journal: a file that holds every score; an interrupted search continues from it.

    Raises:
        ValueError: a limit that no path meets, a space that does not fit the model, an unknown
            metric, or a journal of another search (of other weights, images or metric); processes that have
            no group or differ in their arguments or weights, or a wrapped model.
        RuntimeError: another process failed.
    """
    require_group()
    layers = together(lambda: _checked_layers(model, space, limit, metric))

    def score(paths: Paths) -> float:
        metrics = evaluate_merged(model, paths, validation, batch_size)
        return metrics.accuracy if metric == "accuracy" else -metrics.loss

    identified = journal is not None or world_size() > 1
    return evolve(
        layers,
        space,
        score,
        limit=limit,
        settings=settings,
        journal=journal,
        scored_by=_scored_by(model, validation, metric) if identified else None,
        progress=progress,
    )


def _checked_layers(model: nn.Module, space: SearchSpace, limit: int | None, metric: str) -> dict[str, LayerShape]:
    if metric not in ("accuracy", "loss"):
        raise ValueError(f"metric: expected 'accuracy' or 'loss', got {metric!r}")
    require_whole(model)
    if holds_replica(model):
        raise ValueError("model: expected one without DistributedDataParallel; pass model.module")
    sampler_for(model, space, limit)  # its checks name the model's layers
    return {name: layer.shape for name, layer in require_layers(model).items()}


def _scored_by(model: nn.Module, validation: Dataset, metric: str) -> dict[str, Any]:
    """What scores depend on beside the paths: those of other weights or images are not this model's."""
    tensors = [*model.parameters(), *model.buffers()]
    if isinstance(validation, TensorDataset):
        tensors += validation.tensors
    return {"metric": metric, "samples": len(validation), "tensors": checksum(tensors)}  # type: ignore[arg-type]


def evolve(
    layers: Mapping[str, LayerShape],
    space: SearchSpace,
    evaluate: Evaluate,
    *,
    limit: int | None = None,
    settings: SearchSettings = SearchSettings(),
    journal: str | os.PathLike | None = None,
    scored_by: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> SearchResult:
    """The evolution itself, for any score: ``evaluate(paths)``, higher is better.

    The candidates depend on the arguments and on the scores alone; a resumed search therefore
    replays the journal's scores and goes on as if it had not been cut. What ``evaluate`` itself
    depends on goes into ``scored_by`` (plain data): a journal with something else there is refused.

    Every one of several processes calls it, as it does :func:`search`; ``evaluate`` has to score equally on each.
    """
    require_group()
    sampler = together(lambda: PathSampler(layers, space, limit))
    evolution = _Evolution(sampler, settings)
    description = {
        "layers": [[name, *shape] for name, shape in layers.items()],
        "space": space.to_dict(),
        "settings": asdict(settings),
        "limit": limit,
        "scored_by": dict(scored_by or {}),
    }
    require_agreement("arguments", {**description, "journal": journal is not None})
    scores = Scores(None if journal is None else Journal(journal, description))
    started = time.perf_counter()
    total = settings.population + settings.generations * (settings.crossover + settings.mutation)
    history: list[Candidate] = []
    with tqdm(total=total, desc="search", unit="path", disable=not (progress and is_first())) as bar:
        for generation in range(settings.generations + 1):
            offspring = evolution.first() if generation == 0 else evolution.next(history)
            candidates = [dict(zip(sampler.layers, key)) for key in offspring]
            calls = {_encode(key): partial(evaluate, paths) for key, paths in zip(offspring, candidates)}
            for paths, score in zip(candidates, scores.of(calls)):
                history.append(Candidate(paths, score, sampler.count(paths), generation))
                bar.update()
            best = min(history, key=rank)
            bar.set_postfix_str(f"best {best.score:.4f} with {best.parameters:,} parameters")
    return SearchResult(best, tuple(history), scores.evaluated, time.perf_counter() - started, limit)


def rank(candidate: Candidate) -> tuple[float, int]:
    """Sort key: the best first. A NaN score comes last."""
    score = candidate.score if candidate.score == candidate.score else -float("inf")
    return -score, candidate.parameters


class _Evolution:
    """Draws candidates that were not drawn before; fewer where the space has no more to give."""

    def __init__(self, sampler: PathSampler, settings: SearchSettings):
        self.sampler, self.settings = sampler, settings
        self.generator = torch.Generator().manual_seed(settings.seed)
        self.seen: set[Key] = set()

    def first(self) -> list[Key]:
        return self._fresh(self.settings.population, self._random)

    def next(self, history: list[Candidate]) -> list[Key]:
        parents = [tuple(c.paths.values()) for c in sorted(history, key=rank)[: self.settings.top]]
        crossed = self._fresh(self.settings.crossover, lambda: self._cross(parents))
        mutated = self._fresh(self.settings.mutation, lambda: self._mutate(parents))
        wanted = self.settings.crossover + self.settings.mutation
        return crossed + mutated + self._fresh(wanted - len(crossed) - len(mutated), self._random)

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

    def _cross(self, parents: list[Key]) -> Key:
        one, other = (parents[self._index(len(parents))] for _ in range(2))
        coins = torch.rand(len(one), generator=self.generator).tolist()
        return self._legal(tuple(a if coin < 0.5 else b for a, b, coin in zip(one, other, coins)))

    def _mutate(self, parents: list[Key]) -> Key:
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


def _encode(key: Key) -> str:
    return ";".join(",".join(path.to_dict().values()) for path in key)
