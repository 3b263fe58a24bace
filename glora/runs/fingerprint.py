"""Tells the weights and image lists that a run was trained with from others under the same names."""

from __future__ import annotations

import zlib
from pathlib import Path

from ..backbones import HUB
from ..protocols import ImageList, Splits
from .folder import RunFolder
from .spec import RunSpec

_CHUNK = 2**24


def fingerprint(spec: RunSpec, splits: Splits) -> dict[str, int | None]:
    """The CRC-32 of the weights' file (None without one) and of the lists of training and validation images."""
    return {
        "weights": None if spec.weights in (None, HUB) else _file_checksum(Path(str(spec.weights))),
        "training images": _list_checksum(splits.train),
        "validation images": _list_checksum(splits.validation),
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


def _file_checksum(file: Path) -> int:
    value = 0
    with open(file, "rb") as stream:
        while chunk := stream.read(_CHUNK):
            value = zlib.crc32(chunk, value)
    return value


def _list_checksum(images: ImageList) -> int:
    return zlib.crc32(repr(list(images.entries)).encode())
