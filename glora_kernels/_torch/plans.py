"""The plan of a layer call."""

from __future__ import annotations

from torch import Tensor

from .. import _torch
from ..backend import Plan, PlanOfPasses
from ..gradient_routes import reads_token_sums
from ..terms import Terms


def plan(weight: Tensor, bias: Tensor | None, terms: Terms, wanted: frozenset[str], wants_x: bool) -> Plan:
    """The plan of calls with these operands. For a vector or constant B, nothing but token sums is read of x."""
    made = PlanOfPasses(_torch, terms, wanted, wants_x)
    made.reads_token_sums = reads_token_sums(terms, wanted)
    return made
