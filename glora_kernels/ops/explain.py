"""What a call will cost and why: dense products, operations, bytes kept for backward; on a GPU also time."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..checks import check_call
from ..dispatch import Decision, architecture_of, decide, rank_unfit
from ..gradient_routes import (
    PROBED_PART,
    PROBED_TOKENS,
    needs_weight_gradient,
    reads_token_sums,
    reuses_output,
    scales_inputs,
    scales_rows,
)
from ..planning.machines import INTERPRETER, machine_for
from ..planning.prediction import STRATEGIES, predict, rounded, strategy_for
from ..planning.prices import PASS
from ..planning.problem import Problem, keeps_output, route_of
from ..precision import cast_operands
from ..terms import LowRank, Terms, compute_dtype, rank_of
from .explanation import Explanation

_STRATEGIES = {
    "assemble": "assemble: W_eff in one pass, then one GEMM",
    "fused": "fused: one GEMM that forms W_eff in registers",
}
_ROUTES = {
    "thin": "backward forms thin products only",
    "projected": "backward forms thin products and W0^T dV only",
    "scaled": "backward reads da from dy W0",
    "solved": "backward solves da from the output",
    "dense": "backward contracts dW with W0 and the factors",
}
_ONLY_BIAS = "W0 as it is; only the bias is adapted"


class _Call(NamedTuple):
    """The operands, checked, and the slots that want a gradient."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    terms: Terms
    wanted: frozenset[str]

    @property
    def sizes(self) -> tuple[int, int, int]:
        """M, N, K."""
        outputs, inputs = self.weight.shape
        return math.prod(self.x.shape[:-1]), outputs, inputs

    @property
    def keeps_output(self) -> bool:
        tokens, _, inputs = self.sizes
        return "A" in self.wanted and reuses_output(tokens, inputs, self.terms)


def explain(
    x: Tensor, weight: Tensor, bias: Tensor | None, terms: Terms, *, architecture: str | None = None
) -> Explanation:
    """What ``glora_linear(x, weight, bias, terms)`` would do; nothing is computed.

    Arguments, shapes and errors are those of :func:`glora_kernels.glora_linear`. Backward is
    planned for the tensors that require grad now.

    Args:
        architecture: ``"sm_90"``, ``"gfx942"`` and the like: plan for the Triton backend on such a GPU
            instead, wherever the operands are and whatever backend is chosen.

    Raises:
        ValueError: an architecture if nothing is known of it or of its older relatives.
    """
    x, weight, bias = cast_operands(x, weight, bias)
    check_call(x, weight, bias, terms)
    decision = decide(weight, terms) if architecture is None else _pretend(weight, terms, architecture)
    wanted = frozenset(slot for slot, term in terms.active if any(s.requires_grad for s in term.storages))
    call = _Call(x, weight, bias, terms, wanted)
    if decision.backend == "reference":
        plan = _reference_plan(call)
    elif decision.backend == "triton" and x.numel() and weight.numel():  # it leaves empty ones to the torch backend
        plan = _triton_plan(call, architecture or architecture_of(weight.device), decision)
    elif decision.backend == "cuda":
        plan = _extension_plan(call)
    else:
        plan = _torch_plan(call)
    return Explanation(decision.backend, decision.reason, plan.pop("strategy"), *call.sizes, **plan)


def _pretend(weight: Tensor, terms: Terms, architecture: str) -> Decision:
    """Where the call would go on a GPU of this architecture."""
    machine_for(architecture)
    unfit = "fp64" if weight.dtype == torch.float64 and architecture != INTERPRETER else rank_unfit(terms)
    if unfit is not None:
        return Decision("torch", f"on {architecture}, Triton kernels do not serve this call: {unfit}")
    return Decision("triton", f"as if on {architecture}")


# The Triton backend.


