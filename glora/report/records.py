"""The files that the stages of a run left on disk, read and checked: a missing one is None, never guessed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import nan
from pathlib import Path
from typing import Any, NamedTuple

from ..config import LayerShape, PathConfig
from .checked import Entries

Paths = dict[str, PathConfig]
Layers = dict[str, LayerShape]


@dataclass(frozen=True)
class Training:
    """``train.json``."""

    seconds: float


class Evaluated(NamedTuple):
    """One candidate of a search, without its paths; it was scored on ``share`` of the validation split."""

    generation: int
    parameters: int
    score: float
    share: float = 1.0


@dataclass(frozen=True)
class Search:
    """``search.json``.

    Attributes:
        paths, best: the winner.
        metric: ``"accuracy"`` (0 to 1) or ``"loss"`` (the score is minus the loss); None if the file does not say.
        settings: the settings of the evolution, as from :meth:`glora.SearchSettings.to_dict`.
        hours: the time of all evaluations, over all resumes.
    """

    paths: Paths
    best: Evaluated
    limit: int | None
    metric: str | None
    settings: Mapping[str, Any]
    evaluations: int
    hours: float
    history: tuple[Evaluated, ...]


@dataclass(frozen=True)
class Refit:
    """``refit.json``.

    Attributes:
        is_of_another: whether it began with another winner than that of the run.
        settings: how it was made.
        training: None if it was cut.
    """

    is_of_another: bool
    settings: Mapping[str, Any]
    training: Training | None


@dataclass(frozen=True)
class Merged:
    """``merge.json``; ``largest_error`` is that of a merged layer's output against the formula in fp64."""

    paths: Paths
    parameters: int
    largest_error: float | None


@dataclass(frozen=True)
class Test:
    """``test.json``; accuracies from 0 to 1."""

    accuracy: float
    targets: Mapping[str, float]
    date: str


def read_training(file: Path | None) -> Training | None:
    return None if file is None else Training(Entries.read(file).number("seconds"))


def read_refit(file: Path, winner: str | None) -> Refit:
    """The record of a refit; ``winner`` is that of the run, if it has one."""
    entries = Entries.read(file)
    seconds = entries.optional("seconds", Entries.number)
    training = None if seconds is None else Training(seconds)
    return Refit(winner not in (None, entries.text("winner")), entries.table("settings").content, training)


def read_search(file: Path | None, layers: Layers) -> Search | None:
    """Raises ValueError if the winner's paths do not belong to ``layers`` or do not have its parameters."""
    if file is None:
        return None
    entries = Entries.read(file)
    best = entries.table("best")
    paths, parameters = _read_paths(best, layers)
    return Search(
        paths=paths,
        best=Evaluated(best.count("generation"), parameters, _score(best.optional("score", Entries.number))),
        limit=entries.optional("limit", Entries.count),
        metric=entries.optional("metric", Entries.text),
        settings=entries.table("settings").content,
        evaluations=entries.count("evaluations"),
        hours=entries.number("hours"),
        history=tuple(_evaluated(entries, item) for item in entries.list("history")),
    )


def _evaluated(entries: Entries, item: Any) -> Evaluated:
    """An entry of a history, without what later formats may append."""
    if not isinstance(item, list) or [type(value) for value in item[:2]] != [int, int] or len(item) < 4:
        entries.fail("history", f"lists [generation, parameters, score, share], not {item!r}")
    if type(item[2]) not in (int, float, type(None)) or type(item[3]) not in (int, float):
        entries.fail("history", f"numbers as scores and shares, not {item[2]!r} and {item[3]!r}")
    return Evaluated(item[0], item[1], _score(item[2]), float(item[3]))


def _score(value: float | None) -> float:
    """A score, where JSON has null for one that is not finite."""
    return nan if value is None else float(value)


def read_merged(file: Path | None, layers: Layers) -> Merged | None:
    """Raises ValueError if the paths do not belong to ``layers`` or do not have ``parameters``."""
    if file is None:
        return None
    entries = Entries.read(file)
    paths, parameters = _read_paths(entries, layers)
    return Merged(paths, parameters, entries.optional("largest_error", Entries.number))


def _read_paths(entries: Entries, layers: Layers) -> tuple[Paths, int]:
    """``paths``, and ``parameters`` if these paths read that many in ``layers``."""
    table = entries.table("paths")
    if set(table.content) != set(layers):
        entries.fail("paths", f"one for each of the {len(layers)} layers of run.json")
    try:
        paths = {name: PathConfig.from_dict(table.table(name).content) for name in layers}
    except (TypeError, ValueError) as error:
        raise ValueError(f"{entries.file}: {entries.prefix}paths: {error}") from None
    counted = sum(path.count(layers[name]) for name, path in paths.items())
    if entries.count("parameters") != counted:
        entries.fail("parameters", f"the {counted} that its paths read")
    return paths, counted


def read_test(file: Path | None) -> Test | None:
    """Raises ValueError for any other split: accuracies of two splits may not be averaged."""
    if file is None:
        return None
    entries = Entries.read(file)
    if entries.text("split") != "test":
        entries.fail("split", "'test'")
    targets = entries.table("targets")
    return Test(
        accuracy=entries.share("accuracy"),
        targets={name: targets.table(name).share("accuracy") for name in targets.content},
        date=entries.text("date"),
    )
