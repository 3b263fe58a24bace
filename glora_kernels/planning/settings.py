"""Tile settings as data: ``settings.json`` fixes them by architecture, kernel, element size, tokens and rank.

Nothing is timed at import or at run time. ``python -m glora_kernels.tune`` measures and writes the file, which is
then committed.
"""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from .machines import nearest

FILE = Path(__file__).with_name("settings.json")
VERSION = 1
KERNELS = ("assemble", "weight_pass", "fused", "token_pass", "contract", "gemm_contract")
INTERPRETER = "interpreter"


@dataclass(frozen=True)
class Tile:
    """How a kernel cuts its work.

    Attributes:
        tokens, rows, columns: the block sizes along M, N (``fused``: OUT) and K (RED); 0 where there is none.
        warps, stages: warps per program, stages of the software pipeline.
        swap: whether the product is formed transposed (``fused`` only).
    """

    tokens: int
    rows: int
    columns: int
    warps: int
    stages: int
    swap: bool = False

    def __str__(self) -> str:
        blocks = f"{self.tokens}x{self.rows}x{self.columns}"
        return f"{blocks} w{self.warps} s{self.stages}{' swap' if self.swap else ''}"


@dataclass(frozen=True)
class Rule:
    """A tile and the calls that it is meant for; the first rule that fits a call is used.

    Attributes:
        elements: the sizes of an element of x that it is meant for, in bytes.
        max_tokens, max_rank: the largest values that it is meant for; None for any.
    """

    tile: Tile
    elements: tuple[int, ...]
    max_tokens: int | None
    max_rank: int | None

    def fits(self, element: int, tokens: int, rank: int) -> bool:
        return (
            element in self.elements
            and (self.max_tokens is None or tokens <= self.max_tokens)
            and (self.max_rank is None or rank <= self.max_rank)
        )


Table = dict[str, tuple[Rule, ...]]

forced: dict[str, Tile] = {}  # another object whenever other tiles are in force


def tile_for(kernel: str, architecture: str, element: int, tokens: int, rank: int) -> Tile:
    """The tile of ``kernel`` for elements of ``element`` bytes, ``tokens`` tokens and a padded rank of ``rank``.

    Raises:
        LookupError: the file has no rule for it.
    """
    if kernel in forced:
        return forced[kernel]
    for rule in rules(architecture)[kernel]:
        if rule.fits(element, tokens, rank):
            return rule.tile
    raise LookupError(
        f"{FILE.name}: no {kernel} tile for {architecture}, {element} bytes, {tokens} tokens, rank {rank}"
    )


@contextmanager
def forced_tiles(tiles: dict[str, Tile]) -> Iterator[None]:
    """Use these tiles inside the ``with`` block, whatever the file says (for tests and the tuner).

    They hold for the whole process, since autograd runs backward passes on a GPU in its own thread.
    """
    global forced
    before, forced = forced, {**forced, **tiles}
    try:
        yield
    finally:
        forced = before


def forced_now() -> tuple[tuple[str, Tile], ...]:
    """The tiles that are forced now, as a key."""
    return tuple(forced.items())


def class_of(architecture: str, tokens: int) -> int:
    """The largest number of tokens with the same tiles as ``tokens``, or one more than any limit."""
    found = classes(architecture)
    return found[min(bisect_left(found, tokens), len(found) - 1)]


@lru_cache
def classes(architecture: str) -> list[int]:
    """One number of tokens for each set of tiles: every limit that some rule has, and one above them all."""
    found = {rule.max_tokens for table in rules(architecture).values() for rule in table}
    limits = sorted(limit for limit in found if limit is not None)
    return [*limits, limits[-1] + 1] if limits else [1]


@lru_cache
def rules(architecture: str) -> Table:
    """The rules, by kernel, of an architecture or of the nearest older one of its family."""
    tables = load()
    name = nearest(architecture, tuple(tables))
    if name is None:
        raise LookupError(f"{FILE.name}: no settings for {architecture}; known: {sorted(tables)}")
    return tables[name]


@lru_cache
def load(path: Path = FILE) -> dict[str, Table]:
    """The rules of every architecture; an entry that only names another architecture has the rules of that one.

    Raises:
        ValueError: a file of another version, or without rules for a kernel.
    """
    content = json.loads(path.read_text())
    if content.get("version") != VERSION:
        raise ValueError(f"{path}: expected version {VERSION}, got {content.get('version')!r}")
    entries = content["architectures"]
    shared = {name: entries[entry] if isinstance(entry, str) else entry for name, entry in entries.items()}
    return {name: _table(path, name, entry) for name, entry in shared.items()}


def _table(path: Path, name: str, entry: dict[str, Any]) -> Table:
    if set(entry) != set(KERNELS):
        raise ValueError(f"{path}: {name}: expected rules for {KERNELS}, got {tuple(entry)}")
    return {kernel: tuple(rule_of(rule) for rule in entry[kernel]) for kernel in KERNELS}


def rule_of(entry: dict[str, Any]) -> Rule:
    """A rule from its entry in the file."""
    tokens, rows, columns = entry["block"]
    tile = Tile(tokens, rows, columns, entry["warps"], entry["stages"], entry.get("swap", False))
    return Rule(tile, tuple(entry["elements"]), entry.get("max_tokens"), entry.get("max_rank"))
