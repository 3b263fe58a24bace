"""How the kernels are called: twice, with few gradients wanted, with no tokens, under autocast."""

import weakref

import pytest
import torch

from glora_kernels import Constant, LowRank, Terms, Vector, glora_linear, recompute_inputs, use_backend
from glora_kernels.ops import recompute
from tests.helpers import oracle, results
from tests.interpreter.cases import (
    KINDS,
    PRODUCTS,
    RAGGED,
    REUSED,
    STRATEGIES,
    check,
    kernels,
    leaves_of,
    make,
    rest,
    run,
    tiles,
    upstream,
    watched,
)

ALL = ("vector", "vector", "vector")
each_strategy = pytest.mark.parametrize("strategy", STRATEGIES)
each_product = pytest.mark.parametrize("product", PRODUCTS)


@each_strategy
def test_kernels_are_what_runs(strategy):
    """Not a fallback: nothing else in this suite would notice."""
    call = make(("lora_3", "lora_3", *ALL))
    with watched() as found:
        check(call, strategy=strategy)
    names = {"assemble": {"assemble_kernel"}, "fused": {"fused_kernel"}}[strategy]
    assert {launched.kernel for launched in found} == names | {"token_pass_kernel", "contract_kernel", "finish_kernel"}


@each_strategy
@each_product
@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 1, 6), (5, 7, 1), (1, 7, 6), (16, 16, 16), (33, 1, 1)], ids=str)
def test_single_rows_and_columns(shape, product, strategy):
    for a, b in (("lora_1", "lora_3"), ("vector", "constant"), ("constant", "vector"), ("none", "lora_1")):
        check(make((a, b, *ALL), shape, product=product), strategy=strategy)


@each_strategy
@each_product
@pytest.mark.parametrize("shape", [(0, 7, 6), (5, 0, 6), (5, 7, 0)], ids=str)
@pytest.mark.parametrize("a", ["lora_1", "vector", "none"])
def test_nothing_to_compute(a, shape, product, strategy):
    """Shapes hold and gradients are zeros, as for F.linear; nothing is launched."""
    with watched() as found:
        check(make((a, "lora_1", *ALL), shape, product=product), strategy=strategy)
    assert not found


@each_strategy
@pytest.mark.parametrize(
    ("path", "product", "shape"),
    [
        (("lora_3", "lora_3", "vector", "none", "none"), "hadamard", (5, 7, 6)),
        (("lora_3", "lora_1", "none", "none", "vector"), "matmul", (5, 7, 6)),
        (("vector", "lora_1", "none", "vector", "none"), "hadamard", (5, 7, 6)),
        (("vector", "lora_1", "none", "none", "constant"), "hadamard", (64, 7, 64)),
        (("constant", "vector", "vector", "constant", "none"), "matmul", (5, 7, 6)),
        (("vector", "lora_1", "none", "none", "none"), "matmul", (5, 7, 6)),
        (("none", "lora_1", "lora_1", "none", "none"), "hadamard", (5, 7, 6)),
    ],
)
def test_only_needed_gradients_are_computed(path, product, shape, strategy):
    """Every subset of x and the terms that want a gradient: those get the oracle's, the others None."""
    x, weight, b0, terms = make(path, shape, product=product, dtype=torch.float64)
    storages, structure = terms.flatten()
    leaves = [x, *storages]
    dy = upstream((x, weight))
    names = ["x", *(f"{slot}{i}" for slot, term in terms.active for i in range(len(term.storages)))]
    want, _ = oracle(x, weight, b0, terms, dy)
    slots = ["x", *(slot for slot, _ in terms.active)]
    for subset in range(1, 2 ** len(slots)):
        wanted = {slot for index, slot in enumerate(slots) if subset >> index & 1}
        for name, leaf in zip(names, leaves):
            leaf.requires_grad_(name[0] in wanted)
        with tiles(64, 16, 64):
            got = run((x, weight, b0, Terms.unflatten(storages, structure)), dy, strategy)
        assert got.keys() == {"y", *(name for name, leaf in zip(names, leaves) if leaf.requires_grad)}
        for name, found in got.items():
            torch.testing.assert_close(found, want[name], rtol=1e-10, atol=1e-10, msg=f"{subset:b} {name}")


