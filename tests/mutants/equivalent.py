"""Mutants that cannot change a result, each with the reason; reviewed by hand, printed in every report."""

from __future__ import annotations

from typing import NamedTuple

from .sites import Mutant


class Equivalent(NamedTuple):
    """Mutants of one statement by one operator.

    Attributes:
        statement: its text on one line, of a statement that holds others its head; "" is any of the function.
        replacement: what the mutant puts there; "" is anything.
    """

    file: str
    function: str
    operator: str
    statement: str
    replacement: str
    reason: str

    def covers(self, mutant: Mutant) -> bool:
        return (
            (self.file, self.function, self.operator) == (mutant.file, mutant.function, mutant.operator)
            and self.statement in ("", mutant.statement)
            and self.replacement in ("", mutant.replacement)
        )


EQUIVALENT: tuple[Equivalent, ...] = ()
