"""Whether this process rehearses, and the fault that it is to show: ``GLORA_REHEARSAL`` says so."""

from __future__ import annotations

import os

VARIABLE = "GLORA_REHEARSAL"
NO_FAULT, WRONG, HANG = "as it should be", "wrong", "hang"


def is_rehearsal() -> bool:
    return VARIABLE in os.environ


def fault() -> str:
    """NO_FAULT; WRONG: results are wrong; HANG: launches never return, and interrupts are not heard."""
    return os.environ.get(VARIABLE, NO_FAULT)
