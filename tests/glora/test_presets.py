"""Presets: each is held equal to its method, outputs and gradients, and starts and trains as the method does."""

import copy
import math
import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

import glora
from glora import PRESETS, PathConfig, SearchSpace, apply_preset, glora_layers, inject, preset_path
from tests.glora.methods import METHODS, Independent, stored
from tests.glora.toys import (
    adapted_mlp,
    every_path,
    generator,
    mlp,
    points,
    same_bits,
    state,
    tiny_vit,
    trained_mlp,
    unchanged,
)

SHAPES = [(4, 7, 5), (3, 5, 9), (6, 8, 8), (1, 1, 4)]  # M, N, K
RANK, STORAGE = 2, 3
HERE = Path(__file__).resolve().parent
PAGE = HERE.parents[1] / "docs" / "presets.md"
PRODUCTS = ("hadamard", "matmul")
PAIRS = [(name, product) for name in PRESETS for product in PRODUCTS if PRESETS[name].product in (None, product)]
CASES = [(name, product, bias) for name, product in PAIRS for bias in (True, False)]


def randn(gen, *shape):
    return torch.randn(*shape, generator=gen, dtype=torch.float64)


def one_layer(name, product, N, K, bias, gen):
    """A single adapted layer under a preset, in fp64, its base random."""
    model = inject(nn.Sequential(nn.Linear(K, N, bias, dtype=torch.float64)), STORAGE, product=product)
    layer = apply_preset(model, name, RANK)[0]
    with torch.no_grad():
        for p in (layer.weight, layer.bias):
            if p is not None:
                p.copy_(randn(gen, *p.shape))
    return layer


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)


def results(output, x, parameters, dy):
    """y and its gradients, by x and by the method's own parameters."""
    leaves = [x, *parameters.values()]
    return [output, *torch.autograd.grad(output, leaves, dy)]


# -- what each is equal to -------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("name", "product", "bias"), [c for c in CASES if c[0] != "bitfit" or c[2]])
def test_equals_its_method(name, product, bias, shape):
    """Outputs, and gradients of x and of the method's own parameters, tied ones too. BitFit has none without a bias."""
    (M, N, K), gen, method = shape, generator(), METHODS[name]
    layer = one_layer(name, product, N, K, bias, gen)
    x, dy = randn(gen, M, K).requires_grad_(), randn(gen, M, N)
    parameters = {key: randn(gen, *size).requires_grad_() for key, size in method.shapes(N, K, RANK).items()}
    want = results(method.output(x, layer.weight, layer.bias, parameters), x, parameters, dy)
    storages = stored(layer, method.support(parameters, layer.bias))
    got = results(functional_call(layer, storages, x), x, parameters, dy)
    for actual, expected in zip(got, want):
        close(actual, expected)


def test_every_preset_has_its_method():
    assert set(METHODS) == set(PRESETS)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("name", ["lora", "hira", "ia3", "ia3-input"])
def test_equals_its_layer_in_peft(name, bias):
    peft = pytest.importorskip("peft")
    N, K, gen = 7, 5, generator()
    config = {
        "lora": lambda: peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["0"]),
        "hira": lambda: peft.HiraConfig(r=RANK, target_modules=["0"]),
        "ia3": lambda: peft.IA3Config(target_modules=["0"], feedforward_modules=[]),
        "ia3-input": lambda: peft.IA3Config(target_modules=["0"], feedforward_modules=["0"]),
    }[name]()
    layer = one_layer(name, PRESETS[name].product or "hadamard", N, K, bias, gen)
    plain = nn.Sequential(nn.Linear(K, N, bias, dtype=torch.float64))
    plain[0].load_state_dict(layer.merge(PathConfig()).state_dict())
    theirs = peft.get_peft_model(plain, config)
    trained = [p for p in theirs.parameters() if p.requires_grad]
    with torch.no_grad():
        for p in trained:
            p.copy_(randn(gen, *p.shape))
    parameters = dict(zip({"lora": "AB", "hira": "AB"}.get(name, "l"), trained))
    x, dy = randn(gen, 6, K).requires_grad_(), randn(gen, 6, N)
    want = results(theirs(x), x, parameters, dy)
    flat = {key: p.flatten() if key == "l" else p for key, p in parameters.items()}
    storages = stored(layer, METHODS[name].support(flat, layer.bias))
    got = results(functional_call(layer, storages, x), x, parameters, dy)
    for actual, expected in zip(got, want):
        close(actual, expected)


