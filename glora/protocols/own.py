"""Data of one's own: a folder of images or a CSV file of texts, split once, and the split written down.

A study's split is a folder with one list for each part (``train.txt``, ``validation.txt``, ``test.txt``; see
:mod:`glora.protocols.lists`) and ``data.json``: where the data lie, the names of the classes, and a checksum.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from ..arguments import differences
from ..files import make_folder, write_text_atomically
from .base import Layout, Protocol
from .images import ImageSettings
from .lists import Entry, read_list
from .sources import DataSet, ListSource, Source
from .splitting import SHARES, checked_shares, split_by_class
from .texts import Columns, RowSource, TextList, read_rows, sorted_classes

OWN = OWN_IMAGES, OWN_TEXTS = "own_images", "own_texts"
DESCRIPTION = "data.json"
_FORMAT = 1
_GIVEN = {"train": ("train",), "validation": ("val", "validation"), "test": ("test",)}  # names of folders
_LAYOUT = "one folder for each class, or train/ with val/ (or validation/) and test/, each with such folders"
_SHOWN = 3


@dataclass(frozen=True)
class OwnData:
    """What is known of somebody's data; the content of ``data.json``.

    Args:
        protocol: ``"own_images"`` or ``"own_texts"``.
        source: the folder of images, or the CSV file.
        classes: their names, in the order of their numbers.
        shares: of the parts that were split, in per cent; empty if all were given.
        seed: of the split.
        checksum: of the images' paths and sizes, or of the CSV file.
        columns: those of texts and labels; None for images.
    """

    protocol: str
    source: str
    classes: tuple[str, ...]
    shares: Mapping[str, float]
    seed: int
    checksum: int
    columns: Columns | None = None

    @property
    def name(self) -> str:
        """The name of the folder, or of the file without its ending."""
        return Path(self.source).stem if self.columns else Path(self.source).name

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; the inverse of :func:`own_data_from_dict`."""
        return {"format": _FORMAT, **json.loads(json.dumps(asdict(self)))}


def own_data_from_dict(content: Mapping[str, Any]) -> OwnData:
    """What :meth:`OwnData.to_dict` described. Raises ValueError for another format, KeyError if damaged."""
    if content["format"] != _FORMAT:
        raise ValueError(f"expected format {_FORMAT} of own data, got {content['format']!r}; a newer glora may read it")
    values = {field.name: content[field.name] for field in fields(OwnData)}
    columns = values["columns"]
    return OwnData(
        **{**values, "classes": tuple(values["classes"]), "columns": None if columns is None else (*columns,)}
    )


@dataclass(frozen=True)
class OwnSplit:
    """Data that were found, and the entries of each part; a part that there is not has no list."""

    data: OwnData
    lists: Mapping[str, tuple[Entry, ...]]

    @property
    def sizes(self) -> dict[str, int]:
        """How many entries each part has."""
        return {part: len(self.lists[part]) for part in SHARES if part in self.lists}

    def check(self, folder: Path) -> None:
        """Raise ValueError if ``folder`` holds the split of other data; what has changed is named."""
        if not (folder / DESCRIPTION).is_file():
            return
        written = read_own_data(folder)
        if self.data == written:
            return
        changed = differences(
            replace(written, checksum=0).to_dict(), replace(self.data, checksum=0).to_dict(), ": {} then, {} now"
        )
        raise ValueError(
            f"{folder}: holds the split of other data: {changed or self._changes(folder)}; put them back as they were, "
            "or choose another --out for a new split"
        )

    def _changes(self, folder: Path) -> str:
        files = [folder / f"{part}.txt" for part in SHARES]
        then = {entry for file in files if file.is_file() for entry in read_list(file)}
        now = {entry for entries in self.lists.values() for entry in entries}
        told = [
            f"{len(each)} are {what}: {_some(each)}"
            for what, each in (("gone", then - now), ("new", now - then))
            if each
        ]
        return "; ".join(told) or "the same files with other contents"

    def write(self, folder: Path) -> None:
        """Write lists and description into ``folder``; what is there already stays as it is.

        Raises:
            ValueError: as :meth:`check`.
        """
        self.check(folder)
        if (folder / DESCRIPTION).is_file():
            return
        make_folder("out", folder)
        contents = {
            f"{part}.txt": "".join(f"{path} {label}\n" for path, label in entries)
            for part, entries in self.lists.items()
        }
        contents[DESCRIPTION] = json.dumps(self.data.to_dict(), indent=1)  # last: with it the split is complete
        for name, text in contents.items():
            write_text_atomically(folder / name, text)


