"""A run's folder: its description, its files, and how results of an earlier search are kept."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..arguments import differences
from ..files import make_folder, write_atomically
from .spec import RunSpec, spec_from_dict

DESCRIPTION = "run.json"
CHECKPOINT, LOG, SUPERNET, TRAINED = "checkpoint.pt", "log.csv", "supernet.safetensors", "train.json"
JOURNAL, SEARCHED, ADAPTER = "search.jsonl", "search.json", "adapter.safetensors"
MERGED, WEIGHTS, PRETRAINED = "merge.json", "merged.safetensors", "merged"
TESTED, FEATURES = "test.json", "features.npz"
REFIT, REFITTED = "refit", "refit.json"  # a folder, with files of the names above; and its description
# in the order of writing: each file was made from files before it
AFTER_TRAINING = (JOURNAL, SEARCHED, ADAPTER, WEIGHTS, PRETRAINED, MERGED, FEATURES, TESTED, REFIT)


class RunFolder:
    """The files of one run.

    Attributes:
        spec: the description of the run.
        fingerprint: that of weights and lists when the run was made (:mod:`glora.runs.fingerprint`).
        is_refit: whether these are the files of a run's refit (:attr:`refit`).

    Raises:
        ValueError: a description that is damaged or of another format.
    """

    is_refit = False

    def __init__(self, path: Path):
        self.path = path
        content = read_json(path / DESCRIPTION)
        try:
            self.spec = _with_split_beside(path, spec_from_dict(content))
            self.fingerprint: Mapping[str, int | None] = content["fingerprint"]
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path / DESCRIPTION}: expected the description of a run, got {error!r}") from None
        except ValueError as error:
            raise ValueError(f"{path / DESCRIPTION}: {error}") from None

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def has(self, name: str) -> bool:
        return (self.path / name).exists()

    def require(self, name: str, command: str) -> Path:
        """The file's path. If it is missing, raises ValueError with the command that makes it."""
        if not self.has(name):
            raise ValueError(f"{self.path}: expected {name}, found none; run `glora {command}` first")
        return self.path / name

    @property
    def refit(self) -> RunFolder:
        """The same run, with the files of its refit, which have the same names in a folder of their own."""
        folder = copy(self)
        folder.path, folder.is_refit = self.path / REFIT, True
        return folder

    @property
    def maker(self) -> str:
        """The command that makes the winner."""
        return "refit" if self.is_refit else "train" if self.spec.preset else "search"

    @property
    def marks(self) -> dict[str, Any]:
        """The entries of each result that tell the run's from those of its refit."""
        return {"run": self.spec.name, **({"refit": True} if self.is_refit else {})}

    @property
    def winner(self) -> str:
        """SHA-256 of the winner's adapter file (paths and numbers). It identifies the winner."""
        return hashlib.sha256((self.path / ADAPTER).read_bytes()).hexdigest()

    def put_aside(self, names: Sequence[str] = AFTER_TRAINING) -> Path | None:
        """Move results, by default all after training, into a folder ``earlier-<n>`` of the run; None if none are."""
        found = [name for name in names if self.has(name)]
        if not found:
            return None
        number = next(n for n in range(1, 10**6) if not (self.path / f"earlier-{n}").exists())
        folder = self.path / f"earlier-{number}"
        folder.mkdir()
        for name in reversed(found):  # if it is killed in between, the rest is still a run
            os.replace(self.path / name, folder / name)
        return folder


def _with_split_beside(path: Path, spec: RunSpec) -> RunSpec:
    """``spec`` with the split of own data where it lies now, if the study was moved."""
    beside = path.resolve().parent / Path(spec.data).name
    return replace(spec, data=str(beside)) if spec.own and beside.is_dir() else spec


def create_run(study: Path, spec: RunSpec, facts: Mapping[str, Any]) -> RunFolder:
    """The folder of ``spec`` within ``study``: made now, or already there from the same run.

    A folder that holds only a description belongs to a run that was refused: it is made again.

    Args:
        facts: further entries of ``run.json``, ``fingerprint`` among them; those of an existing folder are left as
            they are.

    Raises:
        ValueError: the folder is another run's; the entries that differ are named.
    """
    path = study / spec.name
    description = spec.to_dict()
    if (path / DESCRIPTION).is_file() and any(file.name != DESCRIPTION for file in path.iterdir()):
        folder = RunFolder(path)
        differing = differences(folder.spec.to_dict(), description)
        if differing:
            raise ValueError(f"{path}: holds another run: {differing}; choose another folder")
        return folder
    make_folder("study", path)
    write_json(path / DESCRIPTION, {**description, **facts})
    return RunFolder(path)


def find_runs(folder: str | os.PathLike) -> list[RunFolder]:
    """The run in ``folder``, or every run in its folders, by their names.

    Raises:
        ValueError: no run there.
    """
    path = Path(folder)
    if (path / DESCRIPTION).is_file():
        return [RunFolder(path)]
    inner: Iterable[Path] = sorted(path.iterdir()) if path.is_dir() else ()
    runs = [RunFolder(each) for each in inner if (each / DESCRIPTION).is_file()]
    if not runs:
        raise ValueError(f"folder: expected a run, or a folder of runs, as `glora train` writes it, got {path}")
    return runs


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in a file; raises ValueError for anything else."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: expected JSON, it is damaged or something else ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file}: expected a JSON object, got {type(content).__name__}")
    return content


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    encoded = json.dumps(content, indent=1).encode()
    write_atomically(file, lambda stream: stream.write(encoded))
