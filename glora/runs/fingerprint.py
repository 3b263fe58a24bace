"""Tells the weights and lists of samples that a run was trained with from others under the same names."""

from __future__ import annotations

import zlib
from pathlib import Path

from ..backbones import HUB
from ..protocols import Samples, Splits
from .folder import RunFolder
from .spec import RunSpec

_CHUNK = 2**24


def fingerprint(spec: RunSpec, splits: Splits) -> dict[str, int | None]:
    """The CRC-32 of the weights' file or folder (None without one) and of the lists for training and validation."""
    noun = spec.recipe.samples
    return {
        "weights": None if spec.weights in (None, HUB) else _checksum(Path(str(spec.weights))),
        f"training {noun}": list_checksum(splits.train),
        f"validation {noun}": list_checksum(splits.validation),
    }


def require_unchanged(run: RunFolder, splits: Splits) -> None:
    """Raise ValueError unless the weights and lists are those that the run was trained with; images are not read."""
    now = fingerprint(run.spec, splits)
    changed = [name for name, value in now.items() if value != run.fingerprint.get(name)]
    if changed:
        raise ValueError(
            f"{run.path}: expected the {' and '.join(changed)} that it was trained with; they have changed since "
            f"(weights {run.spec.weights}, data {run.spec.data})"
        )


def _checksum(weights: Path) -> int:
    """The checksum of a file, or of the files in a folder, by their names."""
    files = sorted(file for file in weights.iterdir() if file.is_file()) if weights.is_dir() else [weights]
    value = 0
    for file in files:
        value = _continued(value, file)
    return value


def _continued(value: int, file: Path) -> int:
    with open(file, "rb") as stream:
        while chunk := stream.read(_CHUNK):
            value = zlib.crc32(chunk, value)
    return value


def list_checksum(samples: Samples) -> int:
    """The CRC-32 of a list; its images are not read."""
    return zlib.crc32(repr(samples.identity).encode())
