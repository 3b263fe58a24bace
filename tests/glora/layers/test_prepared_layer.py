"""A layer that has been called before: whatever has changed since, it does what a first call does."""

import copy
import pickle
import sys
import weakref

import pytest
import torch
from torch import nn

from glora import GLoRALinear, PathConfig
from glora_kernels import glora_linear, reference, use_backend
from tests.glora.toys import generator, randomize

N, K, RANK = 7, 5, 3
ALL_LOW_RANK = PathConfig("lora_3", "lora_3", "lora_3", "vector", "vector")
OTHER = PathConfig("vector", "constant", "none", "vector", "constant")


def tokens(*leading, dtype=torch.float32, requires_grad=True):
    x = torch.randn(*(leading or (4,)), K, generator=generator(1)).to(dtype)
    return x.requires_grad_(requires_grad)


def called_layer(path=ALL_LOW_RANK, product="hadamard", bias=True):
    """One that is prepared for ``tokens()``."""
    layer = GLoRALinear(K, N, bias, rank=RANK, product=product)
    randomize(layer)
    layer.path = path
    layer(tokens())
    return layer


def bits(y, x, layer):
    """The output and every gradient."""
    leaves = [leaf for leaf in (x, *layer.parameters()) if leaf.requires_grad]
    grads = torch.autograd.grad(y.sum(), leaves, allow_unused=True) if y.requires_grad else []
    return [y.detach(), *grads]


def same(found, want):
    return len(found) == len(want) and all(a is b or torch.equal(a, b) for a, b in zip(found, want))


def does_what_a_first_call_does(layer, x=None):
    """Twice, and its second call is prepared again."""
    x = tokens(dtype=layer.weight.dtype) if x is None else x
    want = bits(glora_linear(x, layer.weight, layer.bias, layer.terms()), x, layer)
    return all(same(bits(layer(x), x, layer), want) for _ in range(2))


@pytest.fixture
def no_first_calls(monkeypatch):
    """From now on, a layer that looks at a call as a whole fails."""

    def refuse(*_):
        raise AssertionError("looked at as a whole")

    return lambda: monkeypatch.setattr("glora.layers.linear.glora_linear", refuse)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("product", ["hadamard", "matmul"])
def test_a_call_like_the_one_before_is_not_looked_at_again(product, bias, no_first_calls):
    layer = called_layer(product=product, bias=bias)
    no_first_calls()
    for path in (ALL_LOW_RANK, OTHER, PathConfig(), ALL_LOW_RANK):
        layer.path = path
        assert does_what_a_first_call_does(layer)
        assert does_what_a_first_call_does(layer, tokens(9))
        with torch.no_grad():
            assert does_what_a_first_call_does(layer)


def replace(layer):
    layer.Ad = nn.Parameter(torch.ones_like(layer.Ad))


def replace_behind_its_back(layer):
    layer._parameters["Cu"] = nn.Parameter(torch.ones_like(layer.Cu))


def replace_by_a_tensor(layer):
    layer._parameters["E"] = torch.ones(N)


def replace_as_a_plain_attribute(layer):
    """As FSDP does while it has the parameters together."""
    del layer._parameters["E"]
    layer.E = torch.ones(N)


def tie(layer):
    layer.Bu = layer.Au


def another():
    layer = GLoRALinear(K, N, rank=RANK)
    randomize(layer, seed=5)
    return layer


