"""Evolutionary search for the best path of every layer under a parameter limit (arXiv 2306.07967, Appendix B).

A population of random paths is scored; then, generation after generation, the best so far are
crossed and mutated, and the offspring scored. Beyond the official code: every candidate that was
scored counts, the last generation too; none is scored twice; the limit is checked for feasibility
first and can neither hang nor be broken; every score is in a journal as soon as it is known; and
a layer whose path did not change since the last candidate is not merged again.
"""

from __future__ import annotations

import os
import time
import zlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from ..arguments import FILE, require_function, require_integer, require_type
from ..config import KINDS, LayerShape, SearchSpace
from ..dataset import Collate, Reading, reading, require_batch, tensors_at, tensors_of_batch
from ..distributed import holds_replica, require_whole
from ..files import checksum
from ..models.modules import require_layers
from ..objective import Loss, Objective, Outputs
from ..paths import Paths, sampler_for
from ..processes import require_agreement, require_group, together, world_size
from ..random_numbers import repeatable
from ..sampling import PathSampler
from .bar import SearchBar
from .halving import rung_ends, search_order
from .journal import Journal, Scores
from .offspring import Offspring
from .race import Race
from .result import SearchResult
from .scoring import METRICS, CandidateScorer, OwnScorer
from .selection import Candidate, best_first, in_order
from .settings import SearchSettings

Evaluate = Callable[..., float]
_IDENTIFYING = 64  # samples that a journal knows a data set by


def search(
    model: nn.Module,
    space: SearchSpace,
    validation: Dataset | DataLoader | None = None,
    *,
    score: Callable[[nn.Module], float] | None = None,
    limit: int | None = None,
    settings: SearchSettings = SearchSettings(),
    metric: str = "accuracy",
    loss_fn: Loss | None = None,
    outputs: Outputs = None,
    collate: Collate | None = None,
    journal: str | os.PathLike | None = None,
    progress: bool = True,
    batch_size: int = 256,
    workers: int = 0,
) -> SearchResult:
    """The best path of every layer of a trained supernet, by its score on ``validation`` alone.

    Every candidate is merged into plain layers for its evaluation. ``model`` is left as it is; call
    ``set_paths(model, result.best.paths)`` to take the result.

    With several processes (see :func:`glora.train`), each calls it with the same arguments. Each evaluates its
    part of the candidates; the result is the same on all of them, for any number of them.

    Args:
        space: what each tensor may be.
        validation: samples as for :func:`glora.evaluate`, or a ``DataLoader`` of them; never the test split. With
            ``settings.halving`` it is read in a seeded order of which every beginning has the classes in proportion;
            the loss of tokens is then a mean of the means of these parts.
        score: in place of ``validation``, ``score(merged model) -> number``, higher is better. It is called with the
            model in eval mode and without gradients, and has to give the same number for the same model.
        limit: the most support parameters a path may read.
        metric: ``"accuracy"``; ``"loss"``, where few samples make accuracy too coarse; ``"perplexity"``, the same for
            language models. A score is then minus the mean loss, since higher is better; people are shown loss or
            perplexity.
        loss_fn, outputs, collate: as for :func:`glora.evaluate`.
        journal: a file that holds every score; an interrupted search continues from it.
        progress: show a bar and, after the first ten scores, how long the search will take.
        workers: processes that read ``validation``, anew for every candidate; 0 reads it in this one. For images that
            are decoded on the way: what fits into memory (``TensorDataset``) needs none.

    Raises:
        ValueError: a limit that no path meets, a space that does not fit the model, an unknown metric, or a journal of
            another search (of other weights, samples, metric or code of ``loss_fn``; unless the data set is a
            ``TensorDataset``, 64 samples are compared; a ``score`` cannot be); processes that have no group or differ
            in their arguments or weights, or a wrapped model; both ``validation`` and ``score``, or neither; halving
            with a ``score`` or a ``DataLoader``.
        TypeError: an argument or samples of another type.
        RuntimeError: another process failed.

    Example:
        >>> result = glora.search(model, space, validation, metric="perplexity", limit=500_000)
        >>> result = glora.search(model, space, score=lambda merged: bleu(merged, sentences), limit=500_000)
    """
    require_group()
    layers = together(lambda: _checked_layers(model, space, limit))
    common: dict[str, Any] = {"limit": limit, "settings": settings, "journal": journal, "progress": progress}
    identified = journal is not None or world_size() > 1
    if score is not None:
        together(lambda: _check_score(score, validation, settings))
        own = together(lambda: OwnScorer(model, score))
        known = {"metric": "score", "weights": _weights(model)} if identified else None
        return evolve(layers, space, own, scored_by=known, **common)
    read = together(lambda: _reading(validation, metric, batch_size, workers, collate))
    objective = together(lambda: Objective(model, loss_fn, outputs))
    order = together(lambda: _order(read, settings))
    scorer = together(lambda: CandidateScorer(model, read, metric, objective, order))
    return evolve(
        layers,
        space,
        scorer,
        samples=read.samples,
        scored_by=_scored_by(model, read, metric, objective) if identified else None,
        metric=metric,
        **common,
    )


