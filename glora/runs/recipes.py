"""Recipes as data: model, images and training of a protocol, in one TOML file each (``glora/runs/recipes/``)."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar

from glora_kernels import Terms

from ..backbones import pretrained_config
from ..config import SearchSpace
from ..evolution.loop import SearchSettings
from ..protocols import OWN_IMAGES, OWN_TEXTS, ImageSettings, TextSettings, protocol
from ..protocols.images import INTERPOLATIONS
from ..training.recipe import Recipe

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

T = TypeVar("T")
MEAN = "mean"
_OWN = {OWN_IMAGES: "images", OWN_TEXTS: "texts"}  # the table that says how the data are read


@dataclass(frozen=True)
class ModelSettings:
    """The backbone, and which of its modules are adapted.

    Args:
        name: the name of a timm model; for texts a name on Hugging Face's hub, or a folder.
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
        balance: of a supernet, as there; presets have the scales of their methods.
        shares: how often the kinds of a supernet are drawn, as in :class:`glora.SearchSpace`.
        checkpoint_epochs: epochs between checkpoints.
        workers: processes that load images if these are not kept in memory.
        validate: score the model on the validation split after every epoch.
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
    balance: float | None = None
    shares: Mapping[str, float] = field(default_factory=dict)
    checkpoint_epochs: int = 5
    workers: int = 4
    validate: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.lr_of, Mapping):
            raise ValueError(f"lr_of: expected learning rates by data set, got {self.lr_of!r}")
        SearchSpace(shares=self.shares)
        for name, least in (("batch_size", 1), ("checkpoint_epochs", 1), ("workers", 0)):
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise ValueError(f"{name}: expected an integer from {least}, got {value!r}")
        if not isinstance(self.validate, bool):
            raise ValueError(f"validate: expected true or false, got {self.validate!r}")
        for dataset in (None, *self.lr_of):
            self.recipe(dataset, samples=self.batch_size, seed=0)

    def rate(self, dataset: str | None) -> float:
        """The peak learning rate for a data set."""
        return self.lr_of.get(dataset, self.lr) if dataset else self.lr

    def recipe(self, dataset: str | None, samples: int, seed: int) -> Recipe:
        """The recipe in steps, for a training split of ``samples`` samples."""
        steps_an_epoch = max(1, round(samples / self.batch_size))
        return Recipe.for_epochs(
            self.epochs,
            samples,
            self.batch_size,
            warmup_epochs=self.warmup_epochs,
            lr=self.rate(dataset),
            warmup_lr=self.warmup_lr,
            min_lr=self.min_lr,
            weight_decay=self.weight_decay,
            label_smoothing=self.label_smoothing,
            clip_norm=self.clip_norm,
            amp=self.amp,
            balance=self.balance,
            seed=seed,
            checkpoint_every=self.checkpoint_epochs * steps_an_epoch,
        )


