"""From adapted models to plain ones and back: what is kept, how exact it is, what is refused."""

import copy
import json
import pickle
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

from glora import GLoRALinear, PathConfig, evaluate_merged, get_paths, glora_layers, inject, merge, set_paths, unmerge
from tests.glora.toys import (
    IN_FEATURES,
    adapted_mlp,
    every_path,
    generator,
    mlp,
    points,
    randomize,
    same_bits,
    state,
    tiny_vit,
    trained_mlp,
    unchanged,
)
from tests.helpers import assert_contract, oracle

PRODUCTS = ("hadamard", "matmul")
FULL = PathConfig("lora_2", "lora_2", "lora_2", "vector", "vector")


def inputs(count=7):
    return torch.randn(count, IN_FEATURES, generator=generator(2))


def layout(model):
    modules = [(name, type(module)) for name, module in model.named_modules()]
    return modules, [(name, tuple(p.shape), p.dtype) for name, p in model.named_parameters()]


# -- the merged model ------------------------------------------------------------------------------


@pytest.mark.parametrize("product", PRODUCTS)
def test_merged_model_is_a_plain_one_again(product):
    model = trained_mlp(product=product)
    merge(model)
    assert layout(model) == layout(mlp())


def test_merged_vit_is_a_plain_one_again():
    model = inject(tiny_vit(), 2)
    randomize(model)
    x = torch.randn(2, 1, 8, 8, generator=generator())
    expected = model(x)
    report = merge(model, x)
    assert layout(model) == layout(tiny_vit())
    assert torch.equal(model(x), expected)
    assert report.model_difference == 0


@pytest.mark.parametrize("product", PRODUCTS)
def test_merged_model_computes_the_same(product):
    model, x = trained_mlp(product=product), inputs()
    expected = model(x)
    assert not torch.allclose(expected, mlp()(x))
    merge(model)
    assert torch.equal(model(x), expected)


def test_merging_right_after_injection_gives_the_base_back():
    model = adapted_mlp()
    merge(model)
    assert same_bits(state(model), state(mlp()))


def test_a_bias_is_made_where_the_path_needs_one():
    model = adapted_mlp(bias=False)
    set_paths(model, {"fc1": PathConfig(E="vector"), "fc2": PathConfig(A="vector", D="vector")})
    report = merge(model)
    assert [layer.bias_created for layer in report.layers] == [True, False]
    assert model.fc1.bias is not None
    assert model.fc2.bias is None


def test_a_shared_layer_stays_shared():
    shared = nn.Linear(4, 4)
    model = inject(nn.Sequential(shared, nn.ReLU(), shared), 2)
    report = merge(model)
    assert type(model[0]) is nn.Linear
    assert model[0] is model[2]
    assert len(report.layers) == 1


@pytest.mark.parametrize("training", [True, False])
def test_mode_is_kept(training):
    model = trained_mlp().train(training)
    merge(model, inputs())
    assert {module.training for module in model.modules()} == {training}


def test_nothing_of_the_merged_model_trains_but_the_head():
    model = trained_mlp()
    merge(model)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {"head.weight", "head.bias"}


# -- how exact it is -------------------------------------------------------------------------------


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("seed", range(5))
def test_error_in_fp64(product, seed):
    report = merge(trained_mlp(seed=seed, product=product).double(), inputs().double())
    assert report.largest_error <= 1e-12
    assert report.largest_difference == 0
    assert report.model_difference <= 1e-12


