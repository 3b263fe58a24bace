"""The drop-in layer: state, identity, formula, gradients, merging."""

import copy
import pickle

import pytest
import torch
from torch import nn

from glora import GLoRALinear, LayerShape, PathConfig
from tests.glora.toys import every_path, generator, randomize, same_bits, state

IN, OUT, RANK = 5, 7, 2
PRODUCTS = ("hadamard", "matmul")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
SUPPORT = ("Ad", "Au", "Bd", "Bu", "Cd", "Cu", "D", "E")

each_product = pytest.mark.parametrize("product", PRODUCTS)
each_bias = pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def make_layer(bias=True, product="hadamard", dtype=torch.float32, path=None, rank=RANK):
    """A layer whose support tensors are not zero."""
    layer = GLoRALinear(IN, OUT, bias, rank=rank, product=product, dtype=dtype)
    randomize(layer)
    layer.path = path or PathConfig("lora_2", "vector", "lora_1", "vector", "constant")
    return layer


def tokens(dtype=torch.float32, *leading):
    return torch.randn(*(leading or (4,)), IN, generator=generator(1)).to(dtype)


# -- names, shapes, state --------------------------------------------------------------------------


@each_product
def test_support_has_the_official_names_and_shapes(product):
    layer = GLoRALinear(IN, OUT, rank=RANK, product=product)
    shapes = {name: tuple(p.shape) for name, p in layer.named_parameters() if p.requires_grad}
    assert shapes == {
        "Ad": (OUT if product == "hadamard" else IN, RANK),
        "Au": (RANK, IN),
        "Bd": (OUT, RANK),
        "Bu": (RANK, IN),
        "Cd": (IN, RANK),
        "Cu": (RANK, 1),
        "D": (OUT,),
        "E": (OUT,),
    }


@each_bias
def test_state_dict_keys_stay_what_they_are(bias):
    base = ["weight", "bias"] if bias else ["weight"]
    assert list(GLoRALinear(IN, OUT, bias).state_dict()) == [*base, "Ad", "Au", "Bd", "Bu", "Cd", "Cu", "D", "E"]


@each_bias
def test_base_is_frozen_and_support_is_not(bias):
    flags = {name: p.requires_grad for name, p in GLoRALinear(IN, OUT, bias).named_parameters()}
    assert {name for name, flag in flags.items() if flag} == set(SUPPORT)


@each_dtype
def test_support_of_half_weights_is_fp32(dtype):
    layer = GLoRALinear(IN, OUT, dtype=dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert layer.weight.dtype == layer.bias.dtype == dtype
    assert {getattr(layer, name).dtype for name in SUPPORT} == {wide}


@each_bias
def test_loads_a_linear_strictly(bias):
    linear, layer = nn.Linear(IN, OUT, bias), make_layer(bias)
    support = {name: tensor for name, tensor in state(layer).items() if name in SUPPORT}
    layer.load_state_dict(linear.state_dict(), strict=True)
    assert same_bits(state(layer), {**state(linear), **support})


def test_loads_a_linear_inside_a_model():
    plain, adapted = nn.Sequential(nn.Linear(IN, OUT)), nn.Sequential(GLoRALinear(IN, OUT))
    adapted.load_state_dict(plain.state_dict(), strict=True)
    assert torch.equal(adapted(tokens()), plain(tokens()))


@each_product
@each_bias
def test_loads_its_own_state(product, bias):
    layer, other = make_layer(bias, product), GLoRALinear(IN, OUT, bias, rank=RANK, product=product)
    other.load_state_dict(layer.state_dict(), strict=True)
    assert other.path == layer.path
    assert same_bits(state(other), state(layer))
    assert torch.equal(other(tokens()), layer(tokens()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("Au"), 'Missing key.*"Au"'),
        (lambda s: s.pop("weight"), 'Missing key.*"weight"'),
        (lambda s: s.update(F=torch.zeros(1)), 'Unexpected key.*"F"'),
        (lambda s: s.update(Ad=torch.zeros(OUT, RANK + 1)), "size mismatch for Ad"),
    ],
    ids=["part-of-the-support", "no-weight", "unknown", "other-rank"],
)
def test_strict_loading_stays_strict(change, message):
    content = GLoRALinear(IN, OUT, rank=RANK).state_dict()
    change(content)
    with pytest.raises(RuntimeError, match=message):
        GLoRALinear(IN, OUT, rank=RANK).load_state_dict(content, strict=True)


