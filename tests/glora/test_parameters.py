"""What is trained, and how much of it a path reads."""

import pytest
import torch
from torch.nn.utils import prune

import glora
from glora import PathConfig, count_parameters, inject, trainable_parameters
from tests.glora.toys import adapted_mlp, mlp

PATHS = {"fc1": PathConfig("lora_1", "none", "vector", "constant", "none"), "fc2": PathConfig(D="vector")}


def names_of(model, parameters):
    names = {id(p): name for name, p in model.named_parameters()}
    return [names[id(p)] for p in parameters]


def test_support_tensors_and_the_head_are_trained():
    model = adapted_mlp()
    support = [f"{fc}.{p}" for fc in ("fc1", "fc2") for p in ("Ad", "Au", "Bd", "Bu", "Cd", "Cu", "D", "E")]
    assert names_of(model, trainable_parameters(model)) == [*support, "head.weight", "head.bias"]


def test_with_paths_only_what_they_read():
    model = adapted_mlp()
    expected = ["fc1.Ad", "fc1.Au", "fc1.Cd", "fc1.D", "fc2.D", "head.weight", "head.bias"]
    assert names_of(model, trainable_parameters(model, PATHS)) == expected


def test_d_of_a_layer_without_bias_is_not_read():
    model = adapted_mlp(bias=False)
    assert "fc2.D" not in names_of(model, trainable_parameters(model, PATHS))


def test_a_model_without_layers_trains_what_requires_grad():
    model = mlp()
    model.fc1.requires_grad_(False)
    expected = ["fc2.weight", "fc2.bias", "head.weight", "head.bias"]
    assert names_of(model, trainable_parameters(model)) == expected


def test_what_was_frozen_by_hand_is_not_trained():
    model = adapted_mlp()
    model.fc1.Ad.requires_grad_(False)
    assert "fc1.Ad" not in names_of(model, trainable_parameters(model))
    assert "fc1.Ad" not in names_of(model, trainable_parameters(model, PATHS))


def test_counts_the_slices_that_are_read():
    model = adapted_mlp(rank=2)  # fc1 is (8, 6), fc2 is (5, 8)
    assert count_parameters(model, PATHS) == (8 + 6) + 6 + 1 + 5


def test_counts_the_current_paths_by_default():
    model = adapted_mlp(rank=2)
    glora.set_paths(model, PATHS)
    assert count_parameters(model) == count_parameters(model, PATHS)


def test_a_shared_layer_counts_once():
    shared = torch.nn.Linear(4, 4)
    model = inject(torch.nn.Sequential(shared, torch.nn.ReLU(), shared), 2)
    assert count_parameters(model, {"0": PathConfig(B="vector")}) == 4


@pytest.mark.parametrize("call", [count_parameters, trainable_parameters])
@pytest.mark.parametrize("paths", [{}, {"fc1": PathConfig()}, {**PATHS, "head": PathConfig()}], ids=len)
def test_refuses_paths_of_another_model(call, paths):
    with pytest.raises(ValueError, match=r"^paths: expected exactly the 2 adapted layers"):
        call(adapted_mlp(), paths)


def test_a_model_without_layers_has_nothing_to_count():
    with pytest.raises(ValueError, match="found none"):
        count_parameters(mlp())


def test_drops_what_is_not_read_and_nothing_that_is():
    """A tensor tied to one that is read is read; a pruned one is no parameter, and is passed over."""
    model = adapted_mlp()
    glora.set_paths(model, PathConfig("lora_2", "vector"))
    layer = model.fc1
    layer.Bu = layer.Au
    prune.identity(layer, "Cd")
    for parameter in layer.parameters():
        parameter.grad = torch.zeros_like(parameter)
    glora.drop_unread_gradients(model)
    dropped = {name for name, p in layer.named_parameters() if p.requires_grad and p.grad is None}
    assert dropped == {"Cu", "D", "E"}
    assert {id(p) for p in layer.support_parameters(PathConfig(C="lora_2"))} == {id(layer.Cd), id(layer.Cu)}
