"""Paths within a state dict: carried where PyTorch carries its own versions, missed aloud where they are not."""

import copy
import io
import warnings

import pytest
import torch
from safetensors.torch import load, save
from torch import nn

import glora
from glora import GLoRALinear, PathConfig, get_paths, set_paths
from glora.layers.linear import PARAMETER_NAMES
from tests.glora.toys import IN_FEATURES, adapted_mlp, generator, mlp, same_bits, state, trained_mlp, unchanged

MISSED = r"load_state_dict: expected the paths of the support tensors too, .* glora.set_paths\(model, paths\)"


def inputs():
    return torch.randn(7, IN_FEATURES, generator=generator(2))


def assert_same(one, other):
    assert get_paths(one) == get_paths(other)
    assert torch.equal(one(inputs()), other(inputs()))


def written(content):
    file = io.BytesIO()
    torch.save(content, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize(
    "through", [lambda s: s, copy.deepcopy, copy.copy, written], ids=["itself", "deep", "shallow", "file"]
)
@pytest.mark.parametrize("assign", [False, True])
def test_a_state_dict_carries_the_paths(through, assign):
    model, other = trained_mlp(), adapted_mlp()
    found = other.load_state_dict(through(model.state_dict()), strict=True, assign=assign)
    assert not found.missing_keys and not found.unexpected_keys
    assert_same(model, other)


def test_it_has_no_entry_more():
    layer = GLoRALinear(4, 3, rank=2)
    assert tuple(layer.state_dict()) == PARAMETER_NAMES
    assert all(isinstance(tensor, torch.Tensor) for tensor in layer.state_dict().values())


def test_a_part_and_a_whole():
    model = nn.Sequential(trained_mlp(), nn.Identity())
    other = nn.Sequential(adapted_mlp(), nn.Identity())
    other[0].load_state_dict(model[0].state_dict())
    assert_same(model, other)
    wrapped, rewrapped = nn.DataParallel(trained_mlp(seed=1)), nn.DataParallel(adapted_mlp())
    rewrapped.load_state_dict(wrapped.state_dict())
    assert_same(wrapped.module, rewrapped.module)


@pytest.mark.parametrize(
    "through",
    [dict, lambda s: load(save(dict(s))), lambda s: {k: v.clone() for k, v in s.items()}],
    ids=["dict", "safetensors", "clones"],
)
def test_without_paths_it_is_said_once_and_every_layer_keeps_its_own(through):
    model, other = trained_mlp(), adapted_mlp()
    before = get_paths(other)
    content = through(model.state_dict())
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("default")
        other.load_state_dict(content)
    assert len(said) == 1
    with pytest.warns(UserWarning, match=MISSED):
        other.load_state_dict(content)
    assert get_paths(other) == before
    set_paths(other, get_paths(model))
    assert_same(model, other)


def test_what_has_no_support_tensors_sets_no_path_and_says_nothing():
    model = trained_mlp()
    before = get_paths(model)
    model.load_state_dict(mlp().state_dict())
    model.load_state_dict({"head.bias": torch.zeros(3)}, strict=False)
    partly = trained_mlp(seed=3).state_dict()
    for name in [name for name in partly if name.startswith("fc1.")]:
        del partly[name]
    model.load_state_dict(partly, strict=False)
    assert get_paths(model)["fc1"] == before["fc1"]
    assert get_paths(model)["fc2"] == get_paths(trained_mlp(seed=3))["fc2"]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (PathConfig(A="lora_3").to_dict(), r"fc1.path: path: expected ranks up to 2"),
        ({"A": "lora_1"}, r"fc1.path: path: expected exactly the keys"),
        ({**PathConfig().to_dict(), "B": "dense"}, r"fc1.path: B: expected one of"),
    ],
)
def test_an_impossible_path_is_an_error_of_loading(path, message):
    content, model = trained_mlp().state_dict(), adapted_mlp()
    content._metadata["fc1"]["path"] = path
    with pytest.raises(RuntimeError, match=message):
        model.load_state_dict(content)


def test_a_compiled_model_takes_the_path_that_was_loaded():
    model, other = trained_mlp(), adapted_mlp()
    compiled = torch.compile(other, backend="eager", fullgraph=True)
    compiled(inputs())
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(compiled(inputs()), model(inputs()))


def test_averages_of_weights_keep_the_paths_of_their_making_until_others_are_set():
    from timm.utils import ModelEmaV3

    model = trained_mlp()
    averaged = torch.optim.swa_utils.AveragedModel(model)
    ema = ModelEmaV3(model)
    set_paths(model, dict.fromkeys(get_paths(model), PathConfig(B="lora_1")))
    averaged.update_parameters(model)
    ema.update(model)
    assert get_paths(averaged.module) == get_paths(ema.module) == get_paths(trained_mlp())  # those of their making
    for copied in (averaged.module, ema.module):
        set_paths(copied, get_paths(model))
        assert_same(model, copied)
    other = torch.optim.swa_utils.AveragedModel(adapted_mlp())
    other.load_state_dict(averaged.state_dict())
    assert_same(other.module, averaged.module)


def test_copies_and_pickles_of_a_model_still_carry_them():
    model = copy.deepcopy(trained_mlp())
    other = adapted_mlp()
    other.load_state_dict(model.state_dict())
    assert_same(model, other)


def test_a_resized_weight_is_refused_where_it_is_put_in():
    layer = GLoRALinear(4, 3, rank=2)
    with pytest.raises(ValueError, match=r"weight: expected \(3, 4\), which the layer was adapted for, got \(5, 4\)"):
        layer.weight = nn.Parameter(torch.zeros(5, 4))
    layer.weight = nn.Parameter(torch.zeros(3, 4), requires_grad=False)
    assert torch.equal(layer(torch.ones(2, 4)), layer.bias.expand(2, 3))


def test_resize_token_embeddings_with_an_adapted_tied_head_fails_at_once():
    transformers = pytest.importorskip("transformers")
    sizes = dict.fromkeys(("hidden_size", "intermediate_size", "max_position_embeddings"), 16)
    config = transformers.LlamaConfig(
        vocab_size=40, num_hidden_layers=1, num_attention_heads=2, tie_word_embeddings=True, **sizes
    )
    model = glora.inject(transformers.LlamaForCausalLM(config), 2, targets=("lm_head",))
    with pytest.raises(ValueError, match=r"weight: expected \(40, 16\), .* resize the model before glora.inject"):
        model.resize_token_embeddings(48)


def test_loading_leaves_a_model_alone_that_takes_nothing():
    model = trained_mlp()
    with unchanged(model):
        model.load_state_dict({}, strict=False)
    assert same_bits(state(model), state(trained_mlp()))


def test_a_load_that_fails_sets_no_path_of_the_layer_that_does_not_fit():
    model, other = adapted_mlp(), adapted_mlp(rank=3)
    paths = glora.get_paths(model)
    glora.set_paths(other, PathConfig("constant"))
    with pytest.raises(RuntimeError, match="size mismatch"):
        model.load_state_dict(other.state_dict())
    assert glora.get_paths(model) == paths
