"""Recipes as data: model, images and training of a protocol, in one TOML file each (``glora/runs/recipes/``)."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar

from glora_kernels import Terms

from ..config import SearchSpace
from ..evolution.loop import SearchSettings
from ..protocols import ImageSettings, protocol
from ..training.recipe import Recipe

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

T = TypeVar("T")


@dataclass(frozen=True)
class ModelSettings:
    """The backbone, and which of its modules are adapted.

    Args:
        name: the name of a timm model.
        drop_path: stochastic depth while training.
        product: the product of A with W0, ``"hadamard"`` or ``"matmul"``.
        exclude: modules that are not adapted, by whole name components. timm's classifier is not adapted either: it
            is trained itself.
        bias_free: no path gives a bias to a layer that has none (:class:`glora.SearchSpace`), so that a model from
            ``timm.create_model`` takes the merged weights.
        options: further arguments of ``timm.create_model``.
    """

    name: str
    drop_path: float = 0.0
    product: str = "hadamard"
    exclude: tuple[str, ...] = ()
    bias_free: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        Terms(product=self.product)
        if not isinstance(self.exclude, tuple) or not all(isinstance(name, str) for name in self.exclude):
            raise ValueError(f"exclude: expected a list of module names, got {self.exclude!r}")
        if not isinstance(self.bias_free, bool):
            raise ValueError(f"bias_free: expected true or false, got {self.bias_free!r}")


@dataclass(frozen=True)
class TrainingSettings:
    """AdamW with a linear warm-up and a cosine decay, in epochs.

    Args:
        epochs, warmup_epochs: passes over the training split.
        batch_size: samples per step.
        lr, warmup_lr, min_lr: peak, first and last learning rate.
        lr_of: the peak for single data sets, by name.
        weight_decay, label_smoothing, clip_norm, amp: as in :class:`glora.Recipe`.
        checkpoint_epochs: epochs between checkpoints.
        workers: processes that load images if these are not kept in memory.
    """

    epochs: int
    batch_size: int
    lr: float
    lr_of: Mapping[str, float] = field(default_factory=dict)
    weight_decay: float = 1e-4
    warmup_epochs: float = 0
    warmup_lr: float | None = None
    min_lr: float = 0.0
    label_smoothing: float = 0.0
    clip_norm: float | None = None
    amp: str | None = None
    checkpoint_epochs: int = 5
    workers: int = 4

    def __post_init__(self) -> None:
        if not isinstance(self.lr_of, Mapping):
            raise ValueError(f"lr_of: expected learning rates by data set, got {self.lr_of!r}")
        for name, least in (("batch_size", 1), ("checkpoint_epochs", 1), ("workers", 0)):
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise ValueError(f"{name}: expected an integer from {least}, got {value!r}")
        for dataset in (None, *self.lr_of):
            self.recipe(dataset, samples=self.batch_size, seed=0)

    def recipe(self, dataset: str | None, samples: int, seed: int) -> Recipe:
        """The recipe in steps, for a training split of ``samples`` images."""
        steps_an_epoch = max(1, round(samples / self.batch_size))
        return Recipe.for_epochs(
            self.epochs,
            samples,
            self.batch_size,
            warmup_epochs=self.warmup_epochs,
            lr=self.lr_of.get(dataset, self.lr) if dataset else self.lr,
            warmup_lr=self.warmup_lr,
            min_lr=self.min_lr,
            weight_decay=self.weight_decay,
            label_smoothing=self.label_smoothing,
            clip_norm=self.clip_norm,
            amp=self.amp,
            seed=seed,
            checkpoint_every=self.checkpoint_epochs * steps_an_epoch,
        )


@dataclass(frozen=True)
class Size:
    """One trained size of the paper's tables: the ranks of the supernet, and the search's parameter limit (or None)."""

    ranks: tuple[int, ...]
    limit: int | None = None

    def __post_init__(self) -> None:
        SearchSpace(self.ranks)
        if self.limit is not None and (type(self.limit) is not int or self.limit < 0):
            raise ValueError(f"limit: expected a number of parameters, got {self.limit!r}")


@dataclass(frozen=True)
class RunRecipe:
    """Everything that a recipe file says.

    Args:
        protocol: a name for :func:`glora.protocols.protocol`.
        model, images, training, search: one table each.
        sizes: the sizes by name, the default first.
        metric: how candidates are ranked on the validation split, by ``"accuracy"`` or ``"loss"``.
        seeds: one run each; in a few-shot protocol also the draw of the training images.
        shots: images per class, one run each; empty if the protocol has no shots.
    """

    protocol: str
    model: ModelSettings
    images: ImageSettings
    training: TrainingSettings
    sizes: Mapping[str, Size]
    search: SearchSettings = field(default_factory=SearchSettings)
    metric: str = "accuracy"
    seeds: tuple[int, ...] = (0,)
    shots: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        datasets = protocol(self.protocol).datasets
        unknown = [name for name in self.training.lr_of if name not in datasets]
        if unknown:
            raise ValueError(f"training.lr_of: expected data sets out of {list(datasets)}, got {unknown}")
        for argument in ("seeds", "shots"):
            values = getattr(self, argument)
            if not isinstance(values, tuple) or any(type(value) is not int or value < 0 for value in values):
                raise ValueError(f"{argument}: expected a list of integers from 0, got {values!r}")
        if self.metric not in ("accuracy", "loss"):
            raise ValueError(f"metric: expected 'accuracy' or 'loss', got {self.metric!r}")
        if not self.sizes:
            raise ValueError("sizes: expected at least one, such as [sizes.small] with ranks, got none")

    def size(self, name: str | None) -> str:
        """The size ``name``, or the default; ValueError if there is no such size."""
        if name is not None and name not in self.sizes:
            raise ValueError(f"size: expected one of {list(self.sizes)}, got {name!r}")
        return name or next(iter(self.sizes))

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; the inverse of :func:`recipe_from_dict`."""
        return _plain(asdict(self))


