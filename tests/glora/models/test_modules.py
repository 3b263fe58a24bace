"""Finding and exchanging modules."""

from collections import OrderedDict

import pytest
import torch
from torch import nn

from glora import GLoRALinear, glora_layers
from glora.models.modules import matches, replace_modules, replaced_modules, require_layers
from tests.glora.toys import adapted_mlp, mlp


@pytest.mark.parametrize(
    ("name", "pattern"),
    [
        ("head", "head"),
        ("head.fc", "head"),
        ("blocks.3.attn.qkv", "qkv"),
        ("blocks.3.attn.qkv", "attn.qkv"),
        ("blocks.1.mlp.fc1", "blocks.1"),
        ("a.b.a.c", "a.c"),
    ],
)
def test_matches(name, pattern):
    assert matches(name, pattern)


@pytest.mark.parametrize(
    ("name", "pattern"),
    [
        ("overhead", "head"),
        ("head_drop", "head"),
        ("blocks.10", "blocks.1"),
        ("blocks.1", "blocks.10"),
        ("blocks.3.attn.qkv", "blocks.attn"),
        ("fc", "head.fc"),
        ("a.b", "b.a"),
    ],
)
def test_does_not_match(name, pattern):
    assert not matches(name, pattern)


def test_layers_in_the_order_of_the_model():
    layers = glora_layers(adapted_mlp())
    assert list(layers) == ["fc1", "fc2"]
    assert all(type(layer) is GLoRALinear for layer in layers.values())


def test_no_layers_is_an_empty_answer_or_an_error():
    assert glora_layers(mlp()) == {}
    with pytest.raises(ValueError, match=r"call glora.inject\(model\) first"):
        require_layers(mlp())


def nested():
    """``shared`` stands in two places, once inside another module."""
    shared = nn.ReLU()
    inner = nn.Sequential(OrderedDict(first=nn.Identity(), second=shared))
    return nn.Sequential(OrderedDict(one=shared, inner=inner, last=nn.Tanh())), shared


def test_replaces_everywhere_and_keeps_the_order():
    model, shared = nested()
    new = nn.Sigmoid()
    replace_modules(model, {shared: new})
    assert model.one is model.inner.second is new
    assert [name for name, _ in model.named_children()] == ["one", "inner", "last"]


def test_replaces_beside_an_empty_place():
    model, shared = nested()
    model.register_module("nothing", None)
    replace_modules(model, {shared: nn.Sigmoid()})
    assert model.nothing is None


def test_replaced_for_a_block_only():
    model, shared = nested()
    new = nn.Sigmoid()
    with replaced_modules(model, {shared: new}):
        assert model.one is model.inner.second is new
    assert model.one is model.inner.second is shared


def test_put_back_after_an_error():
    model, shared = nested()
    with pytest.raises(KeyError), replaced_modules(model, {shared: nn.Sigmoid()}):
        raise KeyError
    assert model.one is model.inner.second is shared


def test_replacement_takes_part_in_forward():
    model, shared = nested()
    with replaced_modules(model, {shared: nn.Identity()}):
        assert torch.equal(model(torch.tensor(-1.0)), torch.tanh(torch.tensor(-1.0)))
    assert model(torch.tensor(-1.0)) == 0
