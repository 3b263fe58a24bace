"""Operands and gradients behind any strides: views, expanded tensors, offsets beyond 2^31."""

import pytest
import torch
from triton.runtime.errors import InterpreterError

from glora_kernels import Terms, Vector, glora_linear
from glora_kernels.planning import schedule
from glora_kernels.planning.numerics import LARGEST_BLOCK
from tests.helpers import assert_contract, oracle, results
from tests.interpreter.cases import (
    RAGGED,
    REUSED,
    STRATEGIES,
    check,
    kernels,
    laid_out,
    leaves_of,
    make,
    run,
    tiles,
    upstream,
)
from tests.interpreter.shim import untouched

REST = ("lora_3", "vector", "constant")
# One for each route: dense, solved, projected, scaled (over inputs, over everything), thin.
ROUTES = {
    "dense": (("lora_3", "lora_7", *REST), "hadamard", RAGGED),
    "solved": (("vector", "lora_3", *REST), "hadamard", REUSED),
    "projected": (("lora_7", "lora_3", *REST), "matmul", RAGGED),
    "scaled": (("vector", "lora_3", *REST), "matmul", RAGGED),
    "constant": (("constant", "vector", *REST), "hadamard", RAGGED),
    "thin": (("none", "lora_3", *REST), "hadamard", RAGGED),
}
each_route = pytest.mark.parametrize(("path", "product", "shape"), ROUTES.values(), ids=ROUTES)
each_strategy = pytest.mark.parametrize("strategy", STRATEGIES)


def in_place(tensor, order):
    """The leaf itself behind other strides."""
    return laid_out(tensor.detach(), order).requires_grad_(tensor.requires_grad)


@each_strategy
@each_route
@pytest.mark.parametrize("order", ["transposed", "sliced", "expanded"])
def test_x(order, path, product, shape, strategy):
    x, *others = make(path, shape, product=product)
    with tiles(32, 32, 16):
        check((in_place(x, order), *others), strategy=strategy)


@each_strategy
@each_route
@pytest.mark.parametrize("order", ["transposed", "sliced", "expanded"])
def test_weight(order, path, product, shape, strategy):
    x, weight, *others = make(path, shape, product=product)
    with tiles(32, 32, 16):
        check((x, laid_out(weight, order), *others), strategy=strategy)


@each_strategy
@each_route
@pytest.mark.parametrize("order", ["transposed", "sliced", "expanded"])
def test_gradient_of_the_output(order, path, product, shape, strategy):
    call = make(path, shape, product=product)
    with tiles(32, 32, 16):
        check(call, laid_out(upstream(call), order), strategy)


@each_strategy
@each_route
def test_storages_and_bias(path, product, shape, strategy):
    """Columns of a wider storage, a transposed one, every second entry of a bias."""
    x, weight, b0, terms = make(path, shape, product=product)
    for order in ("transposed", "sliced"):
        bias = torch.full((2 * len(b0),), torch.nan)[::2].copy_(b0)
        call = (x, weight, bias, terms.map(lambda s, order=order: in_place(s, order) if s.dim() == 2 else s))
        with tiles(32, 32, 16):
            check(call, strategy=strategy)


@each_strategy
@pytest.mark.parametrize("c", ["none", "vector"])
def test_a_bias_behind_strides_that_is_taken_off_the_output(c, strategy):
    """Without C, D and E it is b_eff itself."""
    x, weight, b0, terms = make(("vector", "none", c, "none", "none"), REUSED)
    bias = torch.full((2 * len(b0),), torch.nan)[::2].copy_(b0)
    check((x, weight, bias, terms), strategy=strategy)


@each_strategy
@each_route
def test_saved_tensors_that_come_back_behind_other_strides(path, product, shape, strategy):
    """As from hooks that pack what is saved."""
    call = make(path, shape, product=product)
    dy = upstream(call)

    def transposed(tensor):
        return tensor.t().contiguous().t() if tensor.dim() == 2 else tensor

    with kernels(strategy), torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, transposed):
        got = results(glora_linear, *call, dy)
    assert_contract(got, *oracle(*call, dy), call[0].dtype)


@each_strategy
@pytest.mark.parametrize("slot", ["C", "D", "E"])
def test_vectors_behind_strides(slot, strategy):
    """Of one dimension, with a stride of their own, and the first column of a transposed storage."""
    x, weight, b0, _ = make(("none",) * 5)
    length = weight.shape[1] if slot == "C" else weight.shape[0]
    wide = torch.full((length, 3), torch.nan)
    wide[:, 1] = torch.randn(length)
    for value in (wide[:, 1], wide[:, 1:], wide[:, 1:].t().contiguous().t()):
        check((x, weight, b0, Terms(**{slot: Vector(value.detach().requires_grad_())})), strategy=strategy)


@each_strategy
@pytest.mark.parametrize("leading", [(), (3,), (2, 9), (2, 0, 3), (2, 1, 3, 5)], ids=str)
@pytest.mark.parametrize("a", ["lora_3", "constant"])
def test_any_leading_shape(leading, a, strategy):
    call = make((a, "lora_3", "vector", "vector", "vector"), leading=leading)
    with kernels(strategy):
        assert glora_linear(*call).shape == (*leading, RAGGED[1])
    check(call, strategy=strategy)


