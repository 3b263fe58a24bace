"""Whether a run's steps are replayed from CUDA graphs, and in which form."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..dataset import LABELS, Batch
from ..graphs import GraphedStep
from ..graphs.capture import graphs_for
from ..graphs.step_body import Outcome
from ..layers.base import GLoRALayer
from ..objective import Objective
from .state import TrainingState

GRAPHS = ("auto", "piecewise", "whole", "off")


def require_graphs(graphs: str, device: torch.device) -> None:
    """Raise ValueError for no such choice, or one that the device cannot serve."""
    if graphs not in GRAPHS:
        raise ValueError(f"graphs: expected one of {GRAPHS}, got {graphs!r}")
    if graphs in ("piecewise", "whole") and graphs_for(device) is None:
        raise ValueError(
            f"graphs: expected 'auto' or 'off' on the device {device}, which has no CUDA graphs; got {graphs!r}"
        )


class StepGraphs:
    """The graphs of a run's steps. ``"auto"`` is ``"piecewise"`` where that is possible, and otherwise no graphs.

    ``"auto"`` does not take ``"whole"``, which always pays for a low-rank A and replays whatever Python the model runs.

    Args:
        choice: one of ``GRAPHS``.
        tell: is given one line for each reason why steps run without graphs.

    Attributes:
        used: ``"piecewise"``, ``"whole"``, ``"off"``, or ``"off: "`` and the reason.

    Raises:
        ValueError: ``"piecewise"`` or ``"whole"``, and a model that cannot be captured so.
    """

    def __init__(self, state: TrainingState, objective: Objective, choice: str, tell: Callable[[str], object]):
        self._state, self._objective, self._tell = state, objective, tell
        self._named = False  # whether the target of the batch came with named inputs
        self._choice = choice if graphs_for(state.device) is not None else "off"
        self.used = "off"
        self._step: GraphedStep | None = None
        self._captured = self._told_of_shapes = False
        self._parameters: list[tuple[GLoRALayer, tuple[int, ...]]] = []
        self._make()

    def _make(self) -> None:
        """A step for the layers that the model has now."""
        state, recipe, automatic = self._state, self._state.recipe, self._choice == "auto"
        self.close()
        if self._choice == "off" or (automatic and not state.layers):
            return
        self._parameters = self._found()
        mode = "piecewise" if automatic else self._choice
        try:
            self._step = GraphedStep(
                state.model,
                state.optimizer,
                self._loss,
                state.space,
                mode=mode,
                clip_norm=recipe.clip_norm,
                amp=recipe.amp,
                measure=self._measure,
            )
            self.used = mode
        except ValueError as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        """Go on without graphs, if that was left to this class."""
        if self._choice != "auto":
            raise error
        self.close()
        before, reason = self.used, (str(error) or repr(error)).splitlines()[0]
        self.used = f"off: {reason}"
        if self.used != before:
            self._tell(f"train: steps run without CUDA graphs: {reason}")

    def close(self) -> None:
        """Free the memory of the graphs, in which gradients lie, too."""
        if self._step is not None:
            self._state.optimizer.zero_grad(set_to_none=True)
            self._step = None
            gc.collect()  # graphs hold themselves in a circle
        self._captured = False

    def _found(self) -> list[tuple[GLoRALayer, tuple[int, ...]]]:
        """The layers and the addresses of their parameters, which graphs read."""
        return [(layer, tuple(p.data_ptr() for p in layer.parameters())) for layer in self._state.layers.values()]

    def renew(self) -> None:
        """Capture anew if other layers stand in the model, or their parameters elsewhere in memory."""
        if self._choice != "off" and self._parameters != self._found():
            self._make()

    def take(self, batch: Batch) -> Outcome | None:
        """Take the step of ``batch`` and return its loss and accuracy; None: that is left to the ordinary loop.

        The first batch is the one that is captured.
        """
        if self._step is None:
            return None
        x, target, self._named = self._objective.arguments(batch), batch.target, batch.named
        if target is None:
            self._give_up(ValueError(f"the samples have no {LABELS!r}, and graphs need a target"))
            return None
        if not self._captured:
            try:
                self._step.capture(x, target)
            except (RuntimeError, ValueError) as error:
                self._give_up(error)
                return None
            self._captured = True
        if self._step.replays(x, target):
            state = self._state
            paths = None if state.space is None else {name: layer.path for name, layer in state.layers.items()}
            return self._step(x, target, paths), self._step.measured
        if not self._told_of_shapes:
            shape = tuple(x.shape) if isinstance(x, Tensor) else {name: tuple(each.shape) for name, each in x.items()}
            self._tell(
                f"train: steps of batches such as {shape} run without CUDA graphs, which were captured for those of "
                "the first step"
            )
            self._told_of_shapes = True
        return None

    def _loss(self, output: Any, target: Tensor) -> Tensor:
        return self._objective.loss(output, target, self._named)

    def _measure(self, output: Any, target: Tensor) -> Tensor | None:
        return self._objective.accuracy(output, target, self._named)
