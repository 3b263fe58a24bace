"""The schedule of a call: the one list that the Triton backend runs, ``explain`` prints and the cost model prices.

A schedule is a pure function of a problem, a strategy and the class of its number of tokens. It says which memory is
allocated, which kernels run on which slots with which arguments, which dense products, and which views of one buffer
the gradients are. ``forward.py`` and ``backward.py`` write it; ``_triton/run.py`` runs it.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch

from . import backward as backward_pass
from . import forward as forward_pass
from .numerics import index_type
from .problem import Problem
from .settings import class_of, forced_now
from .steps import Schedule

Strides = tuple[int, ...]
KEPT = 8  # schedules


class Call(NamedTuple):
    """What a schedule depends on besides the problem; many numbers of tokens share one.

    Attributes:
        strategy: ``"assemble"`` or ``"fused"``.
        tokens: the number that stands for the class of the number of tokens: its tiles are those of all in the class.
        offsets: the type of offsets into matrices.
        x_strides: the strides of x, (M, K).
        dy_strides: the strides of dy, (M, N).
        output: whether backward has the output at hand.
    """

    strategy: str
    tokens: int
    offsets: torch.dtype
    x_strides: Strides
    dy_strides: Strides
    output: bool

    @staticmethod
    def of(
        problem: Problem,
        strategy: str,
        tokens: int,
        x_strides: Strides | None = None,
        dy_strides: Strides | None = None,
        output: bool = False,
    ) -> Call:
        """The call with so many tokens; x and dy are contiguous unless their strides are given."""
        outputs, inputs = problem.outputs, problem.inputs
        x_strides, dy_strides = x_strides or (inputs, 1), dy_strides or (outputs, 1)
        weight, x, dy = ((outputs, inputs), problem.weight_strides), ((tokens, inputs), x_strides), (tokens, outputs)
        offsets = index_type(tokens, weight, x, (dy, dy_strides))
        standing = class_of(problem.architecture, tokens)
        return Call(strategy, standing, offsets, x_strides, dy_strides, output)


def forward(problem: Problem, call: Call) -> Schedule:
    """See :func:`glora_kernels.planning.forward.forward`."""
    return _forward(problem, call, forced_now())


def backward(problem: Problem, call: Call) -> Schedule:
    """See :func:`glora_kernels.planning.backward.backward`."""
    return _backward(problem, call, forced_now())


# The cost model writes a few schedules before one is bound and run: the last ones are kept.
@lru_cache(maxsize=KEPT)
def _forward(problem: Problem, call: Call, _forced: tuple) -> Schedule:
    return forward_pass.forward(problem, call.strategy, call.tokens, call.offsets, call.x_strides)


@lru_cache(maxsize=KEPT)
def _backward(problem: Problem, call: Call, _forced: tuple) -> Schedule:
    strides = call.dy_strides, call.x_strides
    return backward_pass.backward(problem, call.strategy, call.tokens, call.offsets, strides, call.output)
