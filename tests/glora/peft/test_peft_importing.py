"""What PEFT saved we load, and compute the same; nothing is changed before all of it is checked."""

import json
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import glora
from glora.peft import import_peft
from tests.data import make_adapters
from tests.glora.peft.peft_toys import KINDS, adapted, glora_config, hira_config, tokens
from tests.glora.toys import adapted_mlp, mlp, randomize, same_bits, state, unchanged

FROZEN = Path(__file__).parents[2] / "data" / "adapters" / "peft"
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("kinds", KINDS, ids="-".join)
def test_computes_what_peft_does(tmp_path, kinds, bias):
    theirs = adapted(glora_config(kinds), mlp(bias=bias))
    theirs.save_pretrained(tmp_path)
    ours = import_peft(mlp(bias=bias), tmp_path)
    torch.testing.assert_close(ours(tokens()), theirs(tokens()))
    layers = glora.glora_layers(ours)
    assert list(layers) == ["fc1", "fc2"]
    assert {layer.rank for layer in layers.values()} == {2}


def test_only_the_adapter_is_trained_then(tmp_path):
    adapted(glora_config()).save_pretrained(tmp_path)
    model = import_peft(mlp(), tmp_path)
    trained = {id(p) for p in glora.trainable_parameters(model)}
    assert trained == {id(p) for layer in glora.glora_layers(model).values() for p in layer.support_parameters()}


def test_modules_that_peft_saved_whole(tmp_path):
    theirs = adapted(glora_config(modules_to_save=["head"]))
    theirs.base_model.model.head.modules_to_save["default"].weight.data.mul_(2)
    theirs.save_pretrained(tmp_path)
    model = import_peft(mlp(), tmp_path)
    torch.testing.assert_close(model(tokens()), theirs(tokens()))
    assert model.head.weight.requires_grad
    assert not torch.equal(model.head.weight, mlp().head.weight)


@pytest.mark.parametrize("kinds", [KINDS[0], ("vector", "vector", "vector"), ("constant", "none", "constant")], ids=str)
def test_into_a_model_that_has_glora(tmp_path, kinds):
    """At a larger rank: the rest of its storages stays."""
    theirs = adapted(glora_config(kinds))
    theirs.save_pretrained(tmp_path)
    model = adapted_mlp(rank=4)
    randomize(model)
    before = state(model)
    model.head.load_state_dict(mlp().head.state_dict())
    assert import_peft(model, tmp_path) is model
    torch.testing.assert_close(model(tokens()), theirs(tokens()))
    assert torch.equal(model.fc1.Ad[:, 2:], before["fc1.Ad"][:, 2:])
    assert torch.equal(model.fc1.Bu[2:], before["fc1.Bu"][2:])
    assert same_bits({"fc1.weight": model.fc1.weight.detach()}, {"fc1.weight": before["fc1.weight"]})


def test_a_named_adapter_lies_in_a_folder_of_its_own(tmp_path):
    model = adapted(glora_config())
    model.add_adapter("other", glora_config(("vector", "none", "vector")))
    model.save_pretrained(tmp_path)
    model.set_adapter("other")
    torch.testing.assert_close(import_peft(mlp(), tmp_path / "other")(tokens()), model(tokens()))


def test_peft_reads_the_frozen_folder_as_we_do():
    """Written once by PEFT 0.21.2; test_frozen_adapters.py holds what we read against the formula."""
    assert json.loads((FROZEN / CONFIG).read_text())["peft_version"] == "0.21.2"
    x, model = make_adapters.fixed_input(), make_adapters.fixed_model()
    theirs = peft.PeftModel.from_pretrained(make_adapters.fixed_model(), FROZEN)
    torch.testing.assert_close(import_peft(model, FROZEN)(x), theirs(x))


# -- refused -----------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    adapted(glora_config(("none", "lora", "vector"))).save_pretrained(tmp_path)
    return tmp_path


def refuse(model, folder, error, message):
    parameters = [(name, id(p), p.requires_grad) for name, p in model.named_parameters()]
    with unchanged(model), pytest.raises(error, match=message):
        import_peft(model, folder)
    assert parameters == [(name, id(p), p.requires_grad) for name, p in model.named_parameters()]


def change_config(folder, **changes):
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, **changes}))


def change_tensors(folder, change):
    tensors = load_file(folder / TENSORS)
    change(tensors)
    save_file(tensors, folder / TENSORS)


@pytest.mark.parametrize("name", [CONFIG, TENSORS])
def test_a_missing_file(folder, name):
    (folder / name).unlink()
    refuse(mlp(), folder, FileNotFoundError, f"folder: expected a PEFT adapter with .* no {name} in ")