def check_search(
    model: nn.Module,
    space: SearchSpace,
    validation: Dataset | DataLoader,
    *,
    limit: int | None = None,
    settings: SearchSettings = SearchSettings(),
    metric: str = "accuracy",
) -> None:
    """Raise what :func:`search` would for these arguments, before it evaluates anything."""
    read = _reading(validation, metric)
    _checked_layers(model, space, limit)
    _order(read, settings)
    _rung_ends(settings, read.samples)


def _reading(
    validation: Dataset | DataLoader | None,
    metric: str,
    batch_size: int = 1,
    workers: int = 0,
    collate: Collate | None = None,
) -> Reading:
    if metric not in METRICS:
        raise ValueError(f"metric: expected one of {METRICS}, got {metric!r}")
    require_integer("batch_size", batch_size, 1)
    require_integer("workers", workers, 0)
    if validation is None:
        raise ValueError("validation: expected a data set, or score= in its place, got neither")
    return reading("validation", validation, batch_size, workers, collate)


def _check_score(score: object, validation: object, settings: SearchSettings) -> None:
    require_function("score", score, "a function of a model")
    require_type("settings", settings, SearchSettings, "glora.SearchSettings")
    if validation is not None:
        raise ValueError("score: expected None where validation is scored, got both; read it within score")
    if settings.halving:
        raise ValueError(f"settings.halving: expected () with score=, which has no parts, got {settings.halving}")


def _order(read: Reading, settings: SearchSettings) -> list[int] | None:
    require_type("settings", settings, SearchSettings, "glora.SearchSettings")
    if settings.halving and read.loader is not None:
        raise ValueError("settings.halving: expected () with a DataLoader, which is read as a whole; pass its .dataset")
    return search_order(read, settings.seed) if settings.halving else None


def _checked_layers(model: nn.Module, space: SearchSpace, limit: int | None) -> dict[str, LayerShape]:
    require_whole(model)
    if holds_replica(model):
        raise ValueError("model: expected one without DistributedDataParallel; pass model.module")
    sampler_for(model, space, limit)  # its checks name the model's layers
    return {name: layer.shape for name, layer in require_layers(model).items()}


def _scored_by(model: nn.Module, read: Reading, metric: str, objective: Objective) -> dict[str, Any]:
    """What scores depend on, to the last bit, apart from the paths."""
    own = {"loss_fn": objective.loss_fn, "outputs": objective.outputs}
    return {
        "metric": metric,
        "batch_size": read.batch_size,
        "samples": read.samples,
        "weights": _weights(model),
        "validation": checksum(_samples_of(read)),
        **{name: _identity_of(value) for name, value in own.items() if value is not None},
    }


def _weights(model: nn.Module) -> int:
    scales = [layer.scales for layer in require_layers(model).values()]
    factors = [torch.tensor([scale.of(slot, kind) for slot in KINDS for kind in KINDS[slot]]) for scale in scales]
    scaled = any(scale.factors for scale in scales)
    return checksum([*model.parameters(), *model.buffers(), *(factors if scaled else [])])


def _identity_of(value: Any) -> str:
    """A text that tells functions from others, by their code, and modules by what they hold."""
    if isinstance(value, str):
        return value
    if isinstance(value, nn.Module):
        held = {name: v for name, v in vars(value).items() if isinstance(v, (bool, int, float, str, type(None)))}
        return f"{type(value).__qualname__} {held} {checksum(value.state_dict().values()):08x}"
    name = getattr(value, "__qualname__", type(value).__qualname__)
    code = getattr(value, "__code__", None)
    return name if code is None else f"{name} {zlib.crc32(code.co_code + repr(code.co_consts).encode()):08x}"


