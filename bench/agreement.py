"""Checks made before anything is timed: output and gradients against the truth."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, Protocol

from torch import Tensor, nn

from glora_kernels.error_bound import largest_constant

from .oracle import oracle_model

Results = dict[str, Tensor]


class Workload(Protocol):
    """One forward and backward pass: what is timed, and what is checked."""

    def reset(self, model: nn.Module) -> None:
        """Set every gradient to None."""

    def forward(self, model: nn.Module) -> Tensor:
        """The output."""

    def backward(self, model: nn.Module, output: Tensor) -> None:
        """Gradients of everything that requires them."""

    def input_gradients(self) -> Results:
        """The gradients that backward leaves on the workload's own tensors."""

    def double(self) -> Workload:
        """The same workload in fp64."""

    def magnitudes(self) -> Workload | None:
        """The same workload in fp32 on absolute values, whose sums cannot cancel; None where that means nothing."""


def run(workload: Workload, model: nn.Module) -> Tensor:
    """One step; returns its output."""
    workload.reset(model)
    output = workload.forward(model)
    workload.backward(model, output)
    return output


def results(workload: Workload, model: nn.Module) -> Results:
    """The output and every gradient of one step."""
    output = run(workload, model)
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"output": output.detach(), **workload.input_gradients(), **gradients}


class Truth(NamedTuple):
    """The results that everyone is compared with.

    Attributes:
        want: the results in fp64.
        scale: S of the numerical contract, the same formula on absolute values; None for a whole model, which is more
            than one formula.
    """

    want: Results
    scale: Results | None


def truth(workload: Workload, model: nn.Module) -> Truth:
    """The truth, from the literal formula in place of the adapted layers of ``model``."""
    magnitudes = workload.magnitudes()
    scale = None if magnitudes is None else results(magnitudes, oracle_model(model, magnitudes=True))
    return Truth(results(workload.double(), oracle_model(model)), scale)


def require_agreement(
    who: str, got: Results, truth: Truth, tolerance: float, names: Mapping[str, str] | None = None
) -> float:
    """Require every tensor to be within ``tolerance`` of the truth.

    With a scale, every element must have ``|got - want| <= tolerance u S`` (``glora_kernels.error_bound``); without one
    ``|got - want| <= tolerance |want|`` in the 2-norm, and no tensor of the truth may be a sum that cancels to zero.

    Args:
        who: the entrant with these results, for the message.
        got: tensors by name.
        names: the name in ``got`` of a tensor of the truth, where it differs.

    Returns:
        The largest error, in units of u S or relative.

    Raises:
        ValueError: a tensor is missing, superfluous or too far off.
    """
    renamed = {name: (names or {}).get(name, name) for name in truth.want}
    if set(got) != set(renamed.values()):
        raise ValueError(f"{who}: not timed, expected results {sorted(renamed.values())}, got {sorted(got)}")
    errors = {}
    for name, want in truth.want.items():
        found = got[renamed[name]]
        if truth.scale is None:
            errors[renamed[name]] = float((found - want).norm() / want.norm())
        else:
            errors[renamed[name]] = largest_constant(found, want, truth.scale[name], got["output"].dtype)
    wrong = {name: error for name, error in errors.items() if not error <= tolerance}
    if wrong:
        unit = "relative errors" if truth.scale is None else "errors over u S"
        raise ValueError(f"{who}: not timed, expected {unit} up to {tolerance:g}, got {wrong}")
    return max(errors.values())