def half_layer(product, dtype, bias):
    layer = GLoRALinear(24, 17, bias, rank=2, product=product, dtype=dtype)
    randomize(layer)
    return layer


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_types_within_the_contract_on_every_path(dtype, product, bias):
    layer = half_layer(product, dtype, bias)
    x = torch.randn(9, 24, generator=generator()).to(dtype).requires_grad_()
    dy = torch.zeros(9, 17, dtype=dtype)
    for path in every_path(2):
        layer.path = path
        y = layer.merge()(x).detach()
        assert torch.equal(y, layer(x)), path
        want, scale = oracle(x, layer.weight, layer.bias, layer.terms(), dy)
        assert_contract({"y": y}, {"y": want["y"]}, {"y": scale["y"]}, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_model_gives_the_same_bits(dtype):
    model = inject(mlp().to(dtype), 2)
    randomize(model)
    report = merge(model, inputs().to(dtype))
    assert report.largest_difference == report.model_difference == 0
    assert 0 < report.largest_error < 0.1
    assert {p.dtype for p in model.parameters()} == {dtype}


# -- the report ------------------------------------------------------------------------------------


def test_report_lists_every_layer_with_its_path():
    model = trained_mlp()
    paths = get_paths(model)
    report = merge(model)
    assert {layer.name: layer.path for layer in report.layers} == paths
    assert report.largest_error == max(layer.error for layer in report.layers) < 1e-5
    assert report.model_difference is None
    assert report.originals is None


def test_report_in_words_and_as_json():
    report = merge(trained_mlp(), inputs())
    assert str(report).startswith("merged 2 layers: largest difference to the unmerged layer 0.00e+00")
    data = json.loads(json.dumps(report.to_dict()))
    assert [layer["name"] for layer in data["layers"]] == ["fc1", "fc2"]
    assert data["layers"][0]["path"] == report.layers[0].path.to_dict()
    assert data["model_difference"] == 0


def test_sample_is_compared_in_eval_mode():
    model = trained_mlp(dropout=0.5).train()
    assert merge(model, inputs()).model_difference == 0
    assert model.drop.training


# -- and back --------------------------------------------------------------------------------------


def test_unmerge_puts_the_very_layers_back():
    model = trained_mlp()
    before, modules = state(model), glora_layers(model)
    report = merge(model, keep=True)
    unmerge(model, report)
    assert all(layer is modules[name] for name, layer in glora_layers(model).items())
    assert list(glora_layers(model)) == list(modules)
    assert same_bits(state(model), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_thousand_cycles_change_no_bit(dtype):
    model = trained_mlp().to(dtype)
    with unchanged(model):
        for _ in range(1_000):
            unmerge(model, merge(model, keep=True))


def test_unmerge_restores_a_shared_layer_everywhere():
    shared = nn.Linear(4, 4)
    model = inject(nn.Sequential(shared, nn.ReLU(), shared), 2)
    with unchanged(model):
        unmerge(model, merge(model, keep=True))


def test_unmerge_needs_the_layers():
    model = trained_mlp()
    report = merge(model)
    with unchanged(model), pytest.raises(ValueError, match=r"merge\(model, keep=True\), got one that kept no layers"):
        unmerge(model, report)


def test_unmerge_twice_is_refused():
    model = trained_mlp()
    report = merge(model, keep=True)
    unmerge(model, report)
    with unchanged(model), pytest.raises(ValueError, match=r"expected a merged torch.nn.Linear of \(8, 6\) at 'fc1'"):
        unmerge(model, report)


@pytest.mark.parametrize("other", [nn.Linear(8, 4), nn.Linear(9, 5), nn.Identity(), None], ids=repr)
def test_unmerge_into_another_model_is_refused(other):
    model = trained_mlp()
    report = merge(model, keep=True)
    model.fc2 = other
    with unchanged(model), pytest.raises(ValueError, match=r"expected a merged torch.nn.Linear of \(5, 8\) at 'fc2'"):
        unmerge(model, report)


# -- what is refused, the model untouched ------------------------------------------------------------


@pytest.mark.parametrize("name", ["Ad", "Bu", "Cd", "D", "E", "weight", "bias"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_refuses_what_is_not_finite_and_names_the_layer(name, value):
    model = trained_mlp()
    set_paths(model, {"fc1": FULL, "fc2": FULL})
    with torch.no_grad():
        getattr(model.fc2, name).view(-1)[0] = value
    with unchanged(model), pytest.raises(ValueError, match=r"^layer 'fc2': merged (weight|bias): expected finite"):
        merge(model)


def test_a_nan_that_is_not_read_does_not_matter():
    model = trained_mlp()
    set_paths(model, {"fc1": PathConfig(), "fc2": PathConfig()})
    model.fc2.Ad.data.fill_(torch.nan)
    merge(model)


def test_an_unsafe_merge_goes_through():
    model = trained_mlp()
    set_paths(model, {"fc1": FULL, "fc2": FULL})
    model.fc2.E.data.fill_(torch.nan)
    merge(model, safe=False)
    assert model.fc2.bias.isnan().all()


def test_refuses_an_output_that_is_not_finite():
    model = trained_mlp()
    with unchanged(model), pytest.raises(ValueError, match="sample: expected finite outputs"):
        merge(model, inputs() * torch.inf)


def test_a_sample_that_does_not_fit_leaves_the_model_alone():
    model = trained_mlp()
    with unchanged(model), pytest.raises(ValueError, match="x: expected the last dimension"):
        merge(model, torch.randn(2, IN_FEATURES + 1))


class Pair(nn.Sequential):
    def forward(self, x):
        return super().forward(x), x


def test_refuses_to_compare_what_has_no_logits():
    model = Pair(trained_mlp())
    with unchanged(model), pytest.raises(TypeError, match=r"a tensor of logits, or .*, got dict with \['first'\]"):
        merge(model, inputs(), outputs=lambda output: {"first": output[0]})


@pytest.mark.parametrize("model", [mlp(), nn.ReLU()], ids=["linear", "activation"])
def test_refuses_a_model_without_layers(model):
    with pytest.raises(ValueError, match="at least one adapted layer, found none"):
        merge(model)


def test_refuses_a_model_merged_before():
    model = trained_mlp()
    merge(model)
    with unchanged(model), pytest.raises(ValueError, match="found none"):
        merge(model)


def test_refuses_a_bare_layer():
    layer = GLoRALinear(4, 4)
    with unchanged(layer), pytest.raises(ValueError, match=r"call .merge\(\) on a single layer"):
        merge(layer)


# -- hooks, compiled layers, tensors that are elsewhere ------------------------------------------------


def nothing(*_):
    return None


def with_forward(layer):
    layer.forward = partial(type(layer).forward, layer)


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: layer.register_forward_hook(nothing),
        lambda layer: layer.register_forward_pre_hook(nothing),
        lambda layer: layer.register_full_backward_hook(nothing),
        with_forward,
    ],
    ids=["forward", "pre", "backward", "replaced"],
)
def test_hooks_are_refused_by_name_not_lost(change):
    model = trained_mlp()
    handle = change(model.fc2)
    message = r"expected adapted layers without hooks, which would be lost, got some on 'fc2'; remove them"
    with unchanged(model), pytest.raises(ValueError, match=message):
        merge(model)
    with unchanged(model), pytest.raises(ValueError, match=message):
        evaluate_merged(model, get_paths(model), points())
    if handle is None:
        del model.fc2.forward
    else:
        handle.remove()
    merge(model)


def test_the_probe_runs_no_hook_that_is_on_all_modules():
    calls = []
    handle = register_module_forward_hook(lambda module, *_: calls.append(module))
    try:
        merge(trained_mlp())
    finally:
        handle.remove()
    assert calls == []


def test_a_compiled_layer_is_compiled_alike_once_merged():
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    model, x = trained_mlp().requires_grad_(False), inputs()
    expected = model(x)
    model.fc2.compile(backend=backend, dynamic=False)
    torch.testing.assert_close(model(x), expected)
    assert len(graphs) == 1
    copied = copy.deepcopy(model)
    assert pickle.loads(pickle.dumps(model)).fc2.compiled_with is copied.fc2.compiled_with is None
    assert torch.equal(copied(x), expected)
    merge(model)
    assert len(graphs) == 1
    torch.testing.assert_close(model(x), expected)
    assert len(graphs) == 2


def test_tensors_on_meta_are_refused_by_name():
    model = trained_mlp()
    model.fc2.Bd = nn.Parameter(model.fc2.Bd.to("meta"))
    with pytest.raises(ValueError, match=r"expected real tensors, got 'Bd' of layer 'fc2' on meta; load the weights"):
        merge(model)
    with torch.device("meta"):
        model = inject(mlp(), 2)
    with pytest.raises(ValueError, match="got 'weight' of layer 'fc1' on meta"):
        merge(model)


def test_offloaded_layers_are_refused_until_they_are_brought_back():
    accelerate = pytest.importorskip("accelerate")
    model, x = trained_mlp(), inputs()
    expected = model(x)
    accelerate.cpu_offload(model, torch.device("cpu"))
    assert torch.equal(model(x), expected)
    with pytest.raises(ValueError, match=r"'fc1' on meta; .*\(accelerate.hooks.remove_hook_from_submodules\(model\)"):
        merge(model)
    accelerate.hooks.remove_hook_from_submodules(model)
    merge(model)
    assert torch.equal(model(x), expected)


# -- within torch.inference_mode -----------------------------------------------------------------------


def trains(model):
    model(inputs()).sum().backward()
    return all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_injected_and_merged_within_inference_mode_can_be_trained():
    model = mlp()
    with torch.inference_mode():
        inject(model, 2)
    set_paths(model, dict.fromkeys(glora_layers(model), FULL))
    assert not any(p.is_inference() for p in model.parameters())
    assert trains(model)
    randomize(model)
    expected = model(inputs())
    with torch.inference_mode():
        report = merge(model, inputs())
        alone = GLoRALinear(3, 3).merge()
    assert report.model_difference == 0
    assert torch.equal(model(inputs()), expected)
    assert not any(p.is_inference() for p in (*model.parameters(), *alone.parameters()))
    assert trains(model.requires_grad_())


# -- unmerging a copy ------------------------------------------------------------------------------


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_unmerging_a_copy_shares_nothing_with_the_original(copied):
    model = trained_mlp()
    before, modules = state(model), glora_layers(model)
    report = merge(model, keep=True)
    other = copied(model)
    unmerge(other, report)
    unmerge(model, report)
    assert all(layer is modules[name] for name, layer in glora_layers(model).items())
    assert get_paths(other) == get_paths(model)
    assert same_bits(state(other), before)
    randomize(other, seed=9)
    set_paths(other, dict.fromkeys(modules, PathConfig()))
    assert same_bits(state(model), before)
    assert set(get_paths(model).values()) != {PathConfig()}


def test_a_copy_of_model_and_report_is_unmerged_by_itself():
    model = trained_mlp()
    before = state(model)
    other, report = copy.deepcopy((model, merge(model, keep=True)))
    unmerge(other, report)
    assert all(layer is report.originals[name] for name, layer in glora_layers(other).items())
    assert same_bits(state(other), before)
