"""The extension's whole layer against the fp64 oracle: plan, arithmetic of the kernels and autograd, on a CPU."""

import itertools

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import glora
from glora_kernels import LowRank, Terms, configured_linear, encode, explain, glora_linear, glora_merge, use_backend
from tests.helpers import (
    ALL_PATHS,
    WEIGHT_CHOICES,
    assert_contract,
    generator_for,
    make_call,
    oracle,
    results,
    unwritten_is_nan,
    upstream,
)

pytestmark = pytest.mark.usefixtures("backend")
PRODUCTS = ("hadamard", "matmul")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
PAIRS = list(itertools.product(WEIGHT_CHOICES, WEIGHT_CHOICES))
PATH = ("lora_3", "vector", "lora_3", "vector", "constant")


def check(call, dy=None):
    dy = upstream(call) if dy is None else dy
    return assert_contract(results(glora_linear, *call, dy), *oracle(*call, dy), call[0].dtype)


def test_calls_go_to_the_extension():
    y = glora_linear(*make_call(PATH))
    assert "CppFunction" in type(y.grad_fn).__name__
    assert explain(*make_call(PATH)).backend == "cuda"


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("product", PRODUCTS)
def test_every_path_equals_the_oracle(product, bias):
    """All 900 paths of two ranks; what a sliced rank does not read is NaN in every storage."""
    for path in ALL_PATHS:
        call = make_call(path, bias=bias, product=product)
        dy = upstream(call)
        got, (want, _) = results(glora_linear, *call, dy), oracle(*call, dy)
        for name, expected in want.items():
            assert (got[name] is None) == (expected is None), (path, name)
            if expected is not None:
                torch.testing.assert_close(got[name], expected, rtol=0, atol=1e-10, msg=f"{path} {name}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("product", PRODUCTS)
def test_numerical_contract(product, dtype):
    """Rows and columns that fill no tile; more rows than a chunk of partial sums."""
    for index, (a, b) in enumerate(PAIRS):
        shape = ((17, 19, 23), (33, 300, 40))[index % 2]
        check(make_call((a, b, "lora_3", "vector", "constant"), shape, product=product, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_fp32_terms_on_a_half_base(dtype):
    for a, b in PAIRS:
        check(make_call((a, b, "lora_3", "vector", "vector"), (17, 19, 23), dtype=dtype, terms_dtype=torch.float32))


@pytest.mark.parametrize("rank", [8, 9, 20])
def test_ranks_above_those_of_one_pass(rank):
    gen = generator_for("rank", rank)
    randn = lambda *size: torch.randn(*size, generator=gen, dtype=torch.float64)  # noqa: E731
    slots = {slot: LowRank(randn(13, rank).requires_grad_(), randn(rank, 11).requires_grad_()) for slot in "AB"}
    check((randn(5, 11).requires_grad_(), randn(13, 11), None, Terms(**slots)))


@pytest.mark.parametrize("leading", [(), (3,), (2, 3), (0,), (2, 0, 3)], ids=str)
@pytest.mark.parametrize("product", PRODUCTS)
def test_any_leading_shape(leading, product):
    for path in (PATH, ("constant", "lora_1", "vector", "none", "vector")):
        check(make_call(path, product=product, leading=leading))


@pytest.fixture
def poisoned_memory():
    with unwritten_is_nan():
        yield


@pytest.mark.parametrize("shape", [(3, 0, 5), (3, 5, 0), (3, 0, 0)], ids=str)
@pytest.mark.parametrize("product", PRODUCTS)
def test_empty_weights(shape, product, poisoned_memory):
    """Gradients of what meets nothing are zero, in memory that was written."""
    for a, b in itertools.product(("lora_3", "vector", "none"), repeat=2):
        call = make_call((a, b, "lora_3", "vector", "vector"), shape, product=product)
        dy = upstream(call)
        with use_backend("torch"):
            want = results(glora_linear, *call, dy)
        torch.testing.assert_close(results(glora_linear, *call, dy), want)


def test_any_strides():
    x, weight, bias, terms = make_call(PATH, (6, 8, 12), dtype=torch.float32)
    wide = torch.randn(8, 24)
    negative = torch.view_as_complex(torch.randn(8, 12, 2)).conj().imag
    for other in (weight.t().contiguous().t(), wide[:, ::2], wide[:, 1:13], negative):
        call = (x.detach().t().contiguous().t().requires_grad_(), other, bias, terms)
        check(call)
        check(call, torch.ones(8).expand(6, 8))


def test_vectors_of_memory_are_taken_where_they_fit(extension):
    assert extension.takes_vectors(768, 768, 2, 4096)
    assert extension.takes_vectors(4, 8, 4, 16)
    assert not extension.takes_vectors(767, 768, 2, 4096)
    assert not extension.takes_vectors(768, 770, 2, 4096)
    assert not extension.takes_vectors(768, 768, 2, 4098)


@pytest.mark.parametrize("shape", [(1, 1), (128, 64), (3072, 768), (768, 3072), (11008, 4096), (129, 100_000)])
def test_partial_sums_cover_all_rows_and_stay_small(extension, shape):
    rows, columns = shape
    chunk, chunks = extension.plan_contraction(rows, columns)
    assert (chunks - 1) * chunk < rows <= chunks * chunk
    assert chunks * 8 * columns <= max(rows * columns / 16, 8 * columns)


@pytest.mark.parametrize("product", PRODUCTS)
def test_dense_products_are_those_of_the_plan(product):
    """Counted by PyTorch, which does not see the kernels' own contractions; those are thin."""
    for a, b in PAIRS:
        call = make_call((a, b, "none", "none", "none"), (400, 320, 240), product=product)
        plan = explain(*call)
        with FlopCounterMode(display=False) as counter:
            y = glora_linear(*call)
        forward = counter.get_total_flops()
        with FlopCounterMode(display=False) as counter:
            y.sum().backward()
        unit = 2 * 400 * 320 * 240
        assert round(forward / unit) == plan.forward_units, (a, b)
        assert round(counter.get_total_flops() / unit) == plan.backward_units, (a, b)
        assert counter.get_total_flops() <= plan.backward_flops * 1.01


def test_only_what_is_wanted():
    """Frozen storages get no gradient, and where neither A nor B wants one x is not kept."""
    x, weight, bias, terms = make_call(PATH)
    terms.A.down.requires_grad_(False)
    terms.E.value.requires_grad_(False)
    call = (x, weight, bias, terms)
    check(call)
    check((x.detach(), *call[1:]))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        glora_linear(*make_call(("none", "none", "lora_3", "vector", "vector")))
        only_bias = list(kept)
        y = glora_linear(x, weight, bias, terms)
    assert x.data_ptr() in kept and x.data_ptr() not in only_bias
    assert y.data_ptr() not in kept


def test_without_a_gradient():
    with torch.no_grad():
        y = glora_linear(*make_call(PATH))
    assert y.grad_fn is None
    torch.testing.assert_close(y, glora_linear(*make_call(PATH)).detach())


@pytest.mark.parametrize("product", PRODUCTS)
def test_backward_inside_of_autocast(product):
    """In the types that forward ran in: autocast casts x and W0 once, and nothing of the backward pass."""
    call = make_call(("lora_3", "lora_1", "lora_3", "vector", "vector"), product=product, dtype=torch.float32)
    storages = call[3].flatten()[0]
    found = []
    for backend in ("cuda", "torch"):
        with use_backend(backend), torch.autocast("cpu", torch.bfloat16):
            y = glora_linear(*call)
            found.append([y, *torch.autograd.grad(y.float().sin().sum(), [call[0], *storages])])
    for got, want in zip(*found):
        assert got.dtype == want.dtype
        torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)
    y = glora_linear(*call)
    outside = torch.autograd.grad(y.sum(), storages, retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        inside = torch.autograd.grad(y.sum(), storages)
    assert all(torch.equal(a, b) for a, b in zip(inside, outside))


def test_second_derivatives_are_refused():
    call = make_call(PATH)
    y = glora_linear(*call)
    with pytest.raises(NotImplementedError, match=r"'cuda' has no second derivatives; use_backend\('torch'\) has"):
        torch.autograd.grad(y.sum(), call[0], create_graph=True)


def test_batched_gradients_are_refused():
    """Whatever would be computed: with the gradients of constants alone no kernel would have noticed."""
    for path in (PATH, ("none", "none", "none", "none", "vector")):
        x, weight, bias, terms = make_call(path)
        y = glora_linear(x, weight, bias, terms)
        grad = lambda dy: torch.autograd.grad(y, terms.E.value, dy, retain_graph=True)[0]  # noqa: B023, E731
        with pytest.raises(
            NotImplementedError, match=r"'cuda' takes no batched gradients; use_backend\('torch'\) does"
        ):
            torch.autograd.grad(y, terms.E.value, torch.ones(3, *y.shape), is_grads_batched=True)
        with pytest.raises(NotImplementedError, match="takes no batched gradients"):
            torch.func.vmap(grad)(torch.ones(3, *y.shape))


@pytest.mark.parametrize("leading", [(4,), (2, 3)], ids=str)
def test_a_successor_may_overwrite_the_output(leading):
    call = make_call(("vector", "lora_3", "none", "none", "vector"), leading=leading)
    got = results(lambda *c: F.relu(glora_linear(*c), inplace=True), *call, upstream(call))
    with use_backend("reference"):
        want = results(lambda *c: F.relu(glora_linear(*c)), *call, upstream(call))
    for name in want:
        torch.testing.assert_close(got[name], want[name])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("product", PRODUCTS)
def test_merged_weights_are_the_bits_multiplied_by(product, dtype):
    for a, b in PAIRS:
        x, weight, bias, terms = make_call((a, b, "lora_3", "vector", "constant"), product=product, dtype=dtype)
        merged = glora_merge(weight, bias, terms, safe=False)
        assert torch.equal(F.linear(x, *merged), glora_linear(x, weight, bias, terms))


def test_the_operator_for_compilers():
    gen = generator_for("operator")
    randn = lambda *size: torch.randn(*size, generator=gen, dtype=torch.float64, requires_grad=True)  # noqa: E731
    shapes = ((7, 4), (4, 6), (7, 4), (4, 6), (6, 4), (4, 1), (7,), (7,))
    x, weight, bias, storages = randn(5, 6), randn(7, 6).detach(), randn(7).detach(), [randn(*s) for s in shapes]
    config = encode({"A": ("lora", 3), "B": ("vector", 0), "C": ("lora", 2), "E": ("vector", 0)})
    found = []
    for backend in ("cuda", "torch"):
        with use_backend(backend):
            y = configured_linear(x, weight, bias, storages, config)
            found.append([y, *torch.autograd.grad(y.sin().sum(), [x, *storages])])
    for got, want in zip(*found):
        torch.testing.assert_close(got, want)


def test_a_supernet_layer_trains_as_on_the_torch_backend():
    layer = glora.GLoRALinear(6, 5, rank=4)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 6)
    for _ in range(20):
        layer.path = glora.SearchSpace((4, 2)).sample(generator)
        grads = []
        for backend in ("cuda", "torch"):
            with use_backend(backend):
                layer.zero_grad()
                layer(x).square().sum().backward()
                grads.append({name: p.grad for name, p in layer.named_parameters() if p.grad is not None})
        assert grads[0].keys() == grads[1].keys()
        for name, grad in grads[1].items():
            torch.testing.assert_close(grads[0][name], grad)


def test_bad_arguments_of_the_module(extension):
    storages, weight = [None] * 8, torch.randn(3, 2)
    with pytest.raises(ValueError, match="config: expected kind and rank of five slots, got 4"):
        extension.assemble(weight, None, storages, [0] * 4, False)
    with pytest.raises(ValueError, match="config: expected kinds of 0 to 3, got 7"):
        extension.assemble(weight, None, storages, [7] + [0] * 9, False)
    with pytest.raises(ValueError, match="config: expected no low rank of D or E"):
        extension.assemble(weight, None, storages, [0] * 6 + [3, 1, 0, 0], False)
    with pytest.raises(ValueError, match="storages: expected every one that is read, got none for slot B"):
        extension.assemble(weight, None, storages, [0, 0, 2, 0] + [0] * 6, False)