def test_made_on_meta_then_assigned():
    layer = make_layer()
    other = GLoRALinear(IN, OUT, rank=RANK, device="meta")
    assert {p.device.type for p in other.parameters()} == {"meta"}
    other.load_state_dict(layer.state_dict(), assign=True)
    assert torch.equal(other(tokens()), layer(tokens()))
    assert {name for name, p in other.named_parameters() if p.requires_grad} == set(SUPPORT)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_copies_are_equal_and_independent(copied):
    layer = make_layer()
    other = copied(layer)
    assert other.path == layer.path
    assert same_bits(state(other), state(layer))
    randomize(other, seed=1)
    assert not torch.equal(other(tokens()), layer(tokens()))


@each_dtype
def test_moves_to_a_dtype(dtype):
    layer = make_layer().to(dtype)
    y = layer(tokens(dtype))
    assert y.dtype == dtype
    assert torch.equal(y, layer.merge()(tokens(dtype)))


def test_repr_is_short():
    layer = GLoRALinear(IN, OUT, rank=4)
    layer.path = PathConfig(B="lora_4")
    assert repr(layer) == "GLoRALinear(5, 7, rank=4, B=lora_4)"
    layer = GLoRALinear(IN, OUT, rank=4, bias=False, product="matmul")
    layer.path = PathConfig("lora_4", "vector", "none", "constant", "none")
    assert repr(layer) == "GLoRALinear(5, 7, bias=False, product=matmul, rank=4, A=lora_4, B=vector, D=constant)"


@each_product
@each_bias
def test_shape_is_what_counts_depend_on(product, bias):
    assert GLoRALinear(IN, OUT, bias, product=product).shape == LayerShape(OUT, IN, bias, product)


# -- making one ------------------------------------------------------------------------------------


@each_bias
def test_from_linear_adopts_the_very_parameters(bias):
    linear = nn.Linear(IN, OUT, bias).eval()
    layer = GLoRALinear.from_linear(linear, rank=3)
    assert layer.weight is linear.weight
    assert layer.bias is linear.bias
    assert not linear.weight.requires_grad
    assert not layer.training


def test_from_linear_refuses_a_subclass():
    linear = nn.modules.linear.NonDynamicallyQuantizableLinear(IN, OUT)
    with pytest.raises(TypeError, match=r"exactly torch.nn.Linear, got .*NonDynamicallyQuantizableLinear"):
        GLoRALinear.from_linear(linear)


@pytest.mark.parametrize("rank", [0, -1, 2.0, True, "4", None])
def test_refuses_a_rank(rank):
    linear = nn.Linear(IN, OUT)
    with pytest.raises(ValueError, match=r"^rank: expected an integer from 1"):
        GLoRALinear.from_linear(linear, rank=rank)
    assert linear.weight.requires_grad


def test_refuses_a_product():
    linear = nn.Linear(IN, OUT)
    with pytest.raises(ValueError, match=r"^product: expected one of"):
        GLoRALinear.from_linear(linear, product="kronecker")
    assert linear.weight.requires_grad


def test_first_path_reads_everything():
    layer = GLoRALinear(IN, OUT, rank=4)
    assert layer.path == PathConfig("lora_4", "lora_4", "lora_4", "vector", "vector")


@pytest.mark.parametrize("slot", ["A", "B", "C"])
def test_refuses_a_path_above_its_storage(slot):
    layer = GLoRALinear(IN, OUT, rank=2)
    before = layer.path
    with pytest.raises(ValueError, match=r"ranks up to 2 .*lora_3"):
        layer.path = PathConfig(**{slot: "lora_3"})
    assert layer.path is before