_TABLES = {"model": ModelSettings, "images": ImageSettings, "training": TrainingSettings, "search": SearchSettings}


def known_recipes() -> dict[str, Path]:
    """The recipes that come with the package, by name."""
    folder = Path(str(files(__package__) / "recipes"))
    return {file.stem: file for file in sorted(folder.glob("*.toml"))}


def load_recipe(name: str, changes: Sequence[str] = ()) -> RunRecipe:
    """The recipe of this name, or in this TOML file.

    Args:
        changes: such as ``"training.epochs=10"``, in order; the right side is TOML, or else plain text.

    Raises:
        ValueError: no such recipe; a file that is not TOML; a key that is unknown or missing, or a value out of range.
    """
    known = known_recipes()
    file = known.get(name, Path(name))
    if not file.is_file():
        raise ValueError(f"recipe: expected one of {list(known)} or a TOML file, got {name!r}")
    try:
        data = tomllib.loads(file.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"recipe: {file} is not TOML: {error}") from None
    for change in changes:
        _change(data, change)
    try:
        return recipe_from_dict(data)
    except ValueError as error:
        raise ValueError(f"recipe {name}: {error}") from None


def change_recipe(recipe: RunRecipe, changes: Sequence[str], only: Sequence[str]) -> RunRecipe:
    """``recipe`` with ``changes`` as for :func:`load_recipe`, of entries within ``only``.

    Raises:
        ValueError: a change of another entry, or as :func:`load_recipe`.
    """
    data = recipe.to_dict()
    for change in changes:
        _change(data, change)
    changed = recipe_from_dict(data)
    before = recipe.to_dict()
    others = [name for name, value in changed.to_dict().items() if name not in only and value != before.get(name)]
    if others:
        raise ValueError(f"set: expected changes of {' or '.join(only)} alone, got one of {others}")
    return changed


def recipe_from_dict(data: Mapping[str, Any]) -> RunRecipe:
    """A recipe from nested plain data. Raises ValueError, naming the table and the key."""
    tables: dict[str, Any] = {name: _build(kind, data[name], name) for name, kind in _TABLES.items() if name in data}
    sizes = _mapping(data.get("sizes", {}), "sizes")
    tables["sizes"] = {name: _build(Size, table, f"sizes.{name}") for name, table in sizes.items()}
    return _build(RunRecipe, {**data, **tables}, "the file")


def _build(kind: type[T], table: Any, where: str) -> T:
    """Make a ``kind`` from a table of its fields; lists become tuples."""
    values = {name: tuple(v) if isinstance(v, list) else v for name, v in _mapping(table, where).items()}
    unknown = sorted(set(values) - {f.name for f in fields(kind)})  # type: ignore[arg-type]
    missing = [
        f.name
        for f in fields(kind)  # type: ignore[arg-type]
        if f.name not in values and f.default is MISSING and f.default_factory is MISSING
    ]
    if unknown or missing:
        raise ValueError(f"{where}: missing {missing}, unknown {unknown}")
    try:
        return kind(**values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from None


def _mapping(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(f"{where}: expected a table, got {value!r}")
    return value


def _change(data: dict[str, Any], change: str) -> None:
    key, equals, text = change.partition("=")
    parts = re.findall(r'"([^"]+)"|([^."\s]+)', key)
    if not equals or not parts:
        raise ValueError(f"set: expected KEY=VALUE such as training.epochs=10, got {change!r}")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()
    *tables, last = (quoted or bare for quoted, bare in parts)
    for name in tables:
        data = data.setdefault(name, {})
        if not isinstance(data, dict):
            raise ValueError(f"set: expected a table at {name!r} of {key.strip()!r}, got {data!r}")
    data[last] = value


def _plain(value: Any) -> Any:
    """Plain data: tuples as lists, as in JSON; entries that are None are left out, as in TOML."""
    if isinstance(value, Mapping):
        return {name: _plain(inner) for name, inner in value.items() if inner is not None}
    return [_plain(inner) for inner in value] if isinstance(value, (list, tuple)) else value
