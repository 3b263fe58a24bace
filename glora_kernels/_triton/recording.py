"""The launches of a layer call on real tensors, for what times or compares single kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from ..planning.cases import Case
from ..planning.problem import keeps_output
from ..terms import Terms
from .launch import Launch, recorded
from .plan import plan


def launches_of(case: Case, device: str) -> tuple[list[Launch], list[Launch]]:
    """What forward and backward would launch on the device, on random numbers; nothing is launched but products."""
    problem = case.problem

    def random(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.randn(shape, device=device).to(dtype)

    x = random((case.tokens, problem.inputs), case.dtype)
    weight = random((problem.outputs, problem.inputs), case.dtype)
    bias = None if problem.bias is None else random(problem.bias.shape, case.dtype)
    storages = [random(stored.shape, stored.dtype) for part in problem.parts for stored in part.storages]
    terms = Terms.unflatten(storages, problem.structure)
    planned = plan(weight, bias, terms, problem.wanted, case.wants_x, case.strategy)
    with recorded() as forward:
        y, projected, b_eff = planned.forward(x, weight, bias, storages)
    output = y if case.keeps_output and keeps_output(problem, case.tokens) else None
    with recorded() as backward:
        planned.backward(y, x, weight, bias, storages, output, b_eff, projected, None)
    return forward, backward
