"""What the protocols have in common: a table of data sets, and how one of them is opened."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import ClassVar

from .checking import find_missing
from .images import ImageList, ImageSettings, transform_for
from .sources import DataSet, Missing, Source
from .texts import TextList

Samples = ImageList | TextList


@dataclass(frozen=True)
class Target:
    """A data set for tests of a model that was trained on another one.

    Args:
        open: reads its list and gives the images (or texts); so does calling the target.
        classes: the classes among which the model chooses, if they are not all that it was trained on.
    """

    open: Callable[[], Samples]
    classes: tuple[int, ...] | None = None

    def __call__(self) -> Samples:
        return self.open()


@dataclass(frozen=True)
class Splits:
    """An opened data set. The test split and the targets are read only when they are opened.

    Args:
        train: the images (or texts) that a supernet is trained on; candidates are scored on ``validation``.
        validation: the images that the search scores candidates on, without those in ``train``.
        train_and_validation: the images for a last training before the test, augmented as ``train``: in few-shot
            protocols only the shots.
        test: opens the test split.
        targets: opens other data sets to test on, by name.
    """

    train: Samples
    validation: Samples
    train_and_validation: Samples
    test: Callable[[], Samples]
    targets: Mapping[str, Target] = field(default_factory=dict)


@dataclass(frozen=True)
class Layout:
    """Where the splits of one data set lie; a target comes with the classes among which the model chooses.

    ``train_and_validation`` is None where it has no list of its own: it is the two lists, one after the other.
    """

    train: Source
    validation: Source
    train_and_validation: Source | None
    test: Source
    targets: Mapping[str, tuple[Source, tuple[int, ...] | None]] = field(default_factory=dict)

    def sources(self) -> tuple[Source, ...]:
        both = () if self.train_and_validation is None else (self.train_and_validation,)
        return (self.train, self.validation, *both, self.test, *(source for source, _ in self.targets.values()))


class Protocol(ABC):
    """A benchmark: data sets and their splits.

    ``shots`` are the numbers of images per class for which lists exist, or only None if there is no choice. ``seeds``
    are their draws, empty if the data do not depend on a seed. ``images`` are the settings of the original.
    ``trains_last_on`` says in words what :attr:`Splits.train_and_validation` is.
    """

    name: ClassVar[str]
    table: tuple[DataSet, ...]
    shots: ClassVar[tuple[int | None, ...]]
    seeds: ClassVar[tuple[int, ...]]
    images: ClassVar[ImageSettings]
    trains_last_on: ClassVar[str] = "train+val"

    @property
    def datasets(self) -> tuple[str, ...]:
        return tuple(about.name for about in self.table)

    def about(self, dataset: str) -> DataSet:
        """What is known of a data set.

        Raises:
            ValueError: this protocol has no such data set.
        """
        for about in self.table:
            if about.name == dataset:
                return about
        raise ValueError(f"dataset: expected one of {self.datasets}, got {dataset!r}")

    def classes(self, dataset: str) -> int:
        return self.about(dataset).classes

    def group(self, dataset: str) -> str:
        return self.about(dataset).group

    def layout(self, root: str | os.PathLike, dataset: str, shots: int | None, seed: int) -> Layout:
        """Where the splits lie under ``root``; nothing is read.

        Raises:
            ValueError: no such data set, or no list of so many shots or that seed.
        """
        about = self.about(dataset)
        if shots is None and len(self.shots) == 1:
            shots = self.shots[0]
        if shots not in self.shots:
            raise ValueError(f"shots: expected one of {self.shots} for {self.name}, got {shots!r}")
        if self.seeds and seed not in self.seeds:
            raise ValueError(f"seed: expected one of {self.seeds} for {self.name}, got {seed!r}")
        return self._layout(Path(root), about, shots, seed)

    @abstractmethod
    def _layout(self, root: Path, about: DataSet, shots: int | None, seed: int) -> Layout:
        """As :meth:`layout`, for arguments that have been checked."""

    def open(
        self,
        root: str | os.PathLike,
        dataset: str,
        *,
        shots: int | None = None,
        seed: int = 0,
        images: ImageSettings | None = None,
    ) -> Splits:
        """The splits of a data set under ``root``. Training and validation lists are read and checked; no image is.

        Args:
            shots: images per class; None if the protocol has no choice.
            seed: which draw of the shots.
            images: how pictures become tensors; None is as in the original. Only training images are augmented.

        Raises:
            TypeError: ``images`` are no settings.
            FileNotFoundError: a list does not exist.
            ValueError: no such data set, shots or seed, or a list that cannot be used; file and line are named.
        """
        settings = self.images if images is None else images
        if not isinstance(settings, ImageSettings):
            raise TypeError(f"images: expected ImageSettings or None, got {type(images).__name__}")
        layout = self.layout(root, dataset, shots, seed)
        train = self._samples(layout.train, settings, train=True)
        validation, both = _without(self._samples(layout.validation, settings), train), layout.train_and_validation
        return Splits(
            train=train,
            validation=validation,
            train_and_validation=train.of([*train.entries, *validation.entries])
            if both is None
            else self._samples(both, settings, train=True),
            test=lambda: self._samples(layout.test, settings),
            targets={
                name: self._target(source, classes, settings) for name, (source, classes) in layout.targets.items()
            },
        )

    def _samples(self, source: Source, settings: ImageSettings, train: bool = False) -> Samples:
        root, entries = source.read()
        return ImageList(root, entries, transform_for(settings, train), random=train and settings.augment)

    def _target(self, source: Source, classes: tuple[int, ...] | None, settings: ImageSettings) -> Target:
        return Target(lambda: self._samples(source, settings), classes)

    def check(
        self,
        root: str | os.PathLike,
        datasets: Sequence[str] | None = None,
        shots: Sequence[int | None] | None = None,
        seeds: Sequence[int] | None = None,
    ) -> list[Missing]:
        """Every missing list file, and every missing image of a list, for tests too; no image is decoded.

        A data set without a folder is one entry, and so is a list that cannot be used. The missing images of one list
        are one entry, however many they are.

        Args:
            datasets, shots, seeds: what is going to be run; None stands for all.

        Raises:
            ValueError: a data set, number of shots or seed that does not exist.
        """
        choices = product(
            self.datasets if datasets is None else datasets,
            self.shots if shots is None else shots,
            (self.seeds or (0,)) if seeds is None else seeds,
        )
        layouts = [self.layout(root, *choice) for choice in choices]
        return find_missing(source for layout in layouts for source in layout.sources())


def _without(validation: Samples, train: Samples) -> Samples:
    """``validation`` without what is trained on: a score on that would measure memory."""
    trained = {train.root / path for path, _ in train.entries}
    entries = [entry for entry in validation.entries if validation.root / entry[0] not in trained]
    if not entries:
        raise ValueError(
            f"{validation.root}: expected validation {validation.noun} that are not trained on, found none"
        )
    return validation.of(entries)