@dataclass(frozen=True)
class RefitSettings:
    """How the searched path is trained some steps more; the rest is as :class:`TrainingSettings` has it.

    Args:
        steps: optimiser steps, with a linear warm-up and a cosine decay to 0.
        lr: peak learning rate; None for that of the training, for the data set.
        warmup: the share of the steps that the warm-up takes.
    """

    steps: int = 200
    lr: float | None = None
    warmup: float = 0.1

    def __post_init__(self) -> None:
        Recipe(self.steps, lr=Recipe.lr if self.lr is None else self.lr, warmup=self.warmup)

    def recipe(self, training: TrainingSettings, dataset: str, seed: int) -> Recipe:
        """The recipe in steps, which saves a checkpoint ten times."""
        return replace(
            training.recipe(dataset, training.batch_size, seed),
            steps=self.steps,
            lr=training.rate(dataset) if self.lr is None else self.lr,
            warmup=self.warmup,
            warmup_lr=None,
            min_lr=0.0,
            balance=None,
            checkpoint_every=max(1, self.steps // 10),
        )


@dataclass(frozen=True)
class Size:
    """One trained size of the paper's tables: the ranks of the supernet, and the search's parameter limit (or None).

    The limit ``"mean"`` is the mean number of parameters that a random path of the supernet reads.
    """

    ranks: tuple[int, ...]
    limit: int | str | None = None

    def __post_init__(self) -> None:
        SearchSpace(self.ranks)
        if self.limit not in (None, MEAN) and (type(self.limit) is not int or self.limit < 0):
            raise ValueError(f"limit: expected a number of parameters or {MEAN!r}, got {self.limit!r}")


@dataclass(frozen=True)
class RunRecipe:
    """Everything that a recipe file says.

    Args:
        protocol: a name for :func:`glora.protocols.protocol`, ``"own_images"`` or ``"own_texts"``.
        model, training, search, refit: one table each; and ``images`` or ``texts``, as the protocol has them.
        sizes: the sizes by name, the default first.
        metric: how candidates are ranked on the validation split, by ``"accuracy"`` or ``"loss"``.
        seeds: one run each; in a few-shot protocol also the draw of the training images.
        shots: images per class, one run each; empty if the protocol has no shots.
    """

    protocol: str
    model: ModelSettings
    training: TrainingSettings
    sizes: Mapping[str, Size]
    images: ImageSettings | None = None
    texts: TextSettings | None = None
    search: SearchSettings = field(default_factory=SearchSettings)
    refit: RefitSettings = field(default_factory=RefitSettings)
    metric: str = "accuracy"
    seeds: tuple[int, ...] = (0,)
    shots: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        datasets = () if self.is_own else protocol(self.protocol).datasets
        unknown = [name for name in self.training.lr_of if name not in datasets]
        if unknown:
            raise ValueError(f"training.lr_of: expected data sets out of {list(datasets)}, got {unknown}")
        tables = [name for name in ("images", "texts") if getattr(self, name) is not None]
        if tables != [self.samples]:
            raise ValueError(f"{self.protocol}: expected the table {self.samples!r}, got {tables}")
        if self.is_own and self.shots:
            raise ValueError(f"shots: {self.protocol} has none, got {list(self.shots)}")
        for argument in ("seeds", "shots"):
            values = getattr(self, argument)
            if not isinstance(values, tuple) or any(type(value) is not int or value < 0 for value in values):
                raise ValueError(f"{argument}: expected a list of integers from 0, got {values!r}")
        if self.metric not in ("accuracy", "loss"):
            raise ValueError(f"metric: expected 'accuracy' or 'loss', got {self.metric!r}")
        if not self.sizes:
            raise ValueError("sizes: expected at least one, such as [sizes.small] with ranks, got none")

    @property
    def is_own(self) -> bool:
        """Whether the data are somebody's own, and no protocol's."""
        return self.protocol in _OWN

    @property
    def samples(self) -> str:
        """What the data are: ``"images"`` or ``"texts"``."""
        return _OWN.get(self.protocol, "images")

    def size(self, name: str | None) -> str:
        """The size ``name``, or the default; ValueError if there is no such size."""
        if name is not None and name not in self.sizes:
            raise ValueError(f"size: expected one of {list(self.sizes)}, got {name!r}")
        return name or next(iter(self.sizes))

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; the inverse of :func:`recipe_from_dict`."""
        return _plain(asdict(self))


_TABLES = {
    "model": ModelSettings,
    "images": ImageSettings,
    "texts": TextSettings,
    "training": TrainingSettings,
    "search": SearchSettings,
    "refit": RefitSettings,
}


def known_recipes() -> dict[str, Path]:
    """The protocols' recipes that come with the package, by name."""
    return {name: file for name, file in _shipped().items() if name not in _OWN}


def _shipped() -> dict[str, Path]:
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
    data = _read(file)
    for change in changes:
        _change(data, change)
    try:
        return recipe_from_dict(data)
    except ValueError as error:
        raise ValueError(f"recipe {name}: {error}") from None


def load_own_recipe(
    protocol: str, model: str | None, file: str | os.PathLike | None = None, changes: Sequence[str] = ()
) -> RunRecipe:
    """The recipe for data of one's own.

    Args:
        protocol: ``"own_images"`` or ``"own_texts"``.
        model: the name of the model; None if the file says it.
        file: a TOML file with the entries that differ from those that come with the package. Its sizes stand in place
            of the others.
        changes: as for :func:`load_recipe`; they go before the file.

    Raises:
        ValueError: no such file, or as :func:`load_recipe`; no model; a model that is not timm's, for images.
    """
    data = _read(_shipped()[protocol])
    if file is not None:
        if not Path(file).is_file():
            raise ValueError(f"recipe: expected a TOML file beside --{_OWN[protocol]}, got {os.fspath(file)!r}")
        given = _read(Path(file))
        if "sizes" in given:
            del data["sizes"]
        data = _merged(data, given)
    if model is not None:
        _table_of(data, "model")["name"] = model
    for change in changes:
        _change(data, change)
    if "name" not in _table_of(data, "model"):
        raise ValueError("model: expected the name of a model, got none")
    if data["protocol"] != protocol:
        raise ValueError(f"protocol: expected {protocol!r} beside --{_OWN[protocol]}, got {data['protocol']!r}")
    if protocol == OWN_IMAGES:
        table = data["model"]
        data["images"] = {**_images_of(table["name"], table.get("options", {})), **_table_of(data, "images")}
    return recipe_from_dict(data)


def _images_of(model: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """How a timm model was given its images: its pretrained configuration, at the size that ``options`` say."""
    from timm.data import resolve_data_config

    found = resolve_data_config(pretrained_cfg=pretrained_config(model).to_dict())
    size = options.get("img_size", found["input_size"][-1]) if isinstance(options, Mapping) else None
    known = found["interpolation"] in INTERPOLATIONS
    return {
        "size": size,
        "mean": list(found["mean"]),
        "std": list(found["std"]),
        "interpolation": found["interpolation"] if known else "bicubic",
    }


def _read(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"recipe: {file} is not TOML: {error}") from None


def _merged(data: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """``data`` with the entries of ``changes``, table by table."""
    return {
        **data,
        **{
            name: _merged(data[name], value) if isinstance(value, dict) and isinstance(data.get(name), dict) else value
            for name, value in changes.items()
        },
    }


def _table_of(data: dict[str, Any], name: str) -> dict[str, Any]:
    table = data.setdefault(name, {})
    return table if isinstance(table, dict) else dict(_mapping(table, name))


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
