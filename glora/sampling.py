"""Random paths within a parameter limit, in bounded time however tight the limit is."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from itertools import accumulate

import torch

from .arguments import require_type
from .config import SLOTS, LayerShape, PathConfig, SearchSpace, count_choice, make_path, path_table

_TRIES = 16


class PathSampler:
    """Draws a path for every layer so that together they read at most ``limit`` parameters.

    Where uniform paths are within the limit on average (or there is no limit), the draw is uniform.
    Otherwise every option of a tensor is drawn with probability proportional to ``exp(-t * count)``,
    with the one ``t`` that brings the expected count to the limit: of all distributions with that
    expected count, the one of greatest entropy. A draw above the limit is repeated a few times and
    then repaired: tensors in random order take a random cheaper option until the limit holds.

    Args:
        layers: shapes by name.
        space: what each tensor may be.
        limit: the largest count allowed, or None.
        training: draw kinds by the space's ``shares``, as a supernet is trained; without a limit alone.

    Raises:
        ValueError: no path of the space is within the limit; the smallest count is named.
    """

    def __init__(
        self, layers: Mapping[str, LayerShape], space: SearchSpace, limit: int | None = None, training: bool = False
    ):
        require_type("layers", layers, Mapping, "a mapping of names to glora.LayerShape")
        require_type("space", space, SearchSpace, "a glora.SearchSpace")
        if limit is not None and type(limit) is not int:
            raise ValueError(f"limit: expected an integer or None, got {limit!r}")
        self.layers, self.space, self.limit = dict(layers), space, limit
        shapes = set(self.layers.values())
        self._options = {shape: tuple(space.options_for(shape.bias).values()) for shape in shapes}
        self._counts = {
            shape: [[count_choice(slot, text, shape) for text in texts] for slot, texts in zip(SLOTS, options)]
            for shape, options in self._options.items()
        }
        self.smallest = sum(min(counts) for shape in self.layers.values() for counts in self._counts[shape])
        if limit is not None and self.smallest > limit:
            raise ValueError(
                f"limit: expected at least {self.smallest:,} parameters (the space's smallest path), got {limit:,}"
            )
        if training and limit is not None:
            raise ValueError(f"limit: expected None for the paths of training, got {limit}")
        temperature = 0.0 if limit is None else self._temperature(limit)
        self._bounds = {
            shape: self._shared(shape) if training and space.shares else self._distributions(shape, temperature)
            for shape in self._counts
        }
        self._paths = {shape: path_table(options) for shape, options in self._options.items()}

    @property
    def mean(self) -> float:
        """The mean count of uniform paths."""
        return self._expected(0.0)

    def _expected(self, temperature: float) -> float:
        per_shape = {
            shape: sum(
                sum(w * c for w, c in zip(_weights(counts, temperature), counts)) for counts in self._counts[shape]
            )
            for shape in self._counts
        }
        return sum(per_shape[shape] for shape in self.layers.values())

    def _temperature(self, limit: int) -> float:
        """The t of the class docstring, by bisection; 0 where uniform paths will do."""
        if self._expected(0.0) <= limit:
            return 0.0
        low, high = 0.0, 1.0
        while self._expected(high) > limit and high < 1e3:
            high *= 2
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if self._expected(middle) > limit else (low, middle)
        return high

    def _distributions(self, shape: LayerShape, temperature: float) -> list[list[float]]:
        """Of each tensor, where the draw of one option ends and that of the next begins."""
        return [list(accumulate(_weights(counts, temperature)))[:-1] for counts in self._counts[shape]]

    def _shared(self, shape: LayerShape) -> list[list[float]]:
        """:meth:`_distributions` by the shares of the space."""
        drawn = [_weights_by_share(texts, self.space.shares) for texts in self._options[shape]]
        return [list(accumulate(weights))[:-1] for weights in drawn]

    def sample(self, generator: torch.Generator) -> dict[str, PathConfig]:
        """Paths for all layers, by name, drawn from ``generator`` alone."""
        paths: dict[str, PathConfig] = {}
        for _ in range(_TRIES):
            draws = torch.rand(len(self.layers), len(SLOTS), generator=generator, dtype=torch.float64).tolist()
            paths = {name: self._drawn(shape, row) for (name, shape), row in zip(self.layers.items(), draws)}
            if self.fits(paths):
                return paths
        return self.repair(paths, generator)

    def sample_layer(self, name: str, generator: torch.Generator) -> PathConfig:
        """A path for one layer, from the same distribution."""
        draws = torch.rand(len(SLOTS), generator=generator, dtype=torch.float64).tolist()
        return self._drawn(self.layers[name], draws)

    def _drawn(self, shape: LayerShape, draws: Sequence[float]) -> PathConfig:
        return self._paths[shape][tuple(map(bisect_right, self._bounds[shape], draws))]

    def count(self, paths: Mapping[str, PathConfig]) -> int:
        return sum(paths[name].count(shape) for name, shape in self.layers.items())

    def fits(self, paths: Mapping[str, PathConfig]) -> bool:
        return self.limit is None or self.count(paths) <= self.limit

    def repair(self, paths: Mapping[str, PathConfig], generator: torch.Generator) -> dict[str, PathConfig]:
        """``paths`` with randomly chosen tensors made cheaper, until they are within the limit."""
        repaired = dict(paths)
        excess = 0 if self.limit is None else self.count(repaired) - self.limit
        places = [(name, index) for name in self.layers for index in range(len(SLOTS))]
        while excess > 0:
            for position in torch.randperm(len(places), generator=generator).tolist():
                name, index = places[position]
                choices = list(repaired[name].to_dict().values())
                shape = self.layers[name]
                counts = dict(zip(self._options[shape][index], self._counts[shape][index]))
                cheaper = [text for text in counts if counts[text] < counts[choices[index]]]
                if excess <= 0 or not cheaper:
                    continue
                text = cheaper[int(torch.randint(len(cheaper), (), generator=generator))]
                excess -= counts[choices[index]] - counts[text]
                choices[index] = text
                repaired[name] = make_path(*choices)
        return repaired


def _weights_by_share(texts: Sequence[str], shares: Mapping[str, float]) -> list[float]:
    """Probabilities of the options of a tensor: a kind that has a share divides it among its ranks.

    The options of the other kinds divide the rest evenly. A tensor without such other options is drawn in proportion.
    """
    kinds = [text.partition("_")[0] for text in texts]
    rest = 1 - sum(share for kind, share in shares.items() if kind in kinds)
    others = sum(kind not in shares for kind in kinds)
    raw = [shares[kind] / kinds.count(kind) if kind in shares else rest / others for kind in kinds]
    return [weight / sum(raw) for weight in raw]


def _weights(counts: list[int], temperature: float) -> list[float]:
    """Probabilities proportional to ``exp(-temperature * count)``."""
    least = min(counts)
    raw = [math.exp(-temperature * (count - least)) for count in counts]
    return [weight / sum(raw) for weight in raw]
