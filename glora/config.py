"""What a layer does with its support tensors, and what a search may choose from: plain frozen data."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from functools import cache, cached_property
from operator import getitem, mul
from typing import Any, NamedTuple

import torch

from glora_kernels.terms import SLOTS

# Of each tensor what its layers hold: the factors of a low rank; a vector or a constant reads the first of them.
STORAGES = {"A": ("Ad", "Au"), "B": ("Bd", "Bu"), "C": ("Cd", "Cu"), "D": ("D",), "E": ("E",)}
KINDS = {
    "A": ("lora", "vector", "constant", "none"),
    "B": ("lora", "vector", "constant", "none"),
    "C": ("lora", "vector", "none"),
    "D": ("vector", "constant", "none"),
    "E": ("vector", "constant", "none"),
}


class Choice(NamedTuple):
    """One support tensor's kind; ``rank`` is 0 unless the kind is ``lora``."""

    kind: str
    rank: int = 0


class LayerShape(NamedTuple):
    """The properties of a layer that parameter counts depend on."""

    out_features: int
    in_features: int
    bias: bool = True
    product: str = "hadamard"


@cache
def parse_choice(slot: str, text: str) -> Choice:
    """Parse ``"lora_8"``, ``"vector"``, ``"constant"`` or ``"none"``, in any case (the official code has ``LoRA_8``).

    Raises:
        ValueError: a kind that ``slot`` does not have, or a rank that is not a positive integer.
    """
    match = re.fullmatch(r"(lora)_([0-9]+)|(vector|constant|none)", text.lower())
    choice = None if match is None else Choice(match[3]) if match[3] else Choice(match[1], int(match[2]))
    if choice is None or choice.kind not in KINDS[slot] or (choice.kind == "lora" and choice.rank < 1):
        allowed = ", ".join("lora_<rank from 1>" if kind == "lora" else kind for kind in KINDS[slot])
        raise ValueError(f"{slot}: expected one of {allowed}; got {text!r}")
    return choice


@dataclass(frozen=True)
class PathConfig:
    """The kind of each support tensor of one layer: one of the 432 paths (for one rank).

    ``y = (W0 + W0 * A + B) x + W0 c + b0 * D + E + b0``; see :class:`glora_kernels.Terms`.

    Args:
        A, B: ``"lora_<rank>"``, ``"vector"``, ``"constant"`` or ``"none"``.
        C: ``"lora_<rank>"``, ``"vector"`` or ``"none"``.
        D, E: ``"vector"``, ``"constant"`` or ``"none"``.

    Raises:
        TypeError: a value that is not a string.
        ValueError: an unknown kind, or one that the tensor does not have.
    """

    A: str = "none"
    B: str = "none"
    C: str = "none"
    D: str = "none"
    E: str = "none"

    def __post_init__(self) -> None:
        for slot in SLOTS:
            text = getattr(self, slot)
            if not isinstance(text, str):
                raise TypeError(f"{slot}: expected a string such as 'lora_8', got {type(text).__name__}")
            kind, rank = parse_choice(slot, text)
            object.__setattr__(self, slot, f"{kind}_{rank}" if kind == "lora" else kind)

    @cached_property
    def choices(self) -> dict[str, Choice]:
        return {slot: parse_choice(slot, getattr(self, slot)) for slot in SLOTS}

    @cached_property
    def read(self) -> tuple[tuple[str, Choice, tuple[str, ...]], ...]:
        """The slots that are not none, their choices and the names of the storages that they read."""
        active = [(slot, choice) for slot, choice in self.choices.items() if choice.kind != "none"]
        return tuple([(slot, c, STORAGES[slot] if c.kind == "lora" else STORAGES[slot][:1]) for slot, c in active])

    @cached_property
    def rank(self) -> int:
        """The largest rank of any tensor; 0 if none is low rank."""
        return max(choice.rank for choice in self.choices.values())

    @property
    def makes_bias(self) -> bool:
        """Whether this path gives a bias to a layer without one: C or E is not none."""
        return self.C != "none" or self.E != "none"

    def without_bias(self) -> PathConfig:
        """This path with C, D and E ``"none"``: under it a layer without bias stays without one."""
        return PathConfig(self.A, self.B)

    def count(self, shape: LayerShape) -> int:
        """The number of parameters that this path reads in a layer of ``shape``; a search's limit counts these."""
        return sum(count_choice(slot, getattr(self, slot), shape) for slot in SLOTS)

    def to_dict(self) -> dict[str, str]:
        return asdict(self)

    @staticmethod
    def from_dict(data: Mapping[str, str]) -> PathConfig:
        """The inverse of :meth:`to_dict`. Raises ValueError for missing or unknown tensors."""
        if set(data) != set(SLOTS):
            raise ValueError(f"path: expected exactly the keys {list(SLOTS)}, got {sorted(data)}")
        return PathConfig(**data)

    def to_json(self) -> str:
        return json.dumps(self.to_dict())

    @staticmethod
    def from_json(text: str) -> PathConfig:
        data = json.loads(text)
        if not isinstance(data, dict):
            raise ValueError(f"path: expected a JSON object, got {type(data).__name__}")
        return PathConfig.from_dict(data)


