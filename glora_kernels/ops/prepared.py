"""A layer that is called again and again with the same operands: what has been checked is not checked again.

:func:`glora_kernels.glora_linear` checks every operand at every call, which takes longer than a small layer's
arithmetic. Here a call only asks whether everything is still what it was (``torch_private.py``).
"""

from __future__ import annotations

from collections.abc import Mapping
from operator import is_
from types import MappingProxyType
from typing import NamedTuple
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from ..checks import check_call, check_term
from ..dispatch import automatic, backend_for, chosen_backend, tracing_reason, variable_is_set
from ..path_encoding import Choices, term_of
from ..terms import Term, Terms
from ..torch_private import autocast_is_on, can_guard, forward_level, guard
from .autograd import PlannedCall, differentiable
from .linear import compute

MAX_USES = 1024  # of one layer


class _Run:
    """How layers with operands of the same kind run one path: without and with gradients."""

    __slots__ = ("__weakref__", "differentiably", "forward", "terms")

    def __init__(self, call: PlannedCall):
        self.forward, self.differentiably, self.terms = call.plan.forward, differentiable(call), call.terms


class _Use(NamedTuple):
    """One path of one layer."""

    choices: Choices  # kept alive, so that no others get their identity
    storages: tuple[Tensor, ...]
    factors: tuple[float, ...] | None  # of the storages; None if all are 1
    run: _Run


# By operands and path, as long as a layer runs it: a model has hundreds of paths and few kinds of layers.
_runs: WeakValueDictionary[tuple, _Run] = WeakValueDictionary()


class PreparedLinear:
    """:func:`glora_kernels.glora_linear` for one layer, whatever kinds and ranks it is called with.

    Attributes:
        weight, bias: as there; plain tensors or parameters.
        storages: Ad, Au, Bd, Bu, Cd, Cu, D, E: parameters, which live as long as their layer.
        product: ``"hadamard"`` or ``"matmul"``.
        scales: what the first storage of a slot is multiplied by, by slot and kind; 1 where there is no entry.
    """

    def __init__(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        storages: tuple[Tensor, ...],
        product: str,
        scales: Mapping[tuple[str, str], float] = MappingProxyType({}),
    ):
        """Prepare for calls with inputs like ``x``, of any number of tokens.

        Raises:
            TypeError, ValueError: ``x``, ``weight`` or ``bias`` does not fit.
        """
        check_call(x, weight, bias, Terms(product=product))
        self.weight, self.bias, self.storages, self.product = weight, bias, storages, product
        self.scales = scales
        self._operands = (weight, bias, *storages)
        self._tensors = tuple(operand for operand in self._operands if operand is not None)
        self._unchanged = guard(x, self._tensors)
        self._terms: dict[tuple[str, str, int], Term] = {}
        kinds = [
            None if t is None else (t.shape, t.stride(), t.dtype, t.requires_grad, t.is_neg()) for t in self._operands
        ]
        self._key, self._wants_x = (*kinds, weight.device, x.requires_grad), x.requires_grad
        self._uses: dict[int, _Use] = {}  # by the identity of the choices, the oldest first

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
            or forward_level() >= 0
        ):
            return None
        use = self._uses.get(id(choices)) or self._first_use(choices)
        _, storages, factors, run = use
        if factors is not None:
            storages = tuple([s if factor == 1 else s * factor for s, factor in zip(storages, factors)])
        if chosen_backend() is not None or variable_is_set():
            return compute(x, self.weight, self.bias, run.terms(storages))
        if torch.is_grad_enabled():
            return run.differentiably(x, self.weight, self.bias, *storages)
        return run.forward(x, self.weight, self.bias, storages).y

    def _first_use(self, choices: Choices) -> _Use:
        chosen = {slot: self._term(slot, kind, rank) for slot, (kind, rank) in choices.items() if kind != "none"}
        terms = Terms(**chosen, product=self.product)  # type: ignore[arg-type]
        decision = automatic(self.weight, terms)
        key = self._key, terms.structure, decision
        run = _runs.get(key)
        if run is None:
            call = PlannedCall(backend_for(decision), self.weight, self.bias, terms, self._wants_x)
            run = _runs[key] = _Run(call)
        if len(self._uses) >= MAX_USES:
            del self._uses[next(iter(self._uses))]
        use = self._uses[id(choices)] = _Use(choices, terms.storages, self._factors(choices, terms), run)
        return use

    def _factors(self, choices: Choices, terms: Terms) -> tuple[float, ...] | None:
        factors = [
            self.scales.get((slot, choices[slot][0]), 1.0) if first else 1.0
            for slot, term in terms.active
            for first in (True, *[False] * (len(term.storages) - 1))
        ]
        return None if all(factor == 1 for factor in factors) else tuple(factors)

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
