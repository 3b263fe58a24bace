"""The torch backend against the fp64 oracle: values, every gradient, every kind, odd shapes and strides."""

import weakref

import pytest
import torch
from hypothesis import given, note, seed, settings
from hypothesis import strategies as st

from glora_kernels import Constant, LowRank, Terms, Vector, glora_linear
from tests.helpers import (
    ALL_PATHS,
    BIAS_CHOICES,
    PROMPT_CHOICES,
    TEST_SEED,
    WEIGHT_CHOICES,
    assert_contract,
    generator_for,
    make_call,
    oracle,
    results,
    upstream,
)
from tests.tiers import at

PRODUCTS = ("hadamard", "matmul")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
WEIGHT_PAIRS = [(a, b) for a in WEIGHT_CHOICES for b in WEIGHT_CHOICES]


def check(call, dy=None, function=glora_linear):
    dy = upstream(call) if dy is None else dy
    return assert_contract(results(function, *call, dy), *oracle(*call, dy), call[0].dtype)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("product", PRODUCTS)
def test_every_path_equals_the_oracle(product, bias):
    """All 900 paths of two ranks; what a sliced rank does not read is NaN in every storage."""
    for path in ALL_PATHS:
        call = make_call(path, bias=bias, product=product)
        dy = upstream(call)
        got = results(glora_linear, *call, dy)
        want, _ = oracle(*call, dy)
        for name, expected in want.items():
            if expected is None:
                assert got[name] is None, (path, name)
            else:
                torch.testing.assert_close(got[name], expected, rtol=0, atol=1e-10, msg=f"{path} {name}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize(("a", "b"), WEIGHT_PAIRS)
def test_numerical_contract(a, b, product, dtype):
    for draw in range(4):
        check(make_call((a, b, "lora_3", "vector", "constant"), (17, 19, 23), product=product, dtype=dtype, seed=draw))


@seed(TEST_SEED)
@settings(max_examples=at(500, 20_000), deadline=None, database=None)
@given(
    path=st.tuples(
        *(st.sampled_from(choices) for choices in (*[WEIGHT_CHOICES] * 2, PROMPT_CHOICES, *[BIAS_CHOICES] * 2))
    ),
    shape=st.tuples(st.integers(0, 48), st.integers(1, 48), st.integers(1, 48)),
    bias=st.booleans(),
    product=st.sampled_from(PRODUCTS),
    dtype=st.sampled_from(DTYPES),
    fp32_terms=st.booleans(),
    order=st.sampled_from(["contiguous", "transposed", "sliced", "expanded"]),
    draw=st.integers(0, 2**20),
)
def test_generated_calls_keep_the_contract(path, shape, bias, product, dtype, fp32_terms, order, draw):
    terms_dtype = torch.float32 if fp32_terms and dtype != torch.float64 else dtype
    x, weight, b0, terms = make_call(
        path, shape, bias=bias, product=product, dtype=dtype, terms_dtype=terms_dtype, seed=draw
    )
    dy = strided(upstream((x, weight), draw), order)
    x = strided(x.detach(), "transposed" if order == "expanded" else order).requires_grad_()
    worst = check((x, weight, b0, terms), dy)
    note(f"worst constant {worst:.2f}")


def strided(tensor, order):
    """The same values (one row for all where expanded) behind other strides."""
    if order == "transposed":
        return tensor.t().contiguous().t()
    if order == "sliced":
        padded = torch.full((tensor.shape[0] + 2, 2 * tensor.shape[1] + 1), torch.nan, dtype=tensor.dtype)
        padded[1:-1, 1::2] = tensor
        return padded[1:-1, 1::2]
    return tensor[:1].expand_as(tensor) if order == "expanded" else tensor


@pytest.mark.parametrize("leading", [(), (3,), (2, 3), (2, 0, 3), (2, 1, 3, 2)], ids=str)
@pytest.mark.parametrize("a", ["lora_3", "vector", "constant", "none"])
def test_any_leading_shape(leading, a):
    call = make_call((a, "lora_3", "vector", "vector", "vector"), leading=leading)
    y = glora_linear(*call)
    assert y.shape == (*leading, 7)
    check(call)


@pytest.mark.parametrize(
    "path", [("lora_1", "vector"), ("vector", "lora_1"), ("constant", "constant"), ("none", "none")]
)
@pytest.mark.parametrize("shape", [(0, 7, 6), (5, 0, 6), (5, 7, 0), (1, 1, 1)], ids=str)
@pytest.mark.parametrize("product", PRODUCTS)
def test_empty_and_single(shape, path, product):
    """No tokens, outputs or inputs: shapes hold and gradients are zeros, as for F.linear."""
    if 0 in shape[1:] and "constant" in path:
        pytest.skip("a constant of an empty storage has no element to read")
    check(make_call((*path, "vector", "vector", "vector"), shape, product=product))


@pytest.mark.parametrize("successor", ["sum", "cat", "transpose", "chunk", "expand"])
@pytest.mark.parametrize("a", ["lora_3", "vector", "constant"])
def test_gradients_arrive_through_any_strides(a, successor):
    """Stride-0, transposed and narrowed gradients of the output."""
    follow = {
        "sum": lambda y: y.sum(),
        "cat": lambda y: (torch.cat([y, y * 2]) ** 2).sum(),
        "transpose": lambda y: (y.t() @ torch.ones(y.shape[0], 2, dtype=y.dtype)).pow(2).sum(),
        "chunk": lambda y: y.chunk(2, dim=1)[0].pow(2).sum(),
        "expand": lambda y: y[None].expand(3, -1, -1).pow(3).sum(),
    }[successor]
    call = make_call((a, "lora_3", "vector", "vector", "vector"))
    leaves = [call[0], *call[3].flatten()[0]]
    got = torch.autograd.grad(follow(glora_linear(*call)), leaves)
    from glora_kernels import reference

    want = torch.autograd.grad(follow(reference.glora_linear(*call)), leaves)
    for g, w in zip(got, want):
        torch.testing.assert_close(g, w, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize(("a", "b"), WEIGHT_PAIRS)
def test_gradcheck_and_gradgradcheck(a, b, product):
    x, weight, b0, terms = make_call((a, b, "lora_3", "vector", "constant"), (3, 4, 5), product=product)
    storages, structure = terms.map(lambda s: s.detach().nan_to_num(0.3)).flatten()
    leaves = [x, *(storage.requires_grad_() for storage in storages)]

    def function(x, *storages):
        return glora_linear(x, weight, b0, Terms.unflatten(storages, structure))

    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize(("a", "b"), [("lora_3", "vector"), ("vector", "vector"), ("constant", "constant")])
def test_gradgradcheck_where_only_sums_of_x_are_kept(a, b, product):
    """A is there and frozen: second derivatives reach what x was computed from, which is no leaf."""
    x, weight, b0, terms = make_call((a, b, "lora_3", "vector", "constant"), (3, 4, 5), product=product)
    storages, structure = terms.map(lambda s: s.detach().nan_to_num(0.3)).flatten()
    frozen = len(terms.A.storages)
    leaves = [x, *(storage.requires_grad_() for storage in storages[frozen:])]

    def function(x, *rest):
        return glora_linear(x * x, weight, b0, Terms.unflatten((*storages[:frozen], *rest), structure))

    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


def test_double_backward_of_a_bias_path():
    """Nothing of x is kept where neither A nor B is there, and dx depends on dy still."""
    x, weight, b0, terms = make_call(("none", "none", "lora_3", "vector", "vector"))
    y = glora_linear(x, weight, b0, terms)
    dy = torch.ones_like(y, requires_grad=True)
    (dx,) = torch.autograd.grad(y, x, dy, create_graph=True)
    (ddy,) = torch.autograd.grad(dx.sum(), dy)
    torch.testing.assert_close(ddy, weight.sum(1).expand_as(dy))


@pytest.mark.parametrize(
    "path",
    [("lora_3", "lora_3"), ("vector", "lora_1"), ("constant", "vector"), ("none", "lora_1"), ("lora_3", "vector")],
)
@pytest.mark.parametrize("product", PRODUCTS)
def test_only_needed_gradients_are_computed(path, product):
    """Every subset of the tensors that want a gradient: those get the oracle's, the others None."""
    x, weight, b0, terms = make_call((*path, "vector", "vector", "vector"), product=product)
    storages, structure = terms.flatten()
    leaves = [x, *storages]
    dy = upstream((x, weight))
    for subset in range(2 ** len(leaves)):
        for index, leaf in enumerate(leaves):
            leaf.requires_grad_(bool(subset >> index & 1))
        call = (x, weight, b0, Terms.unflatten(storages, structure))
        got, (want, _) = results(glora_linear, *call, dy), oracle(*call, dy)
        assert got.keys() == want.keys()
        for name, expected in want.items():
            torch.testing.assert_close(got[name], expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("path", [("lora_3", "lora_3"), ("vector", "lora_1"), ("constant", "vector")])
def test_inputs_are_left_as_they_are(path):
    call = make_call((*path, "vector", "vector", "vector"))
    tensors = [call[0], call[1], call[2], *call[3].flatten()[0]]
    before = [(t.detach().clone(), t._version) for t in tensors]
    glora_linear(*call).sum().backward()
    for tensor, (value, version) in zip(tensors, before):
        assert tensor._version == version
        assert torch.equal(tensor.detach().nan_to_num(), value.nan_to_num())


def test_second_backward_gives_the_same():
    call = make_call(("vector", "lora_3", "vector", "vector", "vector"), (80, 7, 70))
    y, dy = glora_linear(*call), upstream(call)
    leaves = [call[0], *call[3].flatten()[0]]
    first = torch.autograd.grad(y, leaves, dy, retain_graph=True)
    second = torch.autograd.grad(y, leaves, dy)
    for one, other in zip(first, second):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-10)


def test_same_call_same_bits():
    call = make_call(("vector", "lora_3", "lora_1", "vector", "vector"), (130, 40, 70), dtype=torch.float32)
    dy = upstream(call)
    first = results(glora_linear, *call, dy)
    for _ in range(20):
        again = results(glora_linear, *call, dy)
        assert all(torch.equal(first[name], again[name]) for name in first)


# -- A as a vector: its gradient from the output ---------------------------------------------------

REUSED = (256, 24, 96)  # large enough for the output to be reused


def vector_call(dtype, b="lora_3", bias_scale=1.0, shape=REUSED):
    x, weight, b0, terms = make_call(("vector", b, "vector", "vector", "vector"), shape, dtype=dtype)
    return x, weight, b0 * bias_scale, terms


@pytest.mark.parametrize("b", WEIGHT_CHOICES)
@pytest.mark.parametrize("bias_scale", [0.0, 1.0, 30.0, 3000.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_contract_where_the_output_is_reused(dtype, bias_scale, b):
    """Also where the bias or B dwarf what A scales, so that rows have to be formed anew."""
    check(vector_call(dtype, b, bias_scale))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [0.0, 1e-6, 1e-3, -1e-2])
def test_contract_near_a_of_minus_one(dtype, scale):
    """s = 1 + a near 0: A's gradient cannot be solved from an output that it hardly reaches."""
    x, weight, b0, terms = vector_call(dtype)
    with torch.no_grad():
        terms.A.value[::2, 0] = scale - 1
    check((x, weight, b0, terms))


@pytest.mark.parametrize("spread", [0.02, 0.3, 3.0])
@pytest.mark.parametrize("scale", [1.0, 0.1])
@pytest.mark.parametrize("b", ["lora_3", "vector", "constant"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_contract_after_a_layer_norm(dtype, b, scale, spread):
    """Inputs of mean zero: x B^T of a vector or constant B cancels, the rounding errors of its terms do not."""
    x, weight, b0, terms = make_call(("vector", b, "none", "none", "none"), (256, 24, 96), dtype=dtype)
    gen = generator_for("layer norm", b, scale, spread)
    tokens = torch.randn(256, 96, generator=gen) * 0.5 + torch.randn(96, generator=gen)
    x = torch.nn.functional.layer_norm(tokens, (96,)).to(dtype).requires_grad_()
    with torch.no_grad():
        terms.A.value.mul_(0.02).add_(scale - 1)
        terms.B.storages[0].mul_(2 * spread)
    dy = torch.randn(256, 24, generator=gen) + torch.randn(24, generator=gen)
    check((x, weight * 0.02, b0 * 0.1, terms), (0.1 * dy).to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_contract_for_a_gradient_of_few_tokens(dtype):
    """As from a loss on class tokens: most tokens carry no gradient."""
    call = vector_call(dtype)
    dy = upstream(call)
    dy[torch.arange(len(dy)) % 37 != 5] = 0
    check(call, dy)


@pytest.mark.parametrize("leading", [None, (4, 64), (2, 2, 64)], ids=str)
def test_output_changed_in_place_is_noticed(leading):
    """nn.ReLU(inplace=True) after the layer works, as after nn.Linear."""
    call = vector_call(torch.float64)
    if leading is not None:
        x = torch.randn(*leading, call[0].shape[-1], dtype=torch.float64, requires_grad=True)
        call = (x, *call[1:])
    leaves = [call[0], *call[3].flatten()[0]]
    y = glora_linear(*call)
    got = torch.autograd.grad(torch.relu_(y).sum(), leaves)
    want = torch.autograd.grad(torch.relu(glora_linear(*call)).sum(), leaves)
    for g, w in zip(got, want):
        torch.testing.assert_close(g, w, rtol=1e-9, atol=1e-9)


def test_input_changed_in_place_raises():
    call = vector_call(torch.float64)
    x = call[0].detach().clone().requires_grad_()
    inner = x * 1
    y = glora_linear(inner, *call[1:])
    inner.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("b", ["vector", "constant"])
def test_sums_of_x_serve_in_its_place(b, dtype, monkeypatch):
    """The same bits as from x, which is freed with the forward pass and may be overwritten after it."""
    x, weight, b0, terms = make_call(("none", b, "lora_3", "vector", "vector"), (66, 19, 70), dtype=dtype)
    x = x.reshape(2, 33, 70)
    leaves = [x, *terms.flatten()[0]]
    dy = upstream((x, weight))
    inner = x * 1
    y = glora_linear(inner, weight, b0, terms)
    inner.detach().fill_(torch.nan)
    freed = weakref.ref(inner)
    del inner
    assert freed() is None
    got = torch.autograd.grad(y, leaves, dy)
    monkeypatch.setattr("glora_kernels._torch.plans.reads_token_sums", lambda *_: False)
    inner = x * 1
    y = glora_linear(inner, weight, b0, terms)
    freed = weakref.ref(inner)
    del inner
    assert freed() is not None
    assert all(torch.equal(g, w) for g, w in zip(got, torch.autograd.grad(y, leaves, dy)))


def test_input_gets_one_gradient_where_only_its_sums_are_kept():
    """Hooks of x run once, with the whole gradient."""
    x, weight, b0, terms = make_call(("none", "vector", "none", "none", "none"))
    seen = []
    inner = x * 1
    inner.register_hook(seen.append)
    dy = upstream((x, weight))
    glora_linear(inner, weight, b0, terms).backward(dy)
    assert len(seen) == 1
    torch.testing.assert_close(seen[0], dy @ (weight + terms.B.entries[:, None]))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing(use_reentrant):
    from torch.utils.checkpoint import checkpoint

    call = vector_call(torch.float64)
    leaves = [call[0], *call[3].flatten()[0]]

    def block(x):
        return torch.relu_(glora_linear(x, *call[1:]))

    for leaf in leaves:
        leaf.grad = None
    checkpoint(block, call[0], use_reentrant=use_reentrant).sum().backward()
    want = torch.autograd.grad(torch.relu(glora_linear(*call)).sum(), leaves)
    for leaf, w in zip(leaves, want):
        torch.testing.assert_close(leaf.grad, w, rtol=1e-9, atol=1e-9)


# -- how it is called ------------------------------------------------------------------------------


def test_no_grad_and_inference_mode():
    call = make_call(("vector", "lora_3", "vector", "vector", "vector"))
    want = glora_linear(*call).detach()
    with torch.no_grad():
        assert torch.equal(glora_linear(*call), want)
    with torch.inference_mode():
        assert torch.equal(glora_linear(*call), want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype):
    """As for F.linear: x, W0 and b0 are cast; the fp32 terms stay, and so do their gradients."""
    x, weight, b0, terms = make_call(
        ("lora_3", "lora_3", "vector", "vector", "vector"), (17, 19, 23), dtype=torch.float32
    )
    dy = upstream((x.to(dtype), weight))
    with torch.autocast("cpu", dtype):
        y = glora_linear(x, weight, b0, terms)
    assert y.dtype == dtype
    leaves = [x, *terms.flatten()[0]]
    got = torch.autograd.grad(y, leaves, dy)
    assert all(g.dtype == torch.float32 for g in got)
    cast = (x.detach().to(dtype).requires_grad_(), weight.to(dtype), b0.to(dtype), terms)
    want = results(glora_linear, *cast, dy)
    assert torch.equal(y, want["y"])
    for g, (name, w) in zip(got, [(n, w) for n, w in want.items() if n != "y"]):
        assert torch.equal(g, w.float()), name


@pytest.mark.parametrize("a", ["lora_3", "vector", "constant", "none"])
def test_backward_inside_autocast(a):
    """The same bits as outside, where it belongs; nn.Linear allows it too."""
    x, weight, b0, terms = make_call((a, "lora_3", "vector", "vector", "vector"), REUSED, dtype=torch.float32)
    leaves = [x, *terms.flatten()[0]]
    grads = []
    for inside in (True, False):
        with torch.autocast("cpu", torch.bfloat16):
            y = glora_linear(x, weight, b0, terms)
            dy = torch.ones_like(y)
            if inside:
                grads.append(torch.autograd.grad(y, leaves, dy))
        if not inside:
            grads.append(torch.autograd.grad(y, leaves, dy))
    assert all(torch.equal(one, other) for one, other in zip(*grads))


@pytest.mark.parametrize("shape", [(5, 7, 6), REUSED], ids=str)
@pytest.mark.parametrize("b", ["lora_3", "vector"])
@pytest.mark.parametrize("a", ["lora_3", "vector", "constant", "none"])
def test_batched_gradients(a, b, shape):
    call = make_call((a, b, "vector", "vector", "vector"), shape)
    leaves = [call[0], *call[3].flatten()[0]]
    batch = torch.stack([upstream(call, seed) for seed in range(3)])
    got = torch.autograd.grad(glora_linear(*call), leaves, batch, is_grads_batched=True)
    for index, dy in enumerate(batch):
        for g, w in zip(got, torch.autograd.grad(glora_linear(*call), leaves, dy)):
            torch.testing.assert_close(g[index], w, rtol=1e-9, atol=1e-9)


def test_what_hooks_have_offloaded_is_not_kept():
    """A storage that is no leaf dies with its maker, where hooks have taken it away for backward."""
    x, weight, b0, terms = make_call(("lora_3", "none", "none", "none", "vector"))
    masked = 2 * terms.A.down
    gone = weakref.ref(masked)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach().clone(), lambda t: t):
        y = glora_linear(x, weight, b0, Terms(A=LowRank(masked, terms.A.up, 3), E=terms.E))
    del masked
    assert gone() is None
    y.sum().backward()
    assert terms.A.down.grad[:, :3].isfinite().all()


def test_fake_tensors():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        value = torch.randn(24, requires_grad=True)
        glora_linear(torch.randn(256, 96), torch.randn(24, 96), None, Terms(A=Vector(value))).sum().backward()
        assert value.grad.shape == (24,)


def test_func_transforms_and_forward_mode():
    x, weight, b0, terms = make_call(("lora_3", "vector", "vector", "vector", "vector"))
    y = glora_linear(x, weight, b0, terms)
    function = lambda row: glora_linear(row, weight, b0, terms)  # noqa: E731
    torch.testing.assert_close(torch.func.vmap(function)(x), y)
    torch.testing.assert_close(torch.func.jacrev(function)(x[0]), torch.func.jacfwd(function)(x[0]))
    tangent = torch.ones_like(x)
    _, expected = torch.func.jvp(function, (x.detach(),), (tangent,))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x.detach(), tangent)
        found = torch.autograd.forward_ad.unpack_dual(function(dual)).tangent
    torch.testing.assert_close(found, expected)
    assert expected.abs().max() > 0


def test_meta_tensors():
    with torch.device("meta"):
        x = torch.empty(100, 96, requires_grad=True)
        weight, b0 = torch.empty(24, 96), torch.empty(24)
        terms = Terms(
            A=Vector(torch.empty(24, requires_grad=True)), B=LowRank(torch.empty(24, 4), torch.empty(4, 96), 2)
        )
    y = glora_linear(x, weight, b0, terms)
    y.sum().backward()
    assert (y.shape, y.device.type, terms.A.value.grad.shape) == ((100, 24), "meta", (24,))


def test_constants_are_one_number():
    """A constant reads one element of its storage, whatever the shape of the storage."""
    x, weight, b0, _ = make_call(("none",) * 5)
    for shape in ((), (1,), (3,), (4, 2)):
        value = torch.full(shape, 0.25, dtype=torch.float64, requires_grad=True)
        glora_linear(x, weight, b0, Terms(A=Constant(value))).sum().backward()
        assert value.grad.shape == shape
        assert value.grad.count_nonzero() == 1