@pytest.mark.parametrize("path", ["lora_2", None, {"A": "lora_2"}])
def test_refuses_what_is_no_path(path):
    with pytest.raises(TypeError, match=r"^path: expected glora.PathConfig, got"):
        GLoRALinear(IN, OUT).path = path


# -- what it computes ------------------------------------------------------------------------------


@each_product
@each_bias
@each_dtype
def test_is_the_linear_layer_at_first_whatever_its_path(product, bias, dtype):
    linear = nn.Linear(IN, OUT, bias, dtype=dtype)
    layer = GLoRALinear.from_linear(linear, RANK, product)
    x = tokens(dtype)
    expected = linear(x)
    differing = []
    for path in every_path(RANK):
        layer.path = path
        if not torch.equal(layer(x), expected):
            differing.append(path)
    assert not differing


def literal(layer, x):
    """Equation 10 from the official storages, written out once more."""
    r, weight, bias = RANK, layer.weight, 0 if layer.bias is None else layer.bias
    path, square = layer.path, torch.eye(IN).to(x)
    matmul = layer.product == "matmul"
    a = {
        "lora_2": lambda: layer.Ad[:, :r] @ layer.Au[:r],
        "vector": lambda: torch.diag(layer.Ad[:, 0]) if matmul else layer.Ad[:, :1],
        "constant": lambda: layer.Ad[0, 0] * square if matmul else layer.Ad[0, 0],
        "none": lambda: 0 * square if matmul else 0,
    }[path.A]()
    b = {
        "lora_2": lambda: layer.Bd[:, :r] @ layer.Bu[:r],
        "vector": lambda: layer.Bd[:, :1],
        "constant": lambda: layer.Bd[0, 0],
        "none": lambda: 0,
    }[path.B]()
    c = {
        "lora_2": lambda: layer.Cd[:, :r] @ layer.Cu[:r, 0],
        "vector": lambda: layer.Cd[:, 0],
        "none": lambda: x.new_zeros(IN),
    }[path.C]()
    d = {"vector": layer.D, "constant": layer.D[0], "none": 0}[path.D]
    e = {"vector": layer.E, "constant": layer.E[0], "none": 0}[path.E]
    w_eff = weight + (weight @ a if matmul else weight * a) + b
    return x @ w_eff.t() + weight @ c + bias * d + e + bias


@each_product
@each_bias
def test_follows_the_equation_on_every_path(product, bias):
    layer, x = make_layer(bias, product, torch.float64, rank=3), tokens(torch.float64)
    worst = {}
    for path in every_path(RANK):
        layer.path = path
        with torch.no_grad():
            worst[path] = float((layer(x) - literal(layer, x)).abs().max())
    assert max(worst.values()) < 1e-13


def test_what_a_path_does_not_read_never_leaks():
    layer = make_layer(path=PathConfig("lora_1", "vector", "lora_1", "constant", "none"))
    expected = layer(tokens())
    with torch.no_grad():
        for unread in (layer.Ad[:, 1:], layer.Au[1:], layer.Bd[:, 1:], layer.Bu, layer.Cd[:, 1:], layer.Cu[1:]):
            unread.fill_(torch.nan)
        layer.D[1:] = torch.nan
        layer.E.fill_(torch.nan)
    assert torch.equal(layer(tokens()), expected)


@pytest.mark.parametrize("leading", [(4,), (2, 3), (1, 2, 2), (0,), (2, 0)], ids=str)
def test_takes_any_leading_shape(leading):
    layer, x = make_layer(), tokens(torch.float32, *leading)
    y = layer(x)
    assert y.shape == (*leading, OUT)
    torch.testing.assert_close(y, layer.merge()(x))


def test_takes_one_token():
    layer, x = make_layer(), tokens()
    torch.testing.assert_close(layer(x[0]), layer(x)[0])


# -- gradients -------------------------------------------------------------------------------------


def names_read(path, bias):
    names = set()
    for slot in "ABC":
        kind = getattr(path, slot)
        names |= {"none": set(), "lora_2": {f"{slot}d", f"{slot}u"}}.get(kind, {f"{slot}d"})
    names |= {slot for slot in "DE" if getattr(path, slot) != "none"}
    return names if bias else names - {"D"}