def read_own_data(folder: Path) -> OwnData:
    """The description in a split's folder. Raises ValueError if it is damaged."""
    file = folder / DESCRIPTION
    try:
        return own_data_from_dict(json.loads(file.read_text(encoding="utf-8")))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file}: expected the description of a split, got {error!r}") from None


def split_images(
    folder: str | os.PathLike, shares: Sequence[float] = tuple(SHARES.values()), seed: int = 0
) -> OwnSplit:
    """Find the images of a folder, and split them unless they are.

    Args:
        folder: holds one folder for each class; or ``train/`` with ``val/`` (or ``validation/``) and ``test/``, each
            with one folder for each class. Without ``val/`` it is split off ``train/``; without ``test/`` there is no
            test. Hidden folders, and files of other types than images, are passed over.
        shares: per cent for training, validation and test.
        seed: of the split.

    Raises:
        ValueError: no such folder or one that cannot be read; fewer than two classes; a class without enough images.

    Example:
        >>> split = split_images("flowers")
        >>> {part: len(entries) for part, entries in split.lists.items()}
        {'train': 700, 'validation': 150, 'test': 150}
    """
    wanted, root = checked_shares(shares), Path(folder).resolve()
    _require_folder(root, folder)
    given = {part: root / name for part, names in _GIVEN.items() for name in names if _holds_folders(root / name)}
    if "train" not in given:
        given = {}
    others = [name for name in _folders_in(root) if name != "train"]
    if list(given) == ["train"] and others:
        raise ValueError(
            f"images: expected {_LAYOUT}; train/ in {root} holds folders, and beside it are {_some(others)}"
        )
    classes = tuple(_folders_in(given.get("train", root)))
    if len(classes) < 2:
        raise ValueError(
            f"images: expected {_LAYOUT}, with at least two classes, got {len(classes)} in {given.get('train', root)}"
        )
    if not given:
        found = _listed(root, root, classes)
        lists, split = split_by_class(found, classes, wanted, seed, "images"), wanted
    else:
        lists = {part: _listed(root, each, classes) for part, each in given.items()}
        _require_every_class(lists["train"], classes, given["train"])
        split = {}
        if "validation" not in lists:
            split = {part: wanted[part] for part in ("train", "validation")}
            lists = {**lists, **split_by_class(lists["train"], classes, split, seed, "images")}
    files = sorted(path for entries in lists.values() for path, _ in entries)
    known = repr([(path, (root / path).stat().st_size) for path in files])
    data = OwnData(OWN_IMAGES, str(root), classes, split, seed, zlib.crc32(known.encode()))
    return OwnSplit(data, lists)


def split_texts(
    file: str | os.PathLike,
    columns: Columns = ("text", "label"),
    shares: Sequence[float] = tuple(SHARES.values()),
    seed: int = 0,
) -> OwnSplit:
    """Read the texts of a CSV file with a header, and split its rows.

    Args:
        columns: the names of the columns of texts and of labels, which are names or integers.
        shares: per cent for training, validation and test.
        seed: of the split.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: as :func:`glora.protocols.texts.read_rows`; fewer than two classes; a class without enough rows.
    """
    wanted = checked_shares(shares)
    rows = read_rows(file, columns)
    classes = sorted_classes([label for _, label in rows])
    if len(classes) < 2:
        raise ValueError(f"texts: expected at least two classes in the column {columns[1]!r}, got {list(classes)}")
    numbers = {name: number for number, name in enumerate(classes)}
    entries = [(str(row), numbers[label]) for row, (_, label) in enumerate(rows, 1)]
    lists = split_by_class(entries, classes, wanted, seed, "rows")
    checksum = zlib.crc32(Path(file).read_bytes())
    data = OwnData(OWN_TEXTS, str(Path(file).resolve()), classes, wanted, seed, checksum, columns)
    return OwnSplit(data, lists)