@pytest.mark.parametrize("content", ["{", "[]", "3", '{"peft_type": "GLORA"}'])
def test_a_damaged_config(folder, content):
    (folder / CONFIG).write_text(content)
    refuse(mlp(), folder, ValueError, f"{CONFIG}: expected the configuration of a GLoRA adapter")


def test_damaged_tensors(folder):
    (folder / TENSORS).write_bytes((folder / TENSORS).read_bytes()[:-9])
    refuse(mlp(), folder, ValueError, f"{TENSORS}: expected a safetensors file, it is damaged")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "LORA"}, "expected a GLORA adapter, got 'LORA'"),
        ({"r": 0}, "got 'GLORA' of r=0"),
        ({"r": "2"}, "got 'GLORA' of r='2'"),
        ({"config_C": "constant"}, "unknown kinds {'config_C': 'constant'}"),
        ({"config_A_B": ["lora"]}, r"unknown kinds {'config_A_B': \['lora'\]}"),
        ({"bias": "all"}, "expected bias 'none', got 'all'"),
        ({"r": 3}, r"shapes that differ \['fc1.glora_C.Xd: \(6, 3\) in the model, \(6, 2\) in the file"),
        ({"config_D_E": "constant"}, r"shapes that differ \['fc1.glora_D.X: \(1,\) in the model, \(8,\) in the file"),
        ({"config_C": "none"}, r"missing tensors \['fc1.glora_C.zeros', 'fc2.glora_C.zeros'\], unknown .*glora_C.Xd"),
    ],
)
def test_another_config(folder, changes, message):
    change_config(folder, **changes)
    refuse(mlp(), folder, ValueError, message)


def test_another_method(tmp_path):
    adapted(hira_config()).save_pretrained(tmp_path)
    refuse(mlp(), tmp_path, ValueError, "expected the configuration of a GLoRA adapter")


def filled(tensors):
    tensors["base_model.model.fc1.glora_A.zeros"][0, 0] = 1


def whole_numbers(tensors):
    tensors["base_model.model.fc1.glora_D.X"] = tensors["base_model.model.fc1.glora_D.X"].int()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("base_model.model.fc1.glora_D.X"), r"missing tensors \['fc1.glora_D.X'\]"),
        (lambda t: t.update({"base_model.model.tail.weight": torch.ones(2)}), r"unknown tensors \['tail.weight'\]"),
        (lambda t: t.update({"base_model.model.fc1.weight": torch.ones(8, 6)}), r"unknown tensors \['fc1.weight'\]"),
        (
            lambda t: t.update({"base_model.model.head.bias": torch.ones(2)}),
            r"head.bias: \(3,\) in the model, \(2,\) in the file",
        ),
        (lambda t: t.update({"fc1.glora_D.X": torch.ones(8)}), r"expected names that start with 'base_model.model.'"),
        (lambda t: t.clear(), "expected the tensors of a GLoRA adapter, got none"),
        (filled, r"zeros for the kind none; not so: \['fc1.glora_A.zeros'\]"),
        (whole_numbers, r"expected finite tensors of a floating dtype, got 'fc1.glora_D.X \(torch.int32\)'$"),
    ],
)
def test_other_tensors(folder, change, message):
    change_tensors(folder, change)
    refuse(mlp(), folder, ValueError, message)


def test_another_model(folder):
    refuse(nn.Sequential(nn.Linear(6, 8)), folder, ValueError, r"expected an nn\.Linear at \['fc1', 'fc2'\]")
    wider = mlp()
    wider.fc1 = nn.Linear(6, 9)
    refuse(wider, folder, ValueError, r"fc1.glora_A.zeros: \(9, 6\) in the model, \(8, 6\) in the file")
    without_bias = mlp(bias=False)
    refuse(without_bias, folder, ValueError, r"missing tensors \['fc1.glora_C.zeros', 'fc1.glora_D.zeros'")
    with pytest.raises(ValueError, match="model: expected real tensors, got parameters on meta"):
        import_peft(mlp().to("meta"), folder)


def test_another_model_with_glora(folder):
    small = adapted_mlp(rank=1)
    refuse(small, folder, ValueError, r"missing \[\], unknown \[\], differing \['fc1: rank 1 hadamard in the model, 2")
    matmul = adapted_mlp(product="matmul")
    refuse(matmul, folder, ValueError, r"differing \['fc1: rank 2 matmul in the model, 2 hadamard in the file', '")
    fewer = glora.inject(mlp(), 2, targets=["fc1"])
    refuse(fewer, folder, ValueError, r"missing \[\], unknown \['fc2'\]")
    more = glora.inject(mlp(), 2, heads=())
    refuse(more, folder, ValueError, r"missing \['head'\], unknown \[\]")