def _triton_plan(call: _Call, architecture: str, decision: Decision) -> dict[str, Any]:
    tokens = call.sizes[0]
    problem = Problem.of(call.weight, call.bias, call.terms, call.wanted, call.x.requires_grad, architecture)
    taken = decision.strategy or strategy_for(problem, tokens)
    predictions = tuple(predict(problem, tokens, name) for name in sorted(STRATEGIES, key=lambda name: name != taken))
    forward, backward = predictions[0].forward, predictions[0].backward
    route = route_of(problem, keeps_output(problem, tokens))
    return {
        "strategy": _triton_strategy(call, taken, route if backward else None),
        "forward_units": sum(launch.category != PASS for launch in forward),
        "backward_units": sum(launch.category != PASS for launch in backward),
        "forward_flops": sum(launch.flops for launch in forward),
        "backward_flops": sum(launch.flops for launch in backward),
        **_saved(call, token_sums=False, output=call.keeps_output),
        "architecture": architecture,
        "route": route,
        "choice": _reasoning(problem, tokens, decision),
        "predictions": predictions,
    }


def _triton_strategy(call: _Call, taken: str, route: str | None) -> str:
    if not call.terms.adapts_weight:
        return _ONLY_BIAS
    return _STRATEGIES[taken] if route is None else f"{_STRATEGIES[taken]}; {_ROUTES[route]}"


def _reasoning(problem: Problem, tokens: int, decision: Decision) -> str:
    if decision.strategy is not None:
        return f"{decision.strategy}, {decision.reason}"
    if not problem.adapts_weight:
        return "none to be made: the strategies differ in how they form W_eff"
    decided, taken = rounded(tokens), strategy_for(problem, tokens)
    ways = [predict(problem.whole, decided, name) for name in sorted(STRATEGIES, key=lambda name: name != taken)]
    times = " against ".join(f"{way.seconds * 1e6:,.1f} us for {way.strategy}" for way in ways)
    return f"predicted, not measured, for a training step of {decided} tokens: {times}"


# The other backends.


def _reference_plan(call: _Call) -> dict[str, Any]:
    tokens, outputs, inputs = call.sizes
    wants_x, unit = call.x.requires_grad, 2 * tokens * outputs * inputs
    units = bool(wants_x) + bool(call.wanted & {"A", "B"})
    return {
        "strategy": "dense A, B and W_eff, differentiated by autograd",
        "forward_units": 1,
        "backward_units": units,
        "forward_flops": _forward_flops(call),
        "backward_flops": units * unit,
        "saved": ("x", "W_eff", "dense A and B"),
        "saved_bytes": (call.x.numel() + 3 * call.weight.numel()) * call.x.element_size(),
    }


