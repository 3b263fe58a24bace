"""A few of many that show all there is to see between them."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from collections.abc import Set as AbstractSet
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .._triton.builds import Build


def traits(build: Build) -> frozenset[Hashable]:
    """What can differ between two builds of a kernel, each by itself.

    The value of each constant, the type of each argument and whether it is a multiple of 16, warps and stages.
    """
    arguments = {name: (kind, name in build.divisible) for name, kind in build.signature.items()}
    found = {**build.constexprs, **arguments, "num_warps": build.num_warps, "num_stages": build.num_stages}
    return frozenset((id(build.kernel), name, str(value)) for name, value in found.items())


def cover(shown: Sequence[AbstractSet[Hashable]]) -> list[int]:
    """The places of a few sets whose union is that of all, in ascending order.

    Greedy: each time the set with most that is new, the first of those that are equal. The same answer in every
    process, since only the order of the sets decides.

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