CHANGES = {
    "replaced": replace,
    "replaced in the dictionary": replace_behind_its_back,
    "by a tensor": replace_by_a_tensor,
    "as an attribute": replace_as_a_plain_attribute,
    "tied": tie,
    "new data": lambda layer: setattr(layer.Bd, "data", torch.ones(N, RANK)),
    "data of another dtype": lambda layer: setattr(layer.Bd, "data", torch.ones(N, RANK, dtype=torch.float64)),
    "strides": lambda layer: setattr(layer.Bd, "data", torch.ones(RANK, N).t()),
    "to another dtype": lambda layer: layer.double(),
    "loaded": lambda layer: layer.load_state_dict(another().state_dict()),
    "assigned": lambda layer: layer.load_state_dict(another().state_dict(), assign=True),
    "frozen in part": lambda layer: [p.requires_grad_(False) for p in (layer.Ad, layer.Au)],
    "frozen": lambda layer: layer.requires_grad_(False),
    "another bias": lambda layer: setattr(layer, "bias", nn.Parameter(torch.ones(N), requires_grad=False)),
    "no bias": lambda layer: setattr(layer, "bias", None),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_changed_parameters_are_seen(change):
    layer = called_layer()
    before = layer(tokens()).detach()
    change(layer)
    assert does_what_a_first_call_does(layer)
    frozen = not any(p.requires_grad for p in layer.parameters())
    assert frozen or layer.Ad.requires_grad is False or not torch.equal(layer(tokens(dtype=layer.weight.dtype)), before)


def test_a_parameter_that_wants_a_gradient_again_gets_it():
    layer = called_layer().requires_grad_(False)
    layer(tokens())
    layer.Ad.requires_grad_()
    layer(tokens()).sum().backward()
    assert layer.Ad.grad is not None and layer.Au.grad is None


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda layer: setattr(layer.Bd, "data", torch.ones(N, 2)), ValueError, r"B.up: expected shape \(2, 5\)"),
        (lambda layer: setattr(layer.D, "data", torch.ones(1)), ValueError, "D: expected a vector of shape"),
        (
            lambda layer: setattr(layer, "E", nn.Parameter(torch.ones(N, device="meta"))),
            ValueError,
            "E: expected device",
        ),
        (lambda layer: layer.bias.requires_grad_(), ValueError, "bias: expected a frozen tensor"),
        (
            lambda layer: setattr(layer.weight, "data", torch.ones(N, K + 1)),
            ValueError,
            r"A\.up: expected shape \(3, 6\)",
        ),
        (lambda layer: layer.half(), TypeError, "x: expected the dtype of weight"),
    ],
    ids=["shape", "broadcast", "device", "bias", "weight", "dtype"],
)
def test_what_no_longer_fits_is_refused(change, error, message):
    layer = called_layer()
    change(layer)
    for _ in range(2):
        with pytest.raises(error, match=message):
            layer(tokens())


def test_a_rank_above_replaced_storages_is_refused():
    layer = called_layer(OTHER)
    layer.Bd, layer.Bu = nn.Parameter(torch.ones(N, 2)), nn.Parameter(torch.ones(2, K))
    assert does_what_a_first_call_does(layer)
    layer.path = ALL_LOW_RANK
    for _ in range(2):
        with pytest.raises(ValueError, match=r"B\.rank: expected 1 to 2"):
            layer(tokens())


def bad_inputs():
    yield torch.randn(4, K + 1).requires_grad_(), ValueError, "x: expected the last dimension"
    yield tokens(dtype=torch.float64), TypeError, "x: expected the dtype of weight"
    yield tokens().detach().to("meta").requires_grad_(), ValueError, "x: expected device cpu"
    yield torch.randn(4, K).to_sparse(), TypeError, "x: expected a dense"
    yield torch.tensor(1.0), ValueError, "x: expected at least 1 dimension"
    yield None, TypeError, "x: expected a torch.Tensor"


@pytest.mark.parametrize(("x", "error", "message"), list(bad_inputs()))
def test_an_input_that_does_not_fit_is_refused(x, error, message):
    layer = called_layer()
    with pytest.raises(error, match=message):
        layer(x)


def other_inputs():
    yield "no gradient", tokens(requires_grad=False)
    yield "more dimensions", tokens(2, 3, 4)
    yield "one token", tokens(1)[0].detach().requires_grad_()
    yield "no token", tokens(0)
    yield "strides", torch.randn(K, 4).t().requires_grad_()
    yield "expanded", torch.randn(1, K).expand(4, K)
    yield "a parameter", nn.Parameter(torch.randn(4, K))


@pytest.mark.parametrize("x", [x for _, x in other_inputs()], ids=[name for name, _ in other_inputs()])
def test_other_inputs(x):
    layer = called_layer()
    assert does_what_a_first_call_does(layer, x)
    assert does_what_a_first_call_does(layer)


# -- modes -----------------------------------------------------------------------------------------


def test_autocast_is_seen():
    layer, x = called_layer(), tokens()
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            want = glora_linear(x, layer.weight, layer.bias, layer.terms())
            assert want.dtype == torch.bfloat16
            assert torch.equal(layer(x), want) and torch.equal(layer(x), want)
            with torch.autocast("cpu", enabled=False):
                assert layer(x).dtype == torch.float32
        assert layer(x).dtype == torch.float32


def test_inference_mode_and_training_take_turns():
    layer, x = called_layer(), tokens()
    want = layer(x).detach()
    for _ in range(2):
        with torch.inference_mode():
            y = layer(x)
            assert y.is_inference() and torch.equal(y, want)
        assert does_what_a_first_call_does(layer)


