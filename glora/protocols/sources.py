"""One split on disk: a list file with its images, or one folder per class; and what of it is missing."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

from .lists import Entry, read_list

SHOWN = 3


@dataclass(frozen=True)
class DataSet:
    """What is known of a data set.

    Args:
        name: the name of its folder.
        classes: how many classes it has.
        group: the group in whose average it is.
        title: its name in tables.
        page: the web page of the data.
        obtain: sentences that say how to get the content of its folder; ``{home}`` stands for that folder, ``{root}``
            for its parent.
    """

    name: str
    classes: int
    group: str
    title: str
    page: str
    obtain: str


class Missing(NamedTuple):
    """Something that a run needs and that is missing or cannot be used: its data set, its place, and the remedy."""

    dataset: str
    file: Path
    what_to_do: str
    problem: str = "not there"


class Folders:
    """The names in folders; each folder is listed once, however many files are looked up."""

    def __init__(self) -> None:
        self._names = cache(lambda folder: frozenset(os.listdir(folder)) if os.path.isdir(folder) else frozenset())

    def hold(self, path: str) -> bool:
        folder, name = os.path.split(path)
        return name in self._names(folder)


class Found(NamedTuple):
    """Images by their paths relative to ``root``, with their classes."""

    root: Path
    entries: tuple[Entry, ...]


class Source(ABC):
    """One split of the data set ``about``, whose folder is ``home``."""

    about: DataSet
    home: Path

    @abstractmethod
    def exists(self) -> bool:
        """Whether any part of it exists."""

    @abstractmethod
    def read(self) -> Found:
        """Its images; none is opened.

        Raises:
            FileNotFoundError: it does not exist.
            ValueError: it cannot be used as it is.
        """

    @abstractmethod
    def missing(self, folders: Folders) -> Iterator[Missing]:
        """Everything on which :meth:`read`, or reading the images after it, would fail."""

    def lacks(self, file: Path, problem: str = "not there") -> Missing:
        return Missing(self.about.name, file, self.remedy, problem)

    @property
    def remedy(self) -> str:
        """How to get the content of the data set's folder."""
        return self.about.obtain.format(home=self.home, root=self.home.parent)


@dataclass(frozen=True)
class ListSource(Source):
    """A list file; its paths are relative to the first of ``folders`` that exists.

    ``classes`` are those that it may name; ``repeats`` says whether a line may come twice.
    """

    about: DataSet
    home: Path
    file: Path
    folders: tuple[Path, ...]
    classes: Collection[int]
    repeats: bool = False

    @property
    def folder(self) -> Path:
        return first_folder(self.folders)

    def exists(self) -> bool:
        return self.file.is_file()

    def read(self) -> Found:
        if not self.exists():
            raise FileNotFoundError(f"{self.file}: not there. {self.remedy}")
        return Found(self.folder, read_list(self.file, self.classes, repeats=self.repeats))

    def missing(self, folders: Folders) -> Iterator[Missing]:
        if not self.exists():
            yield self.lacks(self.file)
            return
        try:
            root, entries = self.read()
        except ValueError as error:
            yield self.lacks(self.file, str(error).removeprefix(str(self.file)).lstrip(",: "))
            return
        paths = list(dict.fromkeys(path for path, _ in entries))
        absent = [path for path in paths if not folders.hold(os.path.join(root, path))]
        if absent:
            problem = f"{len(absent):,} of the {len(paths):,} images of {self.file.name} are not there: {_some(absent)}"
            yield self.lacks(root, problem)


@dataclass(frozen=True)
class TreeSource(Source):
    """One folder per class: ``class_folders`` has the name of each folder with its class."""

    about: DataSet
    home: Path
    folders: tuple[Path, ...]
    class_folders: tuple[tuple[str, int], ...]

    @property
    def folder(self) -> Path:
        return first_folder(self.folders)

    def exists(self) -> bool:
        return bool(self._present())

    def read(self) -> Found:
        from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset

        present = self._present()
        if not present:
            raise FileNotFoundError(
                f"{self.folder}: expected folders such as {self.class_folders[0][0]!r}. {self.remedy}"
            )
        files = make_dataset(self.folder, present, IMG_EXTENSIONS, allow_empty=True)
        if not files:
            raise ValueError(f"{self.folder}: expected images in the folders of the classes, found none")
        return Found(self.folder, tuple((os.path.relpath(file, self.folder), label) for file, label in files))

    def missing(self, folders: Folders) -> Iterator[Missing]:
        folder, names = self.folder, [name for name, _ in self.class_folders]
        absent = [name for name in names if not _has_files(folder / name)]
        if absent:
            problem = (
                f"{len(absent):,} of the {len(names):,} folders of classes are not there or empty: {_some(absent)}"
            )
            yield self.lacks(folder, problem)

    def _present(self) -> dict[str, int]:
        folder = self.folder
        return {name: label for name, label in self.class_folders if (folder / name).is_dir()}


@dataclass(frozen=True)
class Either(Source):
    """``first`` if it exists, otherwise ``second``: releases come as lists, as folders of classes, or as both."""

    about: DataSet
    home: Path
    first: Source
    second: Source

    @property
    def chosen(self) -> Source:
        return self.first if self.first.exists() else self.second

    def exists(self) -> bool:
        return self.chosen.exists()

    def read(self) -> Found:
        return self.chosen.read()

    def missing(self, folders: Folders) -> Iterator[Missing]:
        return self.chosen.missing(folders)


def first_folder(folders: tuple[Path, ...]) -> Path:
    """The first folder that exists; the first of all if none exists."""
    return next((folder for folder in folders if folder.is_dir()), folders[0])


def _has_files(folder: Path) -> bool:
    return folder.is_dir() and any(folder.iterdir())


def _some(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")