@cache
def count_choice(slot: str, text: str, shape: LayerShape) -> int:
    """The number of parameters that one support tensor reads; 0 for D of a layer without bias: nothing to scale."""
    kind, rank = parse_choice(slot, text)
    if kind == "none" or (slot == "D" and not shape.bias):
        return 0
    if kind == "constant":
        return 1
    columns = 1 if slot == "C" else shape.in_features
    input_side = slot == "C" or (slot == "A" and shape.product == "matmul")
    rows = shape.in_features if input_side else shape.out_features
    return rank * (rows + columns) if kind == "lora" else rows


@dataclass(frozen=True)
class SearchSpace:
    """The kinds and ranks that each support tensor may take; the default is the paper's.

    Args:
        ranks: the ranks a low-rank tensor may take, each once.
        A, B, C, D, E: the kinds allowed, out of those the tensor has.
        bias_free: in layers without a bias, C, D and E are ``"none"`` whatever is allowed elsewhere. Merging then
            creates no bias: the model's own file format or class may have no place for one (:func:`glora.merge`).
        shares: how often a kind is drawn while a supernet trains, such as ``{"lora": 0.5}``: each tensor that has the
            kind and others is of it in this share of the draws; the rest goes to its other kinds and ranks evenly.
            Empty: every kind and rank alike, the paper. The search does not read it.

    Raises:
        ValueError: no rank, a rank below 1 or given twice, no kind, or one the tensor does not have; shares of unknown
            kinds, or that are not above 0 and together below 1.
        TypeError: ``bias_free`` is not a bool.
    """

    ranks: tuple[int, ...] = (8, 4)
    A: tuple[str, ...] = field(default=KINDS["A"])
    B: tuple[str, ...] = field(default=KINDS["B"])
    C: tuple[str, ...] = field(default=KINDS["C"])
    D: tuple[str, ...] = field(default=KINDS["D"])
    E: tuple[str, ...] = field(default=KINDS["E"])
    bias_free: bool = False
    shares: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.ranks, Iterable):
            raise ValueError(f"ranks: expected distinct integers from 1, got {self.ranks!r}")
        object.__setattr__(self, "ranks", tuple(self.ranks))
        positive = all(type(rank) is int and rank >= 1 for rank in self.ranks)
        if not self.ranks or not positive or len(set(self.ranks)) != len(self.ranks):
            raise ValueError(f"ranks: expected distinct integers from 1, got {self.ranks}")
        for slot in SLOTS:
            kinds = tuple(str(kind).lower() for kind in getattr(self, slot))
            if not kinds or len(set(kinds)) != len(kinds) or not set(kinds) <= set(KINDS[slot]):
                raise ValueError(f"{slot}: expected distinct kinds out of {KINDS[slot]}, got {getattr(self, slot)}")
            object.__setattr__(self, slot, kinds)
        if not isinstance(self.bias_free, bool):
            raise TypeError(f"bias_free: expected True or False, got {self.bias_free!r}")
        object.__setattr__(self, "shares", _checked_shares(self.shares))

    def __hash__(self) -> int:
        return hash((self.ranks, self.A, self.B, self.C, self.D, self.E, self.bias_free, *sorted(self.shares.items())))

    @cached_property
    def options(self) -> dict[str, tuple[str, ...]]:
        """What each tensor of a layer with a bias may be, ``"lora"`` spelled out for every rank."""
        return {slot: tuple(self._spelled_out(getattr(self, slot))) for slot in SLOTS}

    def options_for(self, bias: bool) -> dict[str, tuple[str, ...]]:
        """:attr:`options` of a layer with or without a bias: they differ if the space is ``bias_free``."""
        return self.options if bias or not self.bias_free else {**self.options, **dict.fromkeys("CDE", ("none",))}

    def _spelled_out(self, kinds: tuple[str, ...]) -> list[str]:
        return [text for kind in kinds for text in ([f"lora_{r}" for r in self.ranks] if kind == "lora" else [kind])]

    def count(self, layers: int = 1, bias: bool = True) -> int:
        """How many paths a model of so many layers has: 432 per layer for one rank, 900 for two.

        Args:
            bias: whether the layers have one; without, a ``bias_free`` space has 16 paths per layer for one rank.
        """
        return math.prod(len(options) for options in self.options_for(bias).values()) ** layers

    def sample(self, generator: torch.Generator, bias: bool = True) -> PathConfig:
        """A path for a layer with or without a bias, drawn uniformly."""
        return self.sample_many(1, generator, bias)[0]

    def sample_many(self, layers: int, generator: torch.Generator, bias: bool = True) -> list[PathConfig]:
        """Paths drawn uniformly and independently, one per layer, from one call of the generator."""
        draws = torch.rand(layers, len(SLOTS), generator=generator, dtype=torch.float64).tolist()
        options = tuple(self.options_for(bias).values())
        sizes, known = [len(texts) for texts in options], path_table(options)
        return [known[tuple(map(int, map(mul, sizes, row)))] for row in draws]

    def to_dict(self) -> dict:
        """Plain data for JSON, without ``bias_free`` and ``shares`` where they are as in the paper."""
        kinds: dict[str, Any] = {name: list(getattr(self, name)) for name in ("ranks", *SLOTS)}
        free = {"bias_free": True} if self.bias_free else {}
        return {**kinds, **free, **({"shares": dict(self.shares)} if self.shares else {})}

    @staticmethod
    def from_dict(data: Mapping) -> SearchSpace:
        """The inverse of :meth:`to_dict`."""
        return SearchSpace(**data)


