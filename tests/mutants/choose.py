"""Chooses the mutants to run: drawn from all sites, with every operator and every file in turn."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable
from typing import TypeVar

from tests.mutants.equivalent import EQUIVALENT, Equivalent
from tests.mutants.sites import Mutant

M = TypeVar("M")


def drawn(mutants: Iterable[Mutant], seed: int) -> list[Mutant]:
    """All mutants in a drawn order: operators take turns, each with a mutant of the file that has had the fewest.

    The order within an operator and a file depends only on the seed and the mutant, so that an edit of a kernel moves
    only its own mutants.
    """
    shuffled = sorted(mutants, key=lambda m: hashlib.sha1(f"{seed} {m.id}".encode()).digest())
    return in_turns(shuffled, lambda m: m.operator, lambda m: m.file)


def in_turns(mutants: Iterable[M], operator: Callable[[M], str], group: Callable[[M], Hashable]) -> list[M]:
    """Operators take turns, each with its first mutant of the group that has had the fewest."""
    waiting: dict[str, list[M]] = defaultdict(list)
    for mutant in mutants:
        waiting[operator(mutant)].append(mutant)
    taken: Counter[Hashable] = Counter()
    order: list[M] = []
    while waiting:
        for name in sorted(waiting):
            chosen = min(waiting[name], key=lambda mutant: taken[group(mutant)])  # the first of those: min is stable
            waiting[name].remove(chosen)
            taken[group(chosen)] += 1
            order.append(chosen)
        waiting = {name: left for name, left in waiting.items() if left}
    return order


def equivalence(mutant: Mutant) -> Equivalent | None:
    """The entry of the reviewed list that says why the mutant cannot change a result."""
    return next((entry for entry in EQUIVALENT if entry.covers(mutant)), None)
