"""Nothing is timed before it is shown to compute what it should."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Protocol

from torch import Tensor, nn

from glora_kernels import use_backend

Results = dict[str, Tensor]


class Task(Protocol):
    """One forward and backward pass: what is timed, and what is checked."""

    def step(self, model: nn.Module) -> Tensor:
        """Reset every gradient to None, run both passes, return the output."""

    def input_gradients(self) -> Results:
        """The gradients that a step leaves on the task's own tensors."""

    def double(self) -> Task:
        """The same task in fp64."""


def results(task: Task, model: nn.Module) -> Results:
    """The output and every gradient of one step."""
    output = task.step(model).detach()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"output": output, **task.input_gradients(), **gradients}


def reference_results(task: Task, model: nn.Module) -> Results:
    """As :func:`results`, in fp64 and, where ``model`` has GLoRA, by the reference formula."""
    with use_backend("reference"):
        return results(task.double(), copy.deepcopy(model).double())


def require_agreement(
    who: str, got: Results, want: Results, tolerance: float, names: Mapping[str, str] | None = None
) -> float:
    """Hold ``|got - want| <= tolerance |want|``, in the 2-norm, for every tensor.

    Args:
        who: whose results these are, for the message.
        got, want: tensors by name; none of ``want`` may be zero throughout, or a sum that cancels to it.
        tolerance: the largest relative error allowed.
        names: what a tensor of ``want`` is called in ``got``, where that differs.

    Returns:
        The largest relative error.

    Raises:
        ValueError: a tensor is missing, superfluous or too far off.
    """
    renamed = {(names or {}).get(name, name): tensor for name, tensor in want.items()}
    if set(got) != set(renamed):
        raise ValueError(f"{who}: not timed, expected results {sorted(renamed)}, got {sorted(got)}")
    errors = {name: float((got[name] - tensor).norm() / tensor.norm()) for name, tensor in renamed.items()}
    wrong = {name: error for name, error in errors.items() if not error <= tolerance}
    if wrong:
        raise ValueError(f"{who}: not timed, expected relative errors up to {tolerance:g}, got {wrong}")
    return max(errors.values())
