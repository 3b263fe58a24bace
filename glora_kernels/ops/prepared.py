"""A layer that is called again and again with the same operands: what has been checked is not checked again.

:func:`glora_kernels.glora_linear` checks every operand at every call, which takes longer than a small layer's
arithmetic. Here a call only asks whether everything is still what it was (``torch_private.py``).
"""

from __future__ import annotations

from collections.abc import Mapping
from operator import is_
from typing import NamedTuple

import torch
from torch import Tensor

from ..backend import Backend
from ..checks import check_call, check_term
from ..dispatch import automatic, backend_for, is_left_open, tracing_reason
from ..path_encoding import Choices, term_of
from ..terms import Term, Terms
from ..torch_private import autocast_is_on, can_guard, forward_mode_is_on, guard
from .autograd import CallPlan, differentiable, plan_of
from .linear import compute


class _Use(NamedTuple):
    """One way to read the storages, and the backend that serves it automatically."""

    choices: Choices
    terms: Terms
    plan: CallPlan
    backend: Backend


class PreparedLinear:
    """:func:`glora_kernels.glora_linear` for one layer, whatever kinds and ranks it is called with.

    Attributes:
        weight, bias: as there; plain tensors or parameters.
        storages: Ad, Au, Bd, Bu, Cd, Cu, D, E: parameters, which live as long as their layer.
        product: ``"hadamard"`` or ``"matmul"``.
    """

    def __init__(self, x: Tensor, weight: Tensor, bias: Tensor | None, storages: tuple[Tensor, ...], product: str):
        """Prepare for calls with inputs like ``x``, of any number of tokens.

        Raises:
            TypeError, ValueError: ``x``, ``weight`` or ``bias`` does not fit.
        """
        check_call(x, weight, bias, Terms(product=product))
        self.weight, self.bias, self.storages, self.product = weight, bias, storages, product
        self._operands = (weight, bias, *storages)
        self._tensors = tuple(operand for operand in self._operands if operand is not None)
        self._unchanged = guard(x, self._tensors)
        self._terms: dict[tuple[str, str, int], Term] = {}
        self._last: _Use | None = None

    def __call__(self, x: Tensor, operands: Mapping[str, Tensor | None], choices: Choices) -> Tensor | None:
        """y, or None if anything is not what it was when this object was made.

        Args:
            operands: what the layer holds now, in the order weight, bias, storages.
            choices: kind and rank by slot, as for :func:`glora_kernels.encode`; a mapping that nobody changes.

        Raises:
            TypeError, ValueError: a storage that is read and does not fit.
            RuntimeError: a backend was chosen that cannot be used here.
        """
        if (
            len(operands) != len(self._operands)
            or not all(map(is_, operands.values(), self._operands))
            or not self._unchanged(x, *self._tensors)
            or forward_mode_is_on()
        ):
            return None
        use = self._last
        if use is None or use.choices is not choices:
            use = self._last = self._use(choices)
        if not is_left_open():
            return compute(x, self.weight, self.bias, use.terms)
        if torch.is_grad_enabled():
            return differentiable(use.backend, use.plan, x, self.weight, self.bias, use.terms)
        return use.backend.forward(x, self.weight, self.bias, use.terms).y

    def _use(self, choices: Choices) -> _Use:
        chosen = {slot: self._term(slot, kind, rank) for slot, (kind, rank) in choices.items() if kind != "none"}
        terms = Terms(**chosen, product=self.product)  # type: ignore[arg-type]
        backend = backend_for(automatic(self.weight, terms))
        return _Use(choices, terms, plan_of(terms, self.bias is not None), backend)

    def _term(self, slot: str, kind: str, rank: int) -> Term:
        """The term, made and checked at its first use."""
        known = self._terms.get((slot, kind, rank))
        if known is None:
            known = term_of(slot, kind, rank, self.storages)
            check_term(slot, known, self.weight, self.product)
            self._terms[slot, kind, rank] = known
        return known


def can_prepare(x: Tensor) -> bool:
    """Whether calls can be prepared now: no mode is on that changes what a call with the same tensors means."""
    plain = type(x) is Tensor or type(x) is torch.nn.Parameter
    return can_guard() and plain and not autocast_is_on() and tracing_reason() is None