@each_product
@each_bias
def test_only_what_is_read_gets_a_gradient(product, bias):
    layer, x = make_layer(bias, product), tokens().requires_grad_()
    wrong = []
    for path in every_path(RANK):
        layer.path = path
        layer.zero_grad(set_to_none=True)
        layer(x).sum().backward()
        got = {name for name, p in layer.named_parameters() if p.grad is not None}
        if got != names_read(path, bias):
            wrong.append((path, got))
    assert not wrong


@each_bias
def test_support_parameters_are_those_read(bias):
    layer = make_layer(bias)
    names = {id(p): name for name, p in layer.named_parameters()}
    for path in every_path(RANK):
        assert {names[id(p)] for p in layer.support_parameters(path)} == names_read(path, bias)


def test_all_support_parameters_in_order():
    layer = make_layer()
    assert [id(p) for p in layer.support_parameters()] == [id(getattr(layer, name)) for name in SUPPORT]


@each_dtype
def test_gradients_have_the_dtype_of_their_parameter(dtype):
    layer = make_layer(dtype=dtype, path=PathConfig("lora_2", "lora_2", "lora_2", "vector", "vector"))
    layer(tokens(dtype)).float().square().sum().backward()
    assert {p.grad.dtype == p.dtype for p in layer.support_parameters()} == {True}


# -- merging ---------------------------------------------------------------------------------------


@each_product
@each_bias
def test_merged_layer_computes_the_same_on_every_path(product, bias):
    layer, x = make_layer(bias, product), tokens()
    differing = []
    for path in every_path(RANK):
        layer.path = path
        merged = layer.merge()
        if type(merged) is not nn.Linear or not torch.equal(merged(x), layer(x)):
            differing.append(path)
    assert not differing


@each_bias
@each_dtype
def test_merging_shares_nothing_with_the_layer(bias, dtype):
    layer = make_layer(bias, dtype=dtype)
    own = {p.untyped_storage().data_ptr() for p in layer.parameters()}
    for path in every_path(RANK):
        merged = layer.merge(path)
        assert not own & {p.untyped_storage().data_ptr() for p in merged.parameters()}, path
        assert all(p.is_contiguous() for p in merged.parameters()), path


def test_merging_leaves_the_layer_alone():
    layer = make_layer()
    before, path = state(layer), layer.path
    layer.merge(PathConfig(A="vector", E="vector"))
    assert same_bits(state(layer), before)
    assert layer.path is path


@pytest.mark.parametrize(
    ("path", "has_bias"),
    [
        (PathConfig(), False),
        (PathConfig(A="vector", B="vector", D="vector"), False),
        (PathConfig(E="vector"), True),
        (PathConfig(E="constant"), True),
        (PathConfig(C="vector"), True),
    ],
    ids=["nothing", "a-b-d", "e-vector", "e-constant", "c"],
)
def test_merging_makes_a_bias_only_where_the_path_does(path, has_bias):
    merged = make_layer(bias=False, path=path).merge()
    assert (merged.bias is not None) == has_bias
    assert list(merged.state_dict()) == (["weight", "bias"] if has_bias else ["weight"])


@pytest.mark.parametrize("training", [True, False])
def test_merged_layer_is_frozen_and_in_the_same_mode(training):
    merged = make_layer().train(training).merge()
    assert merged.training == training
    assert not any(p.requires_grad for p in merged.parameters())
    assert (merged.in_features, merged.out_features) == (IN, OUT)


@pytest.mark.parametrize(("name", "message"), [("Bd", "merged weight: .* 5 that"), ("E", "merged bias: .* 1 that")])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_merging_refuses_what_is_not_finite(name, message, value):
    layer = make_layer()
    with torch.no_grad():
        getattr(layer, name).view(-1)[0] = value
    layer.path = PathConfig(B="vector", E="vector")
    with pytest.raises(ValueError, match=message):
        layer.merge()
    assert not torch.isfinite(torch.cat([p.flatten() for p in layer.merge(safe=False).parameters()])).all()
