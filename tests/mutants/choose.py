"""Chooses the mutants to run: drawn from all sites, with every operator and every file in turn."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable

from tests.mutants.equivalent import EQUIVALENT, Equivalent
from tests.mutants.sites import Mutant


def drawn(mutants: Iterable[Mutant], seed: int) -> list[Mutant]:
    """All mutants in a drawn order: operators take turns, each with a mutant of the file that has had the fewest.

    The order within an operator and a file depends only on the seed and the mutant, so that an edit of a kernel moves
    only its own mutants.
    """
    waiting: dict[str, list[Mutant]] = defaultdict(list)
    for mutant in sorted(mutants, key=lambda m: hashlib.sha1(f"{seed} {m.id}".encode()).digest()):
        waiting[mutant.operator].append(mutant)
    taken: Counter[str] = Counter()
    order: list[Mutant] = []
    while waiting:
        for operator in sorted(waiting):
            chosen = min(waiting[operator], key=lambda m: taken[m.file])  # the first of those: min is stable
            waiting[operator].remove(chosen)
            taken[chosen.file] += 1
            order.append(chosen)
        waiting = {operator: left for operator, left in waiting.items() if left}
    return order


def equivalence(mutant: Mutant) -> Equivalent | None:
    """The entry of the reviewed list that says why the mutant cannot change a result."""
    return next((entry for entry in EQUIVALENT if entry.covers(mutant)), None)