COUNTS = {
    "lora": (RANK * (7 + 5), RANK * (7 + 5)),
    "hira": (RANK * (7 + 5), RANK * (7 + 5)),
    "bitfit": (7, 7),
    "ssf": (3 * 7, 2 * 7),
    "prompt": (5, 5),
    "ia3": (2 * 7, 7),
    "ia3-input": (5, 5),
    "repadapter": (RANK * 2 * 5 + 5, RANK * 2 * 5 + 5),
    "linear-probe": (0, 0),
}


@pytest.mark.parametrize(("name", "product"), PAIRS)
def test_parameters_of_a_layer(name, product):
    """With a bias and without, N = 7 and K = 5."""
    path = preset_path(name, RANK)
    assert tuple(path.count(glora.LayerShape(7, 5, bias, product)) for bias in (True, False)) == COUNTS[name]


# -- how each starts -------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "product"), PAIRS)
def test_outputs_are_the_frozen_models_at_the_start(name, product):
    """Whatever the support tensors held before."""
    model = apply_preset(trained_mlp(STORAGE, product=product), name, RANK)
    plain = mlp()
    plain.head = model.head
    x = points().tensors[0]
    assert torch.equal(model(x), plain(x))
    assert all(layer.path == preset_path(name, RANK) for layer in glora_layers(model).values())


@pytest.mark.parametrize(("name", "product"), PAIRS)
def test_what_a_preset_does_not_read_stays_as_it_is(name, product):
    model = trained_mlp(STORAGE, product=product)
    path, before = preset_path(name, RANK), state(model)
    apply_preset(model, name, RANK)
    now = state(model)
    for key in glora_layers(model):
        for slot, (kind, rank) in path.choices.items():
            down, up = (f"{key}.{slot}", None) if slot in "DE" else (f"{key}.{slot}d", f"{key}.{slot}u")
            read = {"lora": rank, "vector": 1, "none": 0}[kind]
            columns = now[down].reshape(len(now[down]), -1)
            assert not columns[:, :read].any()
            assert torch.equal(columns[:, read:], before[down].reshape(columns.shape)[:, read:])
            if up is not None:
                assert not (now[up][:rank] == before[up][:rank]).any()
                assert torch.equal(now[up][rank:], before[up][rank:])
    frozen = [key for key in now if key.split(".")[-1] in ("weight", "bias")]
    assert same_bits({key: now[key] for key in frozen}, {key: before[key] for key in frozen})


def as_linear(rank, columns):
    return nn.init.kaiming_uniform_(torch.empty(rank, columns), a=math.sqrt(5))


def as_convolution(rank, columns):
    return nn.init.xavier_uniform_(torch.empty(rank, columns, 1))[:, :, 0]


@pytest.mark.parametrize(
    ("name", "right", "draw"),
    [("lora", "Bu", as_linear), ("hira", "Au", as_linear), ("repadapter", "Au", as_convolution)],
)
def test_right_factors_are_drawn_as_by_the_method(name, right, draw):
    """LoRA's and PEFT's HiRA's as nn.Linear's own weight; RepAdapter's as its 1 x 1 convolution: layer after layer."""
    model = adapted_mlp(STORAGE, product=PRESETS[name].product or "hadamard")
    torch.manual_seed(3)
    apply_preset(model, name, RANK)
    torch.manual_seed(3)
    for layer in glora_layers(model).values():
        assert torch.equal(getattr(layer, right)[:RANK], draw(RANK, layer.in_features))