@each_strategy
def test_one_factor_of_a_term_may_want_a_gradient(strategy):
    """Then the other gets none."""
    for product, kept in (("hadamard", 0), ("hadamard", 1), ("matmul", 0), ("matmul", 1)):
        call = make(("lora_3", "lora_3", "lora_1", "none", "none"), product=product)
        storages = call[3].flatten()[0]
        for index, storage in enumerate(storages):
            storage.requires_grad_(index % 2 == kept)
        check(call, strategy=strategy)


def test_tensors_that_want_no_gradient_get_none():
    """As seen by the autograd engine, which is handed one entry for each tensor."""
    x, weight, b0, terms = make(("lora_3", "vector", *ALL))
    terms.A.down.requires_grad_(False)
    terms.E.value.requires_grad_(False)
    with kernels("fused"):
        glora_linear(x, weight, b0, terms).sum().backward()
    for tensor in (x, *terms.flatten()[0]):
        assert (tensor.grad is not None) == tensor.requires_grad
    assert weight.grad is None and b0.grad is None


@each_strategy
def test_no_bias_no_gradient_of_d(strategy):
    x, weight, _, terms = make(("lora_3", "none", "none", "vector", "vector"), bias=False)
    assert run((x, weight, None, terms), upstream((x, weight)), strategy)["D0"] is None


@each_strategy
@each_product
@pytest.mark.parametrize("a", KINDS)
def test_same_call_same_bits(a, product, strategy):
    """Forward and all gradients, on every route."""
    for shape, b, dtype in ((RAGGED, "lora_3", torch.bfloat16), (REUSED, "vector", torch.float32)):
        call = make((a, b, *rest(KINDS.index(a))), shape, product=product, dtype=dtype)
        dy = upstream(call)
        with tiles(32, 16, 32):
            first, second = run(call, dy, strategy), run(call, dy, strategy)
        for name, value in first.items():
            assert value is None or torch.equal(value, second[name]), name


@each_strategy
def test_gradients_accumulate_and_can_be_changed(strategy):
    """They are parts of one buffer: what is done to one must leave the others alone."""
    call = make(("lora_3", "lora_3", *ALL))
    leaves = leaves_of(call)
    for _ in range(2):
        with kernels(strategy):
            glora_linear(*call).sum().backward()
    want = [leaf.grad.clone() for leaf in leaves]
    leaves[1].grad.mul_(3)
    leaves[2].grad.zero_()
    for leaf, value in zip(leaves[3:], want[3:]):
        assert torch.equal(leaf.grad, value)
    dy = torch.ones(RAGGED[0], RAGGED[1])
    once = run(call, dy, strategy)
    assert torch.equal(want[1], 2 * once["A0"])


@each_strategy
@pytest.mark.parametrize("leading", [None, (2, 9)], ids=str)
def test_output_can_be_overwritten(leading, strategy):
    """nn.ReLU(inplace=True) after the layer works, as after nn.Linear."""
    call = make(("lora_3", "lora_3", *ALL), leading=leading, dtype=torch.float64)
    with kernels(strategy):
        got = torch.autograd.grad(torch.relu_(glora_linear(*call)).sum(), leaves_of(call))
    want = torch.autograd.grad(torch.relu(glora_linear(*call)).sum(), leaves_of(call))
    for g, w in zip(got, want):
        torch.testing.assert_close(g, w, rtol=1e-9, atol=1e-9)


@each_strategy
def test_no_grad_and_inference_mode(strategy):
    call = make(("vector", "lora_3", *ALL))
    with kernels(strategy):
        want = glora_linear(*call).detach()
        with torch.no_grad():
            assert torch.equal(glora_linear(*call), want)
        with torch.inference_mode():
            assert torch.equal(glora_linear(*call), want)


