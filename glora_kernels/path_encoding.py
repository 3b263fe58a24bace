"""Kinds and ranks as a small tensor, so that they are data to a compiled graph and not part of it."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from .terms import SLOTS, Constant, LowRank, Term, Terms, Vector, rank_of

Choices = Mapping[str, tuple[str, int]]  # kind and rank by slot
STORAGES = ("ad", "au", "bd", "bu", "cd", "cu", "d", "e")
PLACES = {"A": (0, 1), "B": (2, 3), "C": (4, 5), "D": (6,), "E": (7,)}
CODES = {"none": 0, "constant": 1, "vector": 2, "lora": 3}
_KINDS = {code: kind for kind, code in CODES.items()}
_NAMES = {Constant: "constant", Vector: "vector", LowRank: "lora"}


def encode(kinds: Choices, since: int | None = None) -> Tensor:
    """``{"A": ("lora", 8), "D": ("vector", 0), ...}`` as a CPU tensor of (kind, rank), A to E; absent is none.

    Args:
        since: the number of the first autograd node that can be made under this configuration, as a sixth row. The
            operator then raises if backward runs it again for an earlier node (``ops/operators.py``).

    Raises:
        ValueError: an unknown tensor or kind.
    """
    if since is None:
        return torch.tensor(_rows(kinds), dtype=torch.int64, device="cpu")
    dated = _undated(tuple(kinds.items()))[:]
    dated[-2] = since
    return torch.frombuffer(dated, dtype=torch.int64).view(-1, 2)


def _rows(kinds: Choices) -> list[tuple[int, int]]:
    unknown = [f"{slot}={kind}" for slot, (kind, _) in kinds.items() if slot not in SLOTS or kind not in CODES]
    if unknown:
        raise ValueError(f"kinds: expected of {SLOTS} one of {tuple(CODES)}, got {', '.join(unknown)}")
    pairs = (kinds.get(slot, ("none", 0)) for slot in SLOTS)
    return [(CODES[kind], rank) for kind, rank in pairs]


@lru_cache(4096)
def _undated(kinds: tuple[tuple[str, tuple[str, int]], ...]) -> array[int]:
    """The six rows with 0 for ``since``, to be copied: a path is set far more often than it is new."""
    return array("q", [number for row in [*_rows(dict(kinds)), (0, 0)] for number in row])


def check_devices(weight: Tensor, storages: Sequence[Tensor | None], config: Tensor) -> None:
    """Raise ValueError for a storage on another device than the weight, or a configuration that is not on the CPU."""
    for name, storage in zip(STORAGES, storages):
        if storage is not None and storage.device != weight.device:
            raise ValueError(f"{name}: expected device {weight.device} (that of weight), got {storage.device}")
    if config.device.type != "cpu":
        raise ValueError(f"config: expected a CPU tensor, got one on {config.device}")


def decode(storages: Sequence[Tensor | None], config: Tensor, product: str) -> Terms:
    """The terms that ``config`` selects from the eight ``storages`` (in the order of ``STORAGES``).

    Raises:
        ValueError: a configuration of another shape or device, an unknown kind, or a storage that is read and absent.
    """
    if tuple(config.shape) not in ((len(SLOTS), 2), (len(SLOTS) + 1, 2)):
        raise ValueError(f"config: expected shape (5, 2) or (6, 2), got {tuple(config.shape)}")
    terms = {}
    for slot, (code, rank) in zip(SLOTS, config.tolist()):
        if code not in _KINDS:
            raise ValueError(f"config: {slot}: expected a kind of 0 to {max(_KINDS)}, got {code}")
        if code:
            terms[slot] = term_of(slot, _KINDS[code], rank, storages)
    return Terms(**terms, product=product)  # type: ignore[arg-type]


def term_of(slot: str, kind: str, rank: int, storages: Sequence[Tensor | None]) -> Term:
    """The term that reads the ``storages`` of ``slot`` as ``kind`` (not none).

    Raises:
        ValueError: a low rank of a slot of one storage, or a storage that is read and absent.
    """
    if kind == "lora" and len(PLACES[slot]) == 1:
        raise ValueError(f"config: {slot}: expected vector, constant or none, got lora")
    places = PLACES[slot] if kind == "lora" else PLACES[slot][:1]
    read = [_present(storages[place], STORAGES[place], f"{slot} as {kind}") for place in places]
    if kind == "lora":
        return LowRank(read[0], read[1], rank)
    return Vector(read[0]) if kind == "vector" else Constant(read[0])


def _present(storage: Tensor | None, name: str, reading: str) -> Tensor:
    if storage is None:
        raise ValueError(f"{name}: expected a tensor, since config reads {reading}; got None")
    return storage


def pack(terms: Terms) -> tuple[list[Tensor | None], Tensor]:
    """The inverse of :func:`decode`: the storages by place, absent where a term is none, and the configuration."""
    storages: list[Tensor | None] = [None] * len(STORAGES)
    kinds = {}
    for slot, term in terms.active:
        kinds[slot] = (_NAMES[type(term)], rank_of(term))
        for place, storage in zip(PLACES[slot], term.storages):
            storages[place] = storage
    return storages, encode(kinds)


def places_of(terms: Terms) -> list[int]:
    """The places of ``terms.storages``."""
    return [place for slot, term in terms.active for place in PLACES[slot][: len(term.storages)]]
