"""W_eff and b_eff with gradients: the bits of the merge, and every gradient held to the contract."""

import pytest
import torch

from glora_kernels import Constant, LowRank, Terms, Vector, encode, glora_assemble, glora_merge, reference, use_backend
from glora_kernels.ops.assembly_operators import configured_assemble
from glora_kernels.path_encoding import decode, pack
from tests.helpers import ALL_PATHS, assert_contract, detached, generator_for, make_call

PRODUCTS = ("hadamard", "matmul")
# A is combined with B in what backward contracts, C, D and E with each other: every pair and every triple occurs.
PATHS = [path for i, path in enumerate(ALL_PATHS) if i % 7 == 0 or path[2:] == ("lora_3", "vector", "vector")]
each_product = pytest.mark.parametrize("product", PRODUCTS)
each_bias = pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])


def gradients(function, weight, bias, terms, dw, db):
    """W_eff, b_eff and the gradient of every storage, by name."""
    storages, _ = terms.flatten()
    w_eff, b_eff = function(weight, bias, terms)
    pairs = [(y, dy) for y, dy in ((w_eff, dw), (b_eff, db)) if y is not None and y.requires_grad]
    found = [None] * len(storages)
    if pairs:
        ys, dys = zip(*pairs)
        found = torch.autograd.grad(ys, storages, dys, allow_unused=True)
    names = [f"{slot}{i}" for slot, term in terms.active for i in range(len(term.storages))]
    outputs = {"W": w_eff.detach(), **({} if b_eff is None else {"b": b_eff.detach()})}
    return {**outputs, **dict(zip(names, found))}


def truth(weight, bias, terms, dw, db):
    def evaluate(function):
        cast = lambda t: None if t is None else detached(t, function)  # noqa: E731
        return gradients(reference.glora_merge, cast(weight), cast(bias), terms.map(cast), function(dw), function(db))

    return evaluate(lambda t: t.double()), evaluate(lambda t: t.double().abs())


@each_product
@each_bias
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_gradient_is_within_the_contract(product, bias, dtype):
    for path in PATHS:
        _, weight, b0, terms = make_call(path, bias=bias, product=product, dtype=dtype, terms_dtype=torch.float64)
        gen = generator_for("upstream", path)
        dw = torch.randn(weight.shape, generator=gen, dtype=torch.float64).to(dtype)
        db = torch.randn(weight.shape[0], generator=gen, dtype=torch.float64).to(dtype)
        got = gradients(glora_assemble, weight, b0, terms, dw, db)
        assert_contract(got, *truth(weight, b0, terms, dw, db), dtype)


@each_product
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_values_are_the_bits_of_the_merge(product, dtype):
    for path in PATHS:
        _, weight, b0, terms = make_call(path, product=product, dtype=dtype)
        for got, merged in zip(glora_assemble(weight, b0, terms), glora_merge(weight, b0, terms, safe=False)):
            assert torch.equal(got, merged), path


def test_what_no_term_changes_is_returned_as_it_is():
    _, weight, bias, _ = make_call(("none",) * 5)
    w_eff, b_eff = glora_assemble(weight, bias, Terms())
    assert w_eff is weight
    assert b_eff is bias
    assert glora_assemble(weight, None, Terms(D=Vector(torch.ones(len(bias), dtype=bias.dtype))))[1] is None


def test_a_bias_made_of_e_alone_is_no_view_of_it():
    e = torch.ones(7, dtype=torch.float64, requires_grad=True)
    _, b_eff = glora_assemble(torch.ones(7, 6, dtype=torch.float64), None, Terms(E=Vector(e)))
    assert b_eff.data_ptr() != e.data_ptr()
    b_eff.mul_(2).sum().backward()
    assert torch.equal(e.grad, torch.full((7,), 2.0, dtype=torch.float64))


@each_product
def test_nothing_dense_is_kept_for_backward(product):
    _, weight, bias, terms = make_call(("lora_3", "lora_3", "lora_3", "vector", "vector"), product=product)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        glora_assemble(weight, bias, terms)
    given = {t.data_ptr() for t in (weight, bias, *terms.flatten()[0])}
    assert kept
    assert set(kept) <= given


@each_product
@pytest.mark.parametrize("path", [("lora_3", "lora_1", "lora_3", "vector", "vector"), ("vector",) * 5], ids=str)
def test_second_derivatives(product, path):
    _, weight, bias, terms = make_call(path, (2, 3, 4), product=product)
    storages, structure = terms.map(lambda t: torch.nan_to_num(t.detach()).requires_grad_()).flatten()

    def function(*values):
        return glora_assemble(weight, bias, Terms.unflatten(values, structure))

    assert torch.autograd.gradcheck(function, storages)
    assert torch.autograd.gradgradcheck(function, storages)