@each_strategy
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype, strategy):
    """As for F.linear: x, W0 and b0 are cast; the fp32 terms stay, and so do their gradients."""
    x, weight, b0, terms = make(("lora_3", "lora_3", *ALL))
    dy = upstream((x.to(dtype), weight))
    with kernels(strategy):
        with torch.autocast("cpu", dtype):
            y = glora_linear(x, weight, b0, terms)
        got = torch.autograd.grad(y, [x, *terms.flatten()[0]], dy)
    assert y.dtype == dtype and all(g.dtype == torch.float32 for g in got)
    cast = (x.detach().to(dtype).requires_grad_(), weight.to(dtype), b0.to(dtype), terms)
    want = run(cast, dy, strategy)
    assert torch.equal(y, want.pop("y"))
    for g, (name, w) in zip(got, want.items()):
        assert torch.equal(g, w.float()), name


@pytest.mark.parametrize("shape", [(), (1,), (3,), (4, 2)], ids=str)
@each_strategy
def test_constants_are_one_number(strategy, shape):
    """A constant reads one element of its storage, whatever the shape of the storage."""
    x, weight, b0, _ = make(("none",) * 5)
    for slot in "ABDE":
        value = torch.full(shape, torch.nan)
        value[(0,) * len(shape)] = 0.25
        check((x, weight, b0, Terms(**{slot: Constant(value.requires_grad_())})), strategy=strategy)


@each_strategy
def test_one_storage_for_several_terms(strategy):
    """Its gradients add up (the oracle takes a copy for each)."""
    x, weight, b0, terms = make(("lora_3", "none", "none", "none", "none"), dtype=torch.float64)
    shared = Terms(A=terms.A, B=terms.A)
    dy = upstream((x, weight))
    with kernels(strategy):
        got = results(glora_linear, x, weight, b0, shared, dy)
    want, _ = oracle(x, weight, b0, shared, dy)
    for place in "01":
        torch.testing.assert_close(got["A" + place], want["A" + place] + want["B" + place])


@each_strategy
def test_backward_outside_the_block_uses_the_backend_of_forward(strategy):
    call = make(("lora_3", "lora_3", *ALL))
    with kernels(strategy):
        y = glora_linear(*call)
    with watched() as found:
        y.sum().backward()
    assert found


def test_the_strategy_is_one_of_the_two_if_none_is_asked_for():
    for shape in ((1, 64, 64), (2000, 16, 16)):
        call = make(("lora_3", "none", "none", "none", "none"), shape)
        with watched() as found, tiles(256, 64, 64):
            check(call)
        assert {launched.kernel for launched in found} & {"fused_kernel", "assemble_kernel"}


@each_strategy
@each_product
def test_ways_to_write_the_same_layer(product, strategy):
    """A vector as the first column of a storage or by itself; a low rank over all of a storage or of its part."""
    x, weight, b0, terms = make(("vector", "lora_3", *ALL), product=product)
    vectors = [Vector(term.entries.detach()) for term in (terms.A, terms.C, terms.D, terms.E)]
    down, up = terms.B.factors
    same = Terms(vectors[0], LowRank(down.detach(), up.detach()), *vectors[1:], product)
    with kernels(strategy), torch.no_grad():
        assert torch.equal(glora_linear(x, weight, b0, same), glora_linear(x, weight, b0, terms))


@each_strategy
@each_product
@pytest.mark.parametrize("path", [("lora_3", "lora_3", *ALL), ("vector", "lora_3", *ALL), ("none", "lora_1", *ALL)])
def test_an_input_that_is_formed_again(path, product, strategy, monkeypatch):
    """The output of a GELU, which is gone by then: the bits of the gradients are those with it."""
    monkeypatch.setattr(recompute, "FEWEST_ELEMENTS", 0)
    h, *rest = make(path, product=product)
    dy, found = upstream((h, *rest)), []
    for enabled in (True, False):
        with use_backend("triton", strategy), recompute_inputs(enabled):
            x = torch.nn.functional.gelu(h)
            alive, y = weakref.ref(x), glora_linear(x, *rest)
            del x
        assert (alive() is None) == enabled
        found.append(torch.autograd.grad(y, [h, *rest[-1].storages], dy))
    assert all(map(torch.equal, *found))
