"""The backward pass: which kernels run, in which order, and where their partial sums go.

Five routes, by the kind of A and whether its gradient is wanted. In brackets: launches, dense products included.

    thin       A is none, or no gradient of it is wanted    token pass, weight pass, dx, finish                   [4]
    projected  A is a low rank of the matmul product        token pass, weight pass, dx, finish                   [4]
    scaled     A scales inputs                              g = dy W0, token pass (dx), weight pass, finish       [4]
    solved     A scales rows, and the output is at hand     token pass, weight pass, dx, lost rows, finish        [5]
    dense      A is a hadamard low rank, or scales rows     token pass (db), dW, contraction, dx, finish          [5]
               and the output is not at hand

With the fused strategy dx is formed with W_eff in registers, and dW is contracted as it is formed: no (N, K) buffer.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..backend import BackwardCall, SlotGradients
from ..gradient_routes import needs_weight_gradient, scales_inputs
from ..terms import LowRank
from .context import context
from .gradients import gradients
from .kernels.contract import contraction
from .kernels.fused import multiply
from .kernels.token_pass import token_pass
from .kernels.weight_pass import weight_pass
from .operands import BiasOperands, a_operand, b_operand
from .reservations import reserve
from .run import BackwardRun


def route_of(call: BackwardCall) -> str:
    """The route of a call: see the table above."""
    terms, wanted = call.terms, call.wanted
    if "A" not in wanted:
        return "thin"
    if scales_inputs(terms):
        return "scaled"
    if needs_weight_gradient(terms, wanted):
        return "dense"
    if isinstance(terms.A, LowRank):
        return "projected"
    return "dense" if call.output is None else "solved"


def backward(call: BackwardCall, strategy: str) -> tuple[Tensor | None, SlotGradients]:
    """The gradient of x, if wanted, and the gradients of the storages of every wanted slot."""
    a = a_operand(call.terms, call.projected, call.weight.dtype)
    b = b_operand(call.terms, call.weight.dtype)
    matrices = (call.dy,) if call.x is None else (call.dy, call.x)
    run = BackwardRun(call, strategy, context(call.dy.shape[0], call.weight, *matrices), route_of(call), a, b)
    reserve(run)
    dx = _ROUTES[run.route](run)
    return dx, gradients(run)


def _through_tokens(run: BackwardRun) -> Tensor | None:
    """The routes thin, projected and solved."""
    token_pass(run)
    w_eff = weight_pass(run)
    dx = _input_gradient(run, w_eff)
    if run.route == "solved":
        contraction(run, None)
    return dx


def _scaled(run: BackwardRun) -> Tensor | None:
    dx = token_pass(run, run.call.dy @ run.call.weight)
    weight_pass(run)
    return dx


def _dense(run: BackwardRun) -> Tensor | None:
    token_pass(run)
    dw = None if run.strategy == "fused" else _weight_gradient(run.call.dy, run.call.x)
    return _input_gradient(run, contraction(run, dw))


_ROUTES = {
    "thin": _through_tokens,
    "projected": _through_tokens,
    "solved": _through_tokens,
    "scaled": _scaled,
    "dense": _dense,
}


def _input_gradient(run: BackwardRun, w_eff: Tensor | None) -> Tensor | None:
    """``dx = dy W_eff``, (M, K), with the W_eff that a pass has written, or else with W_eff formed in registers."""
    call = run.call
    if not call.wants_x:
        return None
    if not call.terms.adapts_weight:
        return call.dy @ call.weight
    if w_eff is not None:
        return call.dy @ w_eff
    dx = call.dy.new_empty(call.dy.shape[0], call.weight.shape[1])
    multiply(call.dy, call.weight.t(), dx, run.a.transposed, run.b.transposed, BiasOperands(), None, run.shared)
    return dx


def _weight_gradient(dy: Tensor, x: Tensor | None) -> Tensor:
    """``dW = dy^T x``, (N, K), in the type of dy; for fp16 in fp32, since sums in fp16 could overflow."""
    assert x is not None
    if dy.dtype != torch.float16:
        return dy.t() @ x
    if dy.is_cuda and not torch.version.hip:  # ROCm's library has no product of another output type
        return torch.mm(dy.t(), x, out_dtype=torch.float32)
    return dy.t().float() @ x.float()