def _checked_shares(shares: Mapping[str, float]) -> dict[str, float]:
    known = ("lora", "vector", "constant", "none")
    numbers = isinstance(shares, Mapping) and all(type(share) in (int, float) for share in shares.values())
    if not numbers or not set(shares) <= set(known):
        raise ValueError(f"shares: expected numbers by kinds out of {known}, got {shares!r}")
    if any(not share > 0 for share in shares.values()) or not sum(shares.values()) < 1:
        raise ValueError(f"shares: expected numbers above 0 and together below 1, got {dict(shares)}")
    return {kind: float(shares[kind]) for kind in known if kind in shares}


@cache
def make_path(a: str, b: str, c: str, d: str, e: str) -> PathConfig:
    """One shared :class:`PathConfig` for each combination: drawing paths builds nothing twice."""
    return PathConfig(a, b, c, d, e)


class PathTable(dict[tuple[int, ...], PathConfig]):
    """The paths of :func:`make_path` by the places of their choices among the ``options`` of each tensor.

    They are made when they are first asked for.
    """

    def __init__(self, options: tuple[tuple[str, ...], ...]):
        self._options = options

    def __missing__(self, places: tuple[int, ...]) -> PathConfig:
        path = self[places] = make_path(*map(getitem, self._options, places))
        return path


path_table = cache(PathTable)
