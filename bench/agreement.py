"""Nothing is timed before it is shown to compute what it should."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor, nn

from .oracle import oracle_model

Results = dict[str, Tensor]


class Task(Protocol):
    """One forward and backward pass: what is timed, and what is checked."""

    def reset(self, model: nn.Module) -> None:
        """Every gradient back to None."""

    def forward(self, model: nn.Module) -> Tensor:
        """The output."""

    def backward(self, model: nn.Module, output: Tensor) -> None:
        """Gradients of everything that requires them."""

    def input_gradients(self) -> Results:
        """Those that backward leaves on the task's own tensors."""

    def double(self) -> Task:
        """The same task in fp64."""


def results(task: Task, model: nn.Module) -> Results:
    """The output and every gradient of one step."""
    task.reset(model)
    output = task.forward(model)
    task.backward(model, output)
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"output": output.detach(), **task.input_gradients(), **gradients}


def reference_results(task: Task, model: nn.Module) -> Results:
    """As :func:`results`, in fp64 and, where ``model`` has GLoRA, by the literal formula."""
    return results(task.double(), oracle_model(model))


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