def _samples_of(read: Reading) -> list[Tensor]:
    """All tensors of a ``TensorDataset``; up to 64 samples of another data set, which may decode images.

    Of a loader, the first two batches.
    """
    if read.loader is not None:
        with repeatable(read.loader) as loader:
            batches = [require_batch("validation", batch) for batch in islice(loader, 2)]
        return [tensor for batch in batches for tensor in tensors_of_batch(batch)]
    samples: Any = read.dataset
    if isinstance(samples, TensorDataset):
        return list(samples.tensors)
    size = len(samples)
    chosen = [size * index // _IDENTIFYING for index in range(_IDENTIFYING)] if size > _IDENTIFYING else range(size)
    return [part for index in chosen for part in tensors_at("validation", samples, index, read.collate)]


def evolve(
    layers: Mapping[str, LayerShape],
    space: SearchSpace,
    evaluate: Evaluate,
    *,
    samples: int | None = None,
    limit: int | None = None,
    settings: SearchSettings = SearchSettings(),
    journal: str | os.PathLike | None = None,
    scored_by: Mapping[str, Any] | None = None,
    metric: str = "score",
    progress: bool = True,
) -> SearchResult:
    """The evolution itself, for any score, higher is better: ``evaluate(paths)``.

    The candidates depend on the arguments and on the scores alone; a resumed search therefore
    replays the journal's scores and goes on as if it had not been cut. What ``evaluate`` itself
    depends on goes into ``scored_by`` (plain data): a journal with something else there is refused.

    The candidates of a generation are evaluated in the order of their paths, layer by layer, so that few layers have
    to be merged again between neighbours; ``history`` has them as they were drawn.

    With several processes, each calls it, as with :func:`search`; ``evaluate`` has to give the same scores on each.

    Args:
        samples: how many samples the score is a mean over; halving needs it. ``evaluate(paths, start, stop)`` then is
            the sum of the scores of samples ``start`` to ``stop``.
        metric: how people are shown a score: ``"accuracy"`` (0 to 1) in percent, ``"loss"`` (minus the loss) as a loss,
            anything else as it is.

    Raises:
        ValueError: a limit that no path meets; halving without enough ``samples``; a journal of another search.
    """
    require_group()
    together(lambda: _check_types(evaluate, journal))
    sampler = together(lambda: PathSampler(layers, space, limit))
    ends = together(lambda: _rung_ends(settings, samples))
    description = {
        "layers": [[name, *shape] for name, shape in layers.items()],
        "space": replace(space, shares={}).to_dict(),  # a search does not read them
        "settings": settings.to_dict(),
        "limit": limit,
        "samples": samples,
        "scored_by": dict(scored_by or {}),
    }
    require_agreement("arguments", {**description, "journal": journal is not None})
    scores = Scores(None if journal is None else Journal(journal, description))
    started = time.perf_counter()
    part = evaluate if samples is not None else partial(_whole, evaluate)
    race = Race(sampler, part, scores, ends, settings.objective)
    history = _generations(Offspring(sampler, settings), race, settings, metric, progress)
    return SearchResult(
        best=min((c for c in history if c.share == 1), key=best_first),
        history=tuple(history),
        evaluated=len(scores.new),
        seconds=time.perf_counter() - started,
        limit=limit,
        evaluation_seconds=scores.seconds,
        cost=scores.samples / ends[-1],
    )


def _rung_ends(settings: SearchSettings, samples: int | None) -> list[int]:
    require_type("settings", settings, SearchSettings, "glora.SearchSettings")
    if samples is not None and (type(samples) is not int or samples < 1):
        raise ValueError(f"samples: expected an integer from 1 or None, got {samples!r}")
    if samples is None and settings.halving:
        raise ValueError("halving: expected samples, of which evaluate scores a part at a time; got samples=None")
    return rung_ends(settings.shares, 1 if samples is None else samples)


def _check_types(evaluate: Evaluate, journal: str | os.PathLike | None) -> None:
    require_function("evaluate", evaluate, "a function of paths")
    require_type("journal", journal, FILE, "the path of a file or None")


def _whole(evaluate: Evaluate, paths: Paths, start: int, stop: int) -> float:
    return evaluate(paths)


def _generations(
    offspring: Offspring, race: Race, settings: SearchSettings, metric: str, progress: bool
) -> list[Candidate]:
    """The history of a whole search."""
    sizes = race.sizes(settings.population) + settings.generations * race.sizes(settings.offspring)
    history: list[Candidate] = []
    with SearchBar(settings.candidates, sizes, race.scores, metric, progress) as bar:
        for generation in range(settings.generations + 1):
            complete = [c for c in history if c.share == 1]
            parents = [tuple(c.paths.values()) for c in in_order(complete, settings.objective)[: settings.top]]
            drawn = offspring.next(parents) if generation else offspring.first()
            history += race.run(drawn, generation, bar.update)
            best = min((c for c in history if c.share == 1), key=best_first)
            bar.show_best(best)
    return history