@each_strategy
@pytest.mark.parametrize("leading", [(4, 5), (2, 3, 4)], ids=str)
def test_leading_dimensions_that_no_view_flattens(leading, strategy):
    x, *others = make(("lora_3", "lora_3", *REST), leading=leading)
    swapped = x.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    check((swapped, *others), strategy=strategy)
    call = (x, *others)
    dy = upstream(call).transpose(0, 1).contiguous().transpose(0, 1)
    check(call, dy, strategy)


@pytest.mark.parametrize("successor", ["sum", "cat", "transpose", "chunk", "expand"])
@each_route
def test_what_successors_send_back(path, product, shape, successor):
    """Stride-0, narrowed and transposed gradients, as autograd makes them."""
    strategy = STRATEGIES[len(successor) % 2]
    follow = {
        "sum": lambda y: y.sum(),
        "cat": lambda y: (torch.cat([y, y * 2], dim=1) ** 2).sum(),
        "transpose": lambda y: (y.t() @ torch.ones(y.shape[0], 2, dtype=y.dtype)).pow(2).sum(),
        "chunk": lambda y: y.chunk(2, dim=1)[0].pow(2).sum(),
        "expand": lambda y: y[None].expand(3, -1, -1).pow(3).sum(),
    }[successor]
    call = make(path, shape, product=product, dtype=torch.float64)
    leaves = leaves_of(call)
    with kernels(strategy), tiles(32, 16, 32):
        got = torch.autograd.grad(follow(glora_linear(*call)), leaves)
    want = torch.autograd.grad(follow(glora_linear(*call)), leaves)
    for g, w in zip(got, want):
        torch.testing.assert_close(g, w, rtol=1e-9, atol=1e-9)


@each_strategy
@pytest.mark.parametrize("order", ["transposed", "rows apart"])
def test_a_strided_call_leaves_the_next_one_alone(order, strategy):
    """Layers of one kind share their plan: what it keeps of a call with strides is not for contiguous operands."""
    calls = [make(("lora_3", "vector", "vector", "vector", "vector"), RAGGED, seed=seed) for seed in range(2)]
    (x, *rest), other = calls
    strided = x.detach().t().contiguous().t() if order == "transposed" else x.detach().repeat(1, 2)[:, : x.shape[1]]
    for call in ((strided.requires_grad_(), *rest), other, calls[0]):
        check(call, strategy=strategy)


# -- offsets beyond 2^31 -----------------------------------------------------------------------------
# The detector of int32 overflow is on. Memory is taken where it is touched only.

FAR = 2**31 // 16 + 5  # from one row to the next: the last of 17 rows begins beyond 2^31


def far_apart(tensor, across=1):
    """The values of a matrix in rows that lie far apart."""
    rows, columns = tensor.shape
    storage = untouched((rows - 1) * FAR + columns * across, tensor.dtype)
    return (
        storage.as_strided((rows, columns), (FAR, across)).copy_(tensor.detach()).requires_grad_(tensor.requires_grad)
    )


def far_columns(tensor):
    return far_apart(tensor.detach().t()).t().requires_grad_(tensor.requires_grad)


@each_strategy
@pytest.mark.parametrize("place", [far_apart, far_columns], ids=["rows", "columns"])
@pytest.mark.parametrize("operand", ["x", "weight", "dy"])
@each_route
def test_offsets_beyond_int32(path, product, shape, operand, place, strategy):
    call = make(path, shape, product=product, dtype=torch.bfloat16)
    (x, weight, *others), dy = call, upstream(call)
    want = oracle(*call, dy)
    x, weight, dy = (place(t) if name == operand else t for name, t in (("x", x), ("weight", weight), ("dy", dy)))
    with tiles(32, 32, 32):
        got = run((x, weight, *others), dy, strategy, overflow=True)
    assert_contract(got, *want, torch.bfloat16)


@each_strategy
@pytest.mark.parametrize("operand", ["x", "weight", "dy"])
def test_the_detector_would_notice(operand, strategy, monkeypatch):
    """With offsets in int32 each of those cases fails."""
    monkeypatch.setattr(schedule, "index_type", lambda *_: torch.int32)
    path, product, shape = ROUTES["projected"]
    (x, weight, *others), dy = (call := make(path, shape, product=product, dtype=torch.bfloat16)), upstream(call)
    x, weight, dy = (far_apart(t) if name == operand else t for name, t in (("x", x), ("weight", weight), ("dy", dy)))
    with tiles(32, 32, 32), kernels(strategy, overflow=True), pytest.raises(InterpreterError, match="int32 overflow"):
        results(glora_linear, x, weight, *others, dy)


@each_strategy
@pytest.mark.parametrize("step", [-1, 0, 1])
def test_int32_is_taken_only_where_whole_blocks_fit(step, strategy):
    """A row that lies beyond the last is masked, but its offset is formed."""
    x, *others = make(("lora_3", "lora_3", "none", "none", "none"), dtype=torch.bfloat16)
    stride = 2**31 // (x.shape[0] + LARGEST_BLOCK) + step
    storage = untouched((x.shape[0] + 1) * stride, x.dtype)
    far = storage.as_strided(x.shape, (stride, 1)).copy_(x.detach()).requires_grad_()
    call = (x, *others)
    with tiles(256, 16, 32):
        got = run((far, *others), upstream(call), strategy, overflow=True)
    assert_contract(got, *oracle(*call, upstream(call)), torch.bfloat16)