def test_only_wanted_gradients_are_formed():
    _, weight, bias, terms = make_call(("lora_3", "lora_3", "none", "vector", "vector"))
    terms.A.down.requires_grad_(False)
    terms.E.value.requires_grad_(False)
    w_eff, b_eff = glora_assemble(weight, bias, terms)
    (w_eff.sum() + b_eff.sum()).backward()
    assert terms.A.down.grad is None
    assert terms.E.value.grad is None
    assert all(t.grad is not None for t in (terms.A.up, terms.B.down, terms.B.up, terms.D.value))


def test_the_reference_backend_can_be_chosen():
    _, weight, bias, terms = make_call(("lora_3", "constant", "vector", "constant", "vector"))
    with use_backend("reference"):
        got = glora_assemble(weight, bias, terms)
    for value, expected in zip(got, reference.glora_merge(weight, bias, terms)):
        assert torch.equal(value, expected)


def test_bad_operands_are_refused():
    weight = torch.ones(3, 4)
    with pytest.raises(ValueError, match=r"B.down: expected shape \(3, R\)"):
        glora_assemble(weight, None, Terms(B=LowRank(torch.ones(4, 2), torch.ones(2, 4))))
    with pytest.raises(ValueError, match=r"weight: expected shape \(N, K\)"):
        glora_assemble(torch.ones(3), None, Terms(A=Constant(torch.ones(1))))


# -- the operators for compilers -------------------------------------------------------------------


def configured(path, product, bias=True, dtype=torch.float64):
    """``(weight, bias, storages, config)``: all eight storages, also those that are not read."""
    _, weight, b0, every = make_call(("lora_3", "lora_3", "lora_3", "vector", "vector"), product=product, dtype=dtype)
    storages = [s.detach().nan_to_num(0.3).requires_grad_() for s in pack(every)[0]]
    kinds = {slot: choice.partition("_") for slot, choice in zip("ABCDE", path)}
    config = encode({slot: (kind, int(rank or 0)) for slot, (kind, _, rank) in kinds.items()})
    return weight, b0 if bias else None, storages, config


@each_product
@each_bias
def test_the_operator_equals_the_function(product, bias):
    for path in PATHS[::4]:
        weight, b0, storages, config = configured(path, product, bias)
        w_eff, b_eff = configured_assemble(weight, b0, storages, config, product)
        want_w, want_b = glora_assemble(weight, b0, decode(storages, config, product))
        want_b = torch.zeros_like(b_eff) if want_b is None else want_b
        assert torch.equal(w_eff, want_w)
        assert torch.equal(b_eff, want_b)
        got = torch.autograd.grad(w_eff.square().sum() + b_eff.sin().sum(), storages)
        want = want_w.square().sum() + want_b.sin().sum()
        grads = torch.autograd.grad(want, storages, allow_unused=True) if want.requires_grad else [None] * 8
        for g, w in zip(got, grads):
            torch.testing.assert_close(g, torch.zeros_like(g) if w is None else w, rtol=1e-12, atol=1e-12)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # opcheck's own, of its copies
@each_product
@pytest.mark.parametrize("path", [("lora_3", "lora_1", "vector", "vector", "constant"), ("none",) * 5], ids="-".join)
def test_opcheck(path, product):
    for bias in (True, False):
        weight, b0, storages, config = configured(path, product, bias, torch.float32)
        torch.library.opcheck(torch.ops.glora.assemble, (weight, b0, *storages, config, product))
        dw, db = torch.randn_like(weight), torch.randn(weight.shape[0])
        detached = [s.detach() for s in storages]
        operands = (dw, db, weight, b0, *detached, config, product, [True] * 8)
        torch.library.opcheck(torch.ops.glora.assemble_backward, operands)


def test_the_operator_has_no_second_derivative():
    weight, b0, storages, config = configured(("lora_3", "none", "none", "none", "none"), "hadamard")
    w_eff, _ = configured_assemble(weight, b0, storages, config, "hadamard")
    (grad,) = torch.autograd.grad(w_eff.square().sum(), storages[0], create_graph=True)
    with pytest.raises(NotImplementedError, match=r"call glora_kernels.glora_assemble"):
        grad.sum().backward()