def test_transforms_are_seen():
    layer, x = called_layer(), tokens(requires_grad=False)
    tangent = torch.randn(4, K, generator=generator(2))
    for _ in range(2):
        want = layer(x)
        for _ in range(2):
            torch.testing.assert_close(torch.func.vmap(layer)(x), want)
        (want,) = torch.autograd.grad(layer(leaf := tokens()).sum(), leaf)
        torch.testing.assert_close(torch.func.grad(lambda x: layer(x).sum())(x), want)
        w_eff = layer.merge().weight
        torch.testing.assert_close(torch.func.jvp(layer, (x,), (tangent,))[1], tangent @ w_eff.t())
        layer(x)
        with torch.autograd.forward_ad.dual_level():
            dual = layer(torch.autograd.forward_ad.make_dual(x, tangent))
            torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(dual).tangent, tangent @ w_eff.t())


@pytest.mark.parametrize("wrap", [nn.Parameter, torch.clone], ids=["parameters", "tensors"])
def test_functional_call_swaps_the_state(wrap):
    layer, x = called_layer(), tokens()
    mine = layer(x).detach()
    others = {name: wrap(torch.ones_like(p.detach())) for name, p in layer.named_parameters() if p.requires_grad}
    swapped = torch.func.functional_call(layer, others, (x,))
    expected = copy.deepcopy(layer)
    with torch.no_grad():
        for name, tensor in others.items():
            expected.get_parameter(name).copy_(tensor)
    assert torch.equal(swapped, expected(x))
    assert torch.equal(layer(x), mine)


def test_tensors_swapped_in_are_let_go():
    """A layer keeps what it is prepared for: its parameters, which live as long as it does."""
    layer, x = called_layer(), tokens(requires_grad=False)
    other = torch.ones(N)
    torch.func.functional_call(layer, {"E": other}, (x,))
    gone = weakref.ref(other)
    del other
    assert gone() is None


def test_a_chosen_backend_is_seen(monkeypatch):
    layer, x = called_layer(), tokens()
    want = reference.glora_linear(x, layer.weight, layer.bias, layer.terms())
    with monkeypatch.context() as patch:
        patch.setattr(reference, "glora_linear", lambda *_: want)
        with use_backend("reference"):
            assert layer(x) is want
        assert layer(x) is not want
        patch.setenv("GLORA_BACKEND", "reference")
        assert layer(x) is want
        with use_backend("auto"):
            assert layer(x) is not want
    monkeypatch.setenv("GLORA_BACKEND", "fastest")
    with pytest.raises(ValueError, match="GLORA_BACKEND: expected one of"):
        layer(x)


def test_saved_tensors_that_hooks_replace_are_used():
    """As offloading does: backward works on what is unpacked, not on the tensors of the forward pass."""
    layer, x = called_layer(), tokens()
    want = bits(layer(x), x, layer)

    def zero_if_bu(saved):
        return torch.zeros_like(saved) if saved.data_ptr() == layer.Bu.data_ptr() else saved

    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, zero_if_bu):
        y = layer(x)
    y.sum().backward()
    assert not layer.Bd.grad.any() and layer.Ad.grad.any()  # dBd = dW Bu^T
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach().clone(), lambda t: t):
        assert same(bits(layer(x), x, layer), want)


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies_are_prepared_anew(copied):
    layer = called_layer()
    other = copied(layer)
    other.Bd = nn.Parameter(torch.ones_like(layer.Bd))
    assert does_what_a_first_call_does(other)
    assert does_what_a_first_call_does(layer)


def test_without_guards_every_call_is_looked_at(monkeypatch):
    monkeypatch.setattr("glora_kernels.torch_private._tensor_guards", None)
    layer = called_layer()
    replace(layer)
    assert does_what_a_first_call_does(layer)


# -- what it costs ---------------------------------------------------------------------------------


def python_calls(function):
    """How many Python functions are entered, those of backward included."""
    count = 0

    def entered(_frame, event, _argument):
        nonlocal count
        count += event == "call"

    function()
    sys.setprofile(entered)
    try:
        function()
    finally:
        sys.setprofile(None)
    return count


@pytest.mark.parametrize(("training", "most"), [(True, 108), (False, 34)], ids=["training", "without grad"])
def test_few_functions_run(training, most):
    """Of ours and of PyTorch, written in Python. Every one costs up to a microsecond."""
    layer, x, dy = called_layer(), tokens(), torch.ones(4, N)
    with torch.set_grad_enabled(training):
        found = python_calls(lambda: layer(x).backward(dy) if training else layer(x))
    assert 0 < found <= most
