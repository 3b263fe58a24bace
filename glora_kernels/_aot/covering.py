"""Chooses a few builds that together show every trait of all builds."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from collections.abc import Set as AbstractSet
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .._triton.builds import Build


def traits(build: Build) -> frozenset[Hashable]:
    """What can differ between two builds of a kernel, as separate traits.

    They are the value of each constant, the type of each argument and whether it is a multiple of 16, warps and stages.
    """
    arguments = {name: (kind, name in build.divisible) for name, kind in build.signature.items()}
    found = {**build.constexprs, **arguments, "num_warps": build.num_warps, "num_stages": build.num_stages}
    return frozenset((build.kernel, name, str(value)) for name, value in found.items())


def cover(shown: Sequence[AbstractSet[Hashable]]) -> list[int]:
    """The places of a few sets whose union is the union of all sets, in ascending order.

    Greedy: each time it takes the set with the most new elements, the first one if several have as many. Every process
    gets the same answer, since only the order of the sets decides.

    Example:
        >>> cover([{1}, {1, 2}, {3}, {2}])
        [1, 2]
    """
    missing = set().union(*shown)
    taken: list[int] = []
    gain = [len(found) for found in shown]  # an upper bound: what is new only shrinks
    while missing:
        best, most = -1, 0
        for place, found in enumerate(shown):
            if gain[place] > most:
                gain[place] = len(found & missing)
                if gain[place] > most:
                    best, most = place, gain[place]
        taken.append(best)
        missing -= shown[best]
    return sorted(taken)
