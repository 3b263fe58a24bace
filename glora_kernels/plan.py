"""What a call will cost and why: dense products, operations and bytes kept for backward."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

from torch import Tensor

from . import dispatch
from .autocast import cast_operands
from .checks import check_call
from .reuse import PROBED_TOKENS, reuses_output
from .routes import needs_weight_gradient, scales_inputs
from .terms import LowRank, Terms, Vector


@dataclass(frozen=True)
class Explanation:
    """The plan of one ``glora_linear`` call and of its backward pass.

    Attributes:
        backend: where the call goes.
        reason: why that backend.
        strategy: how the backend goes about it.
        tokens, outputs, inputs: M, N, K.
        forward_units, backward_units: dense GEMMs of 2 M N K operations each.
        forward_flops, backward_flops: multiplications and additions of all matrix products.
        saved: what is kept for backward beside parameters.
        saved_bytes: the size of it; an output that the rest of the graph holds anyway included.
    """

    backend: str
    reason: str
    strategy: str
    tokens: int
    outputs: int
    inputs: int
    forward_units: int
    backward_units: int
    forward_flops: int
    backward_flops: int
    saved: tuple[str, ...]
    saved_bytes: int

    def to_dict(self) -> dict:
        return asdict(self)

    def __str__(self) -> str:
        kept = " and ".join(self.saved) or "nothing"
        return (
            f"backend   {self.backend} ({self.reason})\n"
            f"strategy  {self.strategy}\n"
            f"shape     M = {self.tokens} tokens, N = {self.outputs} out, K = {self.inputs} in\n"
            f"forward   {self.forward_units} dense GEMM, {self.forward_flops / 1e9:.3f} GFLOP in all\n"
            f"backward  {self.backward_units} dense GEMM, {self.backward_flops / 1e9:.3f} GFLOP in all\n"
            f"saved     {kept}, {self.saved_bytes:,} bytes"
        )


def explain(x: Tensor, weight: Tensor, bias: Tensor | None, terms: Terms) -> Explanation:
    """What ``glora_linear(x, weight, bias, terms)`` would do; nothing is computed.

    Arguments, shapes and errors are those of :func:`glora_kernels.glora_linear`. Backward is
    planned for the tensors that require grad now.
    """
    x, weight, bias = cast_operands(x, weight, bias)
    check_call(x, weight, bias, terms)
    decision = dispatch.decide()
    outputs, inputs = weight.shape
    tokens = math.prod(x.shape[:-1])
    wanted = frozenset(slot for slot, term in terms.active if any(s.requires_grad for s in term.storages))
    if decision.backend == "reference":
        strategy = "dense A, B and W_eff, differentiated by autograd"
        saved: tuple[str, ...] = ("x", "W_eff", "dense A and B")
        units = 1, bool(x.requires_grad) + bool(wanted & {"A", "B"})
        saved_numbers = x.numel() + 3 * weight.numel()
        flops = _forward_flops(tokens, outputs, inputs, terms), units[1] * 2 * tokens * outputs * inputs
    else:
        strategy = _strategy(terms, wanted, tokens, inputs)
        keeps_output = "A" in wanted and reuses_output(tokens, inputs, terms)
        saved = tuple(name for name, kept in (("x", wanted & {"A", "B"}), ("y", keeps_output)) if kept)
        saved_numbers = x.numel() * ("x" in saved) + tokens * outputs * ("y" in saved)
        units = 1, _backward_units(terms, wanted, x.requires_grad, keeps_output)
        flops = (
            _forward_flops(tokens, outputs, inputs, terms),
            _backward_flops(tokens, outputs, inputs, terms, wanted, x.requires_grad, units[1])
            + 2 * PROBED_TOKENS * outputs * inputs * keeps_output,
        )
    return Explanation(
        *decision, strategy, tokens, outputs, inputs, *units, *flops, saved, saved_numbers * x.element_size()
    )


def _strategy(terms: Terms, wanted: frozenset[str], tokens: int, inputs: int) -> str:
    if not terms.adapts_weight:
        return "W0 as it is; only the bias is adapted"
    way = "assemble W_eff in one pass, then one GEMM"
    if needs_weight_gradient(terms, wanted):
        return way + "; backward contracts dW with W0 and the factors"
    if "A" in wanted and isinstance(terms.A, Vector) and terms.product == "hadamard":
        source = "the output" if reuses_output(tokens, inputs, terms) else "x W0^T (too few tokens to reuse the output)"
        return way + f"; backward reads da from {source}"
    return way + "; backward forms thin products only"


def _backward_units(terms: Terms, wanted: frozenset[str], wants_x: bool, keeps_output: bool) -> int:
    if "A" not in wanted or (isinstance(terms.A, LowRank) and terms.product == "matmul"):
        return int(wants_x)
    if isinstance(terms.A, LowRank) or (isinstance(terms.A, Vector) and terms.product == "hadamard"):
        return int(wants_x) + (not keeps_output)
    return 1  # dy W0 serves both dx and da


def _rank(term: object) -> int:
    return term.factors[1].shape[0] if isinstance(term, LowRank) else 0


def _forward_flops(tokens: int, outputs: int, inputs: int, terms: Terms) -> int:
    weight_passes = 2 * outputs * inputs
    prompt = weight_passes + 2 * inputs * _rank(terms.C) if terms.C is not None else 0
    return 2 * tokens * outputs * inputs + _assembly_flops(outputs, inputs, terms) + prompt


def _assembly_flops(outputs: int, inputs: int, terms: Terms, projected: bool = False) -> int:
    a_products = 1 if terms.product == "hadamard" or projected else 2
    return 2 * outputs * inputs * (a_products * _rank(terms.A) + _rank(terms.B))


def _backward_flops(
    tokens: int, outputs: int, inputs: int, terms: Terms, wanted: frozenset[str], wants_x: bool, units: int
) -> int:
    total = units * 2 * tokens * outputs * inputs
    thin = 4 * tokens * (outputs + inputs)  # both gradients of a low-rank term, for each rank
    one_sided = 2 * tokens * outputs  # the gradient of a vector or constant B
    on_weight = 2 * outputs * inputs
    scales_dx = "A" in wanted and scales_inputs(terms)
    if wants_x and not scales_dx:
        total += _assembly_flops(outputs, inputs, terms, projected=True)
    if scales_dx and terms.B is not None:
        total += 2 * tokens * (outputs + inputs) * _rank(terms.B)
    if needs_weight_gradient(terms, wanted):
        total += 2 * on_weight * (_rank(terms.A) + _rank(terms.B) * ("B" in wanted))
    else:
        if "B" in wanted:
            total += thin * _rank(terms.B) if isinstance(terms.B, LowRank) else one_sided
        if "A" in wanted:
            total += (thin + on_weight) * _rank(terms.A)
    if "C" in wanted:
        total += on_weight + 4 * inputs * _rank(terms.C)
    return total