class OwnImages(Protocol):
    """Somebody's images as a protocol of one data set, whose root is the folder of a written split."""

    name = OWN_IMAGES
    shots = (None,)
    seeds = ()
    images = ImageSettings()

    def __init__(self, data: OwnData):
        self.data = data
        obtain = (
            "`glora train` writes it with the rest of a split, unless there is no test, as without test/ beside train/."
        )
        self.table = (DataSet(data.name, len(data.classes), "own", data.name, "", obtain),)

    def _layout(self, root: Path, about: DataSet, shots: int | None, seed: int) -> Layout:
        train, validation, test = (self._source(about, root / f"{part}.txt") for part in SHARES)
        return Layout(train, validation, None, test)

    def _source(self, about: DataSet, file: Path) -> Source:
        source = Path(self.data.source)
        return ListSource(about, source, file, (source,), range(about.classes))


class OwnTexts(OwnImages):
    """Somebody's texts, in the same way; ``images`` are not used."""

    name = OWN_TEXTS

    def _source(self, about: DataSet, file: Path) -> Source:
        source, columns = Path(self.data.source), self.data.columns
        assert columns is not None  # those of images are no texts
        return RowSource(about, source.parent, file, (source,), range(about.classes), False, columns, self.data.classes)

    def _samples(self, source: Source, settings: ImageSettings, train: bool = False) -> TextList:  # type: ignore[override]
        assert isinstance(source, RowSource)
        return source.open()


def own_protocol(data: OwnData) -> Protocol:
    """The protocol of somebody's data."""
    return {OWN_IMAGES: OwnImages, OWN_TEXTS: OwnTexts}[data.protocol](data)


def _require_folder(root: Path, given: str | os.PathLike) -> None:
    if not root.is_dir():
        raise ValueError(f"images: expected a folder with {_LAYOUT}; found none at {os.fspath(given)!r}")
    if not os.access(root, os.R_OK | os.X_OK):
        raise ValueError(f"images: expected folders that can be read, {root} cannot")


def _folders_in(folder: Path) -> list[str]:
    """The names of the folders in ``folder`` that are not hidden, sorted."""
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))


def _holds_folders(folder: Path) -> bool:
    if not folder.is_dir():
        return False
    _require_folder(folder, folder)
    return bool(_folders_in(folder))


def _listed(root: Path, folder: Path, classes: Sequence[str]) -> tuple[Entry, ...]:
    """The images in the folders of the classes within ``folder``, by their paths relative to ``root``."""
    from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset

    present = _folders_in(folder)
    unknown = [name for name in present if name not in classes]
    if unknown:
        raise ValueError(f"images: expected folders of the classes of train/ in {folder}, got {_some(unknown)} too")
    for name in present:
        _require_folder(folder / name, folder / name)
    numbers = {name: number for number, name in enumerate(classes) if name in present}
    files = make_dataset(str(folder), numbers, IMG_EXTENSIONS, allow_empty=True)
    entries = tuple((Path(os.path.relpath(file, root)).as_posix(), label) for file, label in files)
    odd = [path for path, _ in entries if path != path.strip() or "\n" in path or not _is_text(path)]
    if odd:
        raise ValueError(f"images: expected names in UTF-8 without spaces at the ends or line breaks, got {_some(odd)}")
    if not entries:
        raise ValueError(f"images: expected images in the folders of the classes in {folder}, found none")
    return entries


def _is_text(path: str) -> bool:
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True


def _require_every_class(entries: Sequence[Entry], classes: Sequence[str], folder: Path) -> None:
    seen = {label for _, label in entries}
    empty = [name for label, name in enumerate(classes) if label not in seen]
    if empty:
        raise ValueError(f"classes: expected images of each in {folder}, found none of {_some(empty)}")


def _some(items: Sequence | set) -> str:
    names = [repr(item[0] if isinstance(item, tuple) else item) for item in sorted(items)]
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