def test_loras_draw_is_not_gloras_own():
    """Xavier over the whole storage, of 2 rows and 8 columns, is a draw of more than twice the width."""
    layer = glora_layers(apply_preset(adapted_mlp(2), "lora", 2))["fc2"]
    assert layer.Bu.abs().max() <= 1 / math.sqrt(8)
    layer.reset_support()
    assert layer.Bu.abs().max() > 1.5 / math.sqrt(8)


# -- how each trains -------------------------------------------------------------------------------

OWN = {  # a method's parameters out of a layer's tensors
    "lora": lambda layer: {"A": layer.Bu[:RANK], "B": layer.Bd[:, :RANK]},
    "hira": lambda layer: {"A": layer.Au[:RANK], "B": layer.Ad[:, :RANK]},
    "prompt": lambda layer: {"prompt": layer.Cd[:, 0]},
    "bitfit": lambda layer: {"b": layer.bias + layer.E},
    "ia3-input": lambda layer: {"l": 1 + layer.Ad[:, 0]},
}


@pytest.mark.parametrize(
    ("name", "decay"), [("lora", 0.1), ("hira", 0.1), ("prompt", 0.1), ("bitfit", 0.0), ("ia3-input", 0.0)]
)
@pytest.mark.parametrize("optimiser", [torch.optim.SGD, torch.optim.AdamW], ids=["sgd", "adamw"])
def test_first_steps_are_the_methods(name, decay, optimiser):
    """From the same numbers, in fp64: five steps of a model of the method's own layers."""
    plain = mlp().double()
    ours = inject(copy.deepcopy(plain), STORAGE, product=PRESETS[name].product or "hadamard")
    apply_preset(ours, name, RANK)
    theirs = copy.deepcopy(plain)
    for key, layer in glora_layers(ours).items():
        setattr(theirs, key, Independent(name, getattr(theirs, key), OWN[name](layer)))
    optimisers = [
        optimiser([p for p in model.parameters() if p.requires_grad], lr=0.05, weight_decay=decay)
        for model in (ours, theirs)
    ]
    x, labels = points(8).tensors
    for _ in range(5):
        for model, step in zip((ours, theirs), optimisers):
            step.zero_grad()
            F.cross_entropy(model(x.double()), labels).backward()
            step.step()
        close(ours(x.double()), theirs(x.double()))
    for key, layer in glora_layers(ours).items():
        independent = getattr(theirs, key).trained
        for part, value in OWN[name](layer).items():
            close(value, independent[part])
    assert not torch.allclose(ours(x.double()), plain(x.double()))


@pytest.mark.parametrize(("name", "product"), PAIRS)
def test_three_steps_move_everything_that_is_read_and_nothing_else(name, product):
    model = apply_preset(adapted_mlp(STORAGE, product=product), name, RANK)
    before = state(model)
    glora.train(model, points(), glora.Recipe(steps=3, batch_size=6, lr=1e-2, weight_decay=0.1), progress=False)
    for key, now in state(model).items():
        module, _, tensor = key.rpartition(".")
        layer = glora_layers(model).get(module)
        trained = layer is None or any(p is getattr(layer, tensor) for p in layer.support_parameters(layer.path))
        assert torch.equal(now, before[key]) != trained, key


def test_linear_probe_trains_the_head_alone():
    model = apply_preset(inject(tiny_vit(), STORAGE), "linear-probe")
    assert glora.count_parameters(model) == 0
    before, images = state(model), torch.randn(6, 1, 8, 8, generator=generator())
    data = torch.utils.data.TensorDataset(images, torch.arange(6) % 3)
    glora.train(model, data, glora.Recipe(steps=3, batch_size=6, lr=1e-2, weight_decay=0.1), progress=False)
    changed = {key for key, now in state(model).items() if not torch.equal(now, before[key])}
    assert changed == {"head.weight", "head.bias"}
    probe = tiny_vit()
    probe.head.load_state_dict(model.head.state_dict())
    glora.merge(model)
    assert torch.equal(model.eval()(images), probe(images))


