"""What each strategy of the Triton backend would take: a pure function of shapes, kinds, types and architecture."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from .terms import Terms


class Problem(NamedTuple):
    """One layer call."""

    tokens: int
    outputs: int
    inputs: int

    @staticmethod
    def of(tokens: int, weight: Tensor, terms: Terms, architecture: str) -> Problem:
        return Problem(tokens, *weight.shape)


def strategy_for(problem: Problem) -> str:
    return "fused" if problem.tokens <= 256 else "assemble"