def _torch_plan(call: _Call) -> dict[str, Any]:
    _, outputs, inputs = call.sizes
    units = _backward_units(call)
    # Which rows of da are lost: asked of a part of the inputs, and of the rest for rows that this leaves in doubt.
    probes = 2 * PROBED_TOKENS * outputs * (inputs // PROBED_PART) * call.keeps_output
    return {
        "strategy": _torch_strategy(call),
        "forward_units": 1,
        "backward_units": units,
        "forward_flops": _forward_flops(call),
        "backward_flops": _backward_flops(call, units) + probes,
        **_saved(call, reads_token_sums(call.terms, call.wanted), call.keeps_output),
    }


def _extension_plan(call: _Call) -> dict[str, Any]:
    """``csrc/layer.cpp``: dW wherever a hadamard A wants a gradient, ``dy W0`` beside dx for a diagonal one."""
    (tokens, outputs, inputs), terms = call.sizes, call.terms
    third = "A" in call.wanted and (terms.product == "hadamard" or not isinstance(terms.A, LowRank))
    units = call.x.requires_grad + third
    through_dw = third and terms.product == "hadamard"
    flops = units * 2 * tokens * outputs * inputs
    if call.x.requires_grad:
        flops += _assembly_flops(call, projected=True)
    for slot in call.wanted & {"A", "B"}:
        rank = rank_of(getattr(terms, slot))
        dense, thin = 4 * outputs * inputs * rank, 4 * tokens * (outputs + inputs) * rank
        flops += dense if through_dw else thin or 2 * tokens * outputs * (slot == "B")
        flops += 2 * outputs * inputs * rank if slot == "A" and terms.product == "matmul" else 0
    if "C" in call.wanted:
        flops += 2 * outputs * inputs + 4 * inputs * rank_of(terms.C)
    return {
        "strategy": "one call of C++: W_eff in one pass, one GEMM" + ("; backward contracts dW" if through_dw else ""),
        "forward_units": 1,
        "backward_units": units,
        "forward_flops": _forward_flops(call),
        "backward_flops": flops,
        **_saved(call, token_sums=False, output=False),
    }


def _saved(call: _Call, token_sums: bool, output: bool) -> dict[str, Any]:
    """What is kept of x or its sums, V = W0 Ad, and y with the bias that was added to it."""
    (tokens, outputs, _), terms, size = call.sizes, call.terms, call.x.element_size()
    projected = isinstance(terms.A, LowRank) and terms.product == "matmul"
    adapts_bias = terms.C is not None or terms.E is not None or (terms.D is not None and call.bias is not None)
    sizes = {
        "x": call.x.numel() * size * bool(call.wanted & {"A", "B"} and not token_sums),
        "token sums": tokens * size * token_sums,
        "V": outputs * rank_of(terms.A) * compute_dtype(call.weight.dtype).itemsize * projected,
        "y": tokens * outputs * size * output,
        "b_eff": outputs * size * (output and adapts_bias),
    }
    return {"saved": tuple(name for name in sizes if sizes[name]), "saved_bytes": sum(sizes.values())}


def _torch_strategy(call: _Call) -> str:
    if not call.terms.adapts_weight:
        return _ONLY_BIAS
    way = "assemble W_eff in one pass, then one GEMM"
    if needs_weight_gradient(call.terms, call.wanted):
        return way + "; backward contracts dW with W0 and the factors"
    if "A" in call.wanted and scales_rows(call.terms):
        source = "the output" if call.keeps_output else "x W0^T (too few tokens to reuse the output)"
        return way + f"; backward reads da from {source}"
    return way + "; backward forms thin products only"


def _backward_units(call: _Call) -> int:
    terms, wants_x = call.terms, call.x.requires_grad
    if "A" not in call.wanted or (isinstance(terms.A, LowRank) and terms.product == "matmul"):
        return int(wants_x)
    if isinstance(terms.A, LowRank) or scales_rows(terms):
        return int(wants_x) + (not call.keeps_output)
    return 1  # dy W0 serves both dx and da


def _forward_flops(call: _Call) -> int:
    tokens, outputs, inputs = call.sizes
    prompt = 2 * outputs * inputs + 2 * inputs * rank_of(call.terms.C) if call.terms.C is not None else 0
    return 2 * tokens * outputs * inputs + _assembly_flops(call) + prompt


def _assembly_flops(call: _Call, projected: bool = False) -> int:
    _, outputs, inputs = call.sizes
    a_products = 1 if call.terms.product == "hadamard" or projected else 2
    return 2 * outputs * inputs * (a_products * rank_of(call.terms.A) + rank_of(call.terms.B))


def _backward_flops(call: _Call, units: int) -> int:
    (tokens, outputs, inputs), terms, wanted = call.sizes, call.terms, call.wanted
    total = units * 2 * tokens * outputs * inputs
    thin = 4 * tokens * (outputs + inputs)  # both gradients of a low-rank term, for each rank
    one_sided = 2 * tokens * outputs  # the gradient of a vector or constant B
    on_weight = 2 * outputs * inputs
    scales_dx = "A" in wanted and scales_inputs(terms)
    if call.x.requires_grad and not scales_dx:
        total += _assembly_flops(call, projected=True)
    if scales_dx and call.x.requires_grad and terms.B is not None:
        total += 2 * tokens * (outputs + inputs) * rank_of(terms.B)
    if needs_weight_gradient(terms, wanted):
        total += 2 * on_weight * (rank_of(terms.A) + rank_of(terms.B) * ("B" in wanted))
    else:
        if "B" in wanted:
            total += thin * rank_of(terms.B) if isinstance(terms.B, LowRank) else one_sided
        if "A" in wanted:
            total += (thin + on_weight) * rank_of(terms.A)
    if "C" in wanted:
        total += on_weight + 4 * inputs * rank_of(terms.C)
    return total