def test_bitfit_leaves_a_layer_without_bias_alone():
    plain = nn.Sequential(nn.Linear(4, 5, bias=False), nn.Linear(5, 3))
    model = apply_preset(inject(plain, 1), "bitfit")
    assert [layer.path for layer in model] == [PathConfig(), PathConfig(E="vector")]
    assert glora.count_parameters(model) == 3


def test_a_preset_is_one_path_of_the_papers_space():
    """But for the ranks, every preset is among the 432."""
    assert all(preset_path(name, 4) in every_path(4) for name in PRESETS)
    assert SearchSpace((4,)).count() == len(every_path(4))


# -- what cannot be ---------------------------------------------------------------------------------


def test_names_are_keys():
    assert all(name == preset.name for name, preset in PRESETS.items())


@pytest.mark.parametrize("call", [preset_path, lambda name: apply_preset(adapted_mlp(), name)])
@pytest.mark.parametrize("name", ["adaptformer", "LoRA", "", None, []], ids=str)
def test_an_unknown_name_lists_the_presets(call, name):
    expected = f"name: expected one of {list(PRESETS)}, got {name!r}"
    with pytest.raises(ValueError, match=re.escape(expected)):
        call(name)


@pytest.mark.parametrize("rank", [0, -1, 2.0, "2", True, None], ids=str)
@pytest.mark.parametrize("name", ["lora", "bitfit"])
def test_refuses_a_rank(name, rank):
    with pytest.raises(ValueError, match=r"^rank: expected an integer from 1, got"):
        preset_path(name, rank)


@pytest.mark.parametrize(
    ("name", "rank", "product", "bias", "message"),
    [
        (
            "hira",
            2,
            "matmul",
            True,
            "model: expected layers of the hadamard product for 'hira', others are ['fc1', 'fc2']",
        ),
        ("ia3-input", 2, "hadamard", True, "glora.inject(..., product='matmul') makes them"),
        ("lora", 3, "hadamard", True, "rank: expected at most 2 (storage of layer 'fc1'), got 3"),
        ("bitfit", 2, "hadamard", False, "model: expected an adapted layer with a bias for 'bitfit', found none"),
    ],
)
def test_what_does_not_fit_changes_nothing(name, rank, product, bias, message):
    model = trained_mlp(2, product=product, bias=bias)
    with unchanged(model), pytest.raises(ValueError, match=re.escape(message)):
        apply_preset(model, name, rank)


def test_a_storage_of_rank_one_is_enough_without_a_low_rank():
    assert glora.count_parameters(apply_preset(adapted_mlp(1), "ssf", 8)) == 3 * (8 + 5)


def test_a_model_without_layers_has_no_presets():
    with pytest.raises(ValueError, match=r"found none; call glora.inject"):
        apply_preset(mlp(), "lora")


def test_bias_free_leaves_out_what_would_create_a_bias():
    model = apply_preset(adapted_mlp(bias=False), "ssf", bias_free=True)
    assert set(glora.get_paths(model).values()) == {PathConfig(A="vector")}
    assert set(glora.get_paths(apply_preset(adapted_mlp(), "ssf", bias_free=True)).values()) == {preset_path("ssf")}
    with pytest.raises(ValueError, match="expected an adapted layer with a bias for 'prompt', found none"):
        apply_preset(model, "prompt", bias_free=True)
    assert set(glora.get_paths(apply_preset(model, "linear-probe", bias_free=True)).values()) == {PathConfig()}


# -- the page ---------------------------------------------------------------------------------------


def test_the_page_has_every_preset_and_every_test_that_it_names():
    page = PAGE.read_text()
    table = {line.split("|")[1].strip(" `"): line for line in page.splitlines() if line.startswith("| `")}
    assert list(table) == list(PRESETS)
    for name, preset in PRESETS.items():
        assert preset.source in table[name]
        assert (preset.product or "either") in table[name]
    named = set(re.findall(r"`(test_\w+)`", page))
    tests = "".join((HERE / file).read_text() for file in ("test_presets.py", "test_expressible.py"))
    assert len(named) > 10
    assert named <= set(re.findall(r"^def (test_\w+)", tests, re.M))
