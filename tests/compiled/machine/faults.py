"""What can be wrong with compiled code: a fault ends the execution, a hazard is noted and the execution goes on."""

from __future__ import annotations

from collections import Counter


class Fault(Exception):  # noqa: N818  (GPUs call it so)
    """What the hardware would not do either, or what PTX leaves undefined: an access out of bounds, for one."""


class UnknownInstructionError(Fault):
    """An instruction, or a form of one, that this machine has no rule for. It is never skipped."""


class Hazards(Counter[str]):
    """Accesses that nothing orders, and waits that are missing: what was seen, and how often.

    The result may still be right here, since this machine executes in one order. On a GPU it depends on luck.
    """

    def note(self, what: str, instruction: str) -> None:
        self[f"{what}: {instruction}"] += 1
