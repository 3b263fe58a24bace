"""A layer call on the Triton kernels, planned once and run many times."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .. import _torch
from ..backend import ForwardResult, Plan
from ..planning import schedule, settings
from ..planning.forward import assembly, projection
from ..planning.prediction import rounded, strategy_for
from ..planning.problem import Problem
from ..planning.schedule import Call, Strides
from ..planning.steps import Schedule
from ..precision import fp32_precision, tf32_allowed
from ..terms import Terms
from ..torch_private import unsafe_view
from .device import architecture
from .run import Pass, SizedPass

PLANS = 1 << 12  # problems whose plans are kept
PASSES = 16  # passes of a plan: one for each class of tokens, strategy and layout


def plan(
    weight: Tensor, bias: Tensor | None, terms: Terms, wanted: frozenset[str], wants_x: bool, strategy: str | None
) -> TritonPlan:
    """The plan of calls with these operands; all layers with the same problem share one."""
    problem = Problem.of(weight, bias, terms, wanted, wants_x, architecture(weight.device))
    return _plan(problem, strategy, weight.device)


class TritonPlan:
    """See :class:`glora_kernels.backend.Plan`.

    A call with as many tokens as the one before, and with contiguous operands, finds its pass at once.
    """

    reads_token_sums = False

    def __init__(self, problem: Problem, strategy: str | None, device: torch.device):
        self.problem, self.strategy, self.device = problem, strategy, device
        self._projects = problem.projects and (problem.wants_x or problem.wants("A"))
        self._in_place = all(storage.in_place for part in problem.parts for storage in part.storages)
        self._setting = fp32_precision() if problem.dtype == torch.float32 else None
        self._passes: dict[tuple, Pass] = {}
        self._decided: tuple[int, tuple, str] = (0, (), "")  # the strategy for the last class of tokens
        self._forward: SizedPass | None = None
        self._backward: list[SizedPass | None] = [None, None]  # without the output at hand, and with it

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None, storages: Sequence[Tensor]) -> ForwardResult:
        flat = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
        found = self._forward
        if (
            found is None
            or flat.shape[0] != found.tokens
            or not flat.is_contiguous()
            or flat.is_neg()
            or settings.forced is not found.forced
            or (self._setting is not None and fp32_precision() != self._setting)
        ):
            if not flat.shape[0]:
                return self._of_torch(weight, bias, storages).forward(x, weight, bias, storages)
            flat = flat.resolve_neg()
            found = self._forward_of(flat)
            if flat.is_contiguous():
                self._forward = found
        slots = [flat, weight, bias, *storages, *found.blank]
        found.run(slots)
        y, projected, b_eff = found.results_in(slots)
        if x.dim() != 2:  # in place of a view, which a successor such as ReLU(inplace=True) could not overwrite
            y = unsafe_view(y, (*x.shape[:-1], y.shape[1]))
        return ForwardResult(y, projected, b_eff)

    def backward(
        self,
        dy: Tensor,
        x: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        storages: Sequence[Tensor],
        output: Tensor | None,
        b_eff: Tensor | None,
        projected: Tensor | None,
        token_sums: Tensor | None,
    ) -> tuple[Tensor | None, Sequence[Tensor | None]]:
        found = self._backward[output is not None]
        if (
            found is None
            or dy.shape[0] != found.tokens
            or not dy.is_contiguous()
            or dy.is_neg()
            or (x is not None and (x.is_neg() or not x.is_contiguous()))
            or not self._fits(weight, storages)
            or (projected is not None and not projected.is_contiguous())
            or settings.forced is not found.forced
            or (self._setting is not None and fp32_precision() != self._setting)
        ):
            if not dy.shape[0]:
                torch_plan = self._of_torch(weight, bias, storages)
                return torch_plan.backward(dy, x, weight, bias, storages, output, b_eff, projected, token_sums)
            dy, x = dy.resolve_neg(), None if x is None else x.resolve_neg()
            projected = None if projected is None else projected.contiguous()
            found = self._backward_of(dy, x, weight, bias, storages, output is not None)
        if projected is None and self._projects:
            (projected,) = self._without_tokens(projection, weight, bias, storages)
        slots = [dy, x, weight, bias, *storages, output, b_eff, projected, *found.blank]
        found.run(slots)
        (dx,) = found.results_in(slots)
        return dx, found.gradients_in(slots)

    def assemble(self, weight: Tensor, bias: Tensor | None, storages: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
        w_eff, b_eff = self._without_tokens(assembly, weight, bias, storages)
        return w_eff, b_eff

    def _fits(self, weight: Tensor, storages: Sequence[Tensor]) -> bool:
        """Whether saved tensors lie as planned: saved-tensor hooks may have put others in their place."""
        in_place = self._in_place and all(map(Tensor.is_contiguous, storages))
        return in_place and weight.stride() == self.problem.weight_strides

    def _problem_of(self, weight: Tensor, bias: Tensor | None, storages: Sequence[Tensor]) -> Problem:
        """The problem that was planned, or the same with the strides of these operands."""
        p = self.problem
        if self._fits(weight, storages):
            return p
        return Problem.of(weight, bias, self._terms(storages), p.wanted, p.wants_x, p.architecture)

    def _forward_of(self, x: Tensor) -> SizedPass:
        self._follow_setting()
        return self._pass("forward", x.shape[0], _strides(x), None, False).sized(x.shape[0])

    def _backward_of(
        self,
        dy: Tensor,
        x: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        storages: Sequence[Tensor],
        output: bool,
    ) -> SizedPass:
        self._follow_setting()
        problem = self._problem_of(weight, bias, storages)
        planned = self if problem is self.problem else _plan(problem, self.strategy, self.device)
        tokens, strides = dy.shape[0], (None if x is None else _strides(x), _strides(dy))
        found = planned._pass("backward", tokens, *strides, output).sized(tokens)
        if planned is self and strides == (None, None):
            self._backward[output] = found
        return found

    def _pass(
        self, direction: str, tokens: int, x_strides: Strides | None, dy_strides: Strides | None, output: bool
    ) -> Pass:
        """The pass for so many tokens: many numbers of tokens share one."""
        forced, decided = settings.forced_now(), self._decided
        if self.strategy is None and decided[:2] != (rounded(tokens), forced):
            decided = self._decided = rounded(tokens), forced, strategy_for(self.problem, tokens)
        strategy = self.strategy or decided[2]
        if direction == "forward" and strategy == "assemble":
            x_strides = None  # x is read by a dense product alone
        call = _shared(Call.of(self.problem, strategy, tokens, x_strides, dy_strides, output))
        key = direction, call, forced, self.problem.tf32
        found = self._passes.get(key)
        if found is None:
            if len(self._passes) >= PASSES:
                self._passes.clear()
            made = getattr(schedule, direction)(self.problem, call)
            found = self._passes[key] = Pass(made, self.device)
        return found

    def _follow_setting(self) -> None:
        """Plan again if torch's setting for fp32 products has changed."""
        if self._setting is not None and self._setting != fp32_precision():
            self._setting = fp32_precision()
            tf32 = tf32_allowed() and not self.problem.architecture.startswith("gfx")
            self.problem = self.problem._replace(tf32=tf32)
            self._forward, self._backward, self._decided = None, [None, None], (0, (), "")

    def _without_tokens(
        self, made: Callable[[Problem], Schedule], weight: Tensor, bias: Tensor | None, storages: Sequence[Tensor]
    ) -> list[Any]:
        """W_eff and b_eff, or V: what is returned by the schedule that is ``made``."""
        self._follow_setting()
        problem = self._problem_of(weight, bias, storages)
        found = _pass_without_tokens(made, problem, self.device, settings.forced_now())
        slots = [weight, bias, *storages, *found.blank]
        found.run(slots)
        return found.results_in(slots)

    def _terms(self, storages: Sequence[Tensor]) -> Terms:
        return Terms.unflatten(storages, self.problem.structure)

    def _of_torch(self, weight: Tensor, bias: Tensor | None, storages: Sequence[Tensor]) -> Plan:
        """The plan for no tokens at all."""
        problem = self.problem
        return _torch.plan(weight, bias, self._terms(storages), problem.wanted, problem.wants_x)


@lru_cache(maxsize=PLANS)
def _plan(problem: Problem, strategy: str | None, device: torch.device) -> TritonPlan:
    return TritonPlan(problem, strategy, device)


@lru_cache(maxsize=1 << 10)
def _shared(call: Call) -> Call:
    """One object for all that are equal, since plans hold many."""
    return call


def _strides(matrix: Tensor) -> Strides | None:
    """None for a contiguous matrix."""
    return None if matrix.is_contiguous() else matrix.stride()


@lru_cache(maxsize=PLANS)
def _pass_without_tokens(
    made: Callable[[Problem], Schedule], problem: Problem, device: torch.device, _forced: tuple
) -> SizedPass:
    return Pass(made(problem), device).sized(0)
