"""Adapters on disk: round trips, and everything that must be refused before the model is touched."""

import json
from collections import OrderedDict

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import glora.files
from glora import GLoRALinear, get_paths, glora_layers, inject, load_adapter, save_adapter, set_paths
from tests.glora.toys import (
    IN_FEATURES,
    adapted_mlp,
    generator,
    mlp,
    randomize,
    same_bits,
    seeded,
    state,
    tiny_vit,
    trained_mlp,
    unchanged,
)

SUPPORT = ("Ad", "Au", "Bd", "Bu", "Cd", "Cu", "D", "E")


@pytest.fixture
def file(tmp_path):
    return tmp_path / "adapter.safetensors"


@pytest.fixture
def saved(file):
    save_adapter(trained_mlp(), file)
    return file


def inputs():
    return torch.randn(5, IN_FEATURES, generator=generator(2))


# -- round trips -----------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [adapted_mlp, mlp], ids=["injected", "plain"])
def test_round_trip(saved, make):
    model, original = make(), trained_mlp()
    assert load_adapter(model, saved) is model
    assert same_bits(state(model), state(original))
    assert get_paths(model) == get_paths(original)
    assert torch.equal(model(inputs()), original(inputs()))


@pytest.mark.parametrize("product", ["hadamard", "matmul"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_round_trip_of_both_products(file, product, bias):
    original = trained_mlp(rank=3, product=product, bias=bias)
    save_adapter(original, file)
    model = load_adapter(mlp(bias=bias), file)
    assert {layer.product for layer in glora_layers(model).values()} == {product}
    assert torch.equal(model(inputs()), original(inputs()))


def test_round_trip_of_a_vit(file):
    original = inject(tiny_vit(), 2)
    randomize(original)
    save_adapter(original, file)
    model = tiny_vit()
    model.load_state_dict({name: p for name, p in original.state_dict().items() if name in model.state_dict()})
    x = torch.randn(2, 1, 8, 8, generator=generator())
    assert torch.equal(load_adapter(model, file)(x), original(x))


def test_only_support_and_other_trained_tensors_are_in_the_file(saved):
    support = [f"{fc}.{name}" for fc in ("fc1", "fc2") for name in SUPPORT]
    assert set(load_file(saved)) == {*support, "head.weight", "head.bias"}


def test_a_frozen_head_is_not_in_the_file(file):
    model = trained_mlp()
    model.head.requires_grad_(False)
    save_adapter(model, file)
    assert "head.weight" not in load_file(file)
    with pytest.warns(UserWarning, match=r"saved with another base: 'head.weight', 'head.bias' differ"):
        model = load_adapter(mlp(), file)
    assert torch.equal(model.head.weight, mlp().head.weight)


def test_the_base_is_compared_where_it_has_the_dtype(saved):
    model = mlp()
    with torch.no_grad():
        model.fc2.bias[3] += 1
    with pytest.warns(UserWarning, match=r"saved with another base: 'fc2.bias' differ"):
        load_adapter(model, saved)
    load_adapter(mlp().half(), saved)  # rounded: nothing can be said


def test_a_trainable_head_has_to_be_in_the_file(file):
    """Else a fresh head would pass for a trained one."""
    model = trained_mlp()
    model.head.requires_grad_(False)
    save_adapter(model, file)
    with pytest.raises(ValueError, match=r"missing tensors \['head.bias', 'head.weight'\]"):
        load_adapter(adapted_mlp(), file)


def test_a_model_on_meta_is_refused(saved):
    with torch.device("meta"):
        model = mlp()
    with pytest.raises(ValueError, match="model: expected real tensors, got parameters on meta"):
        load_adapter(model, saved)


def test_support_frozen_by_hand_is_in_the_file(file):
    model = trained_mlp()
    model.requires_grad_(False)
    save_adapter(model, file)
    assert set(load_file(file)) == {f"{fc}.{name}" for fc in ("fc1", "fc2") for name in SUPPORT}


def test_flags_after_loading_into_a_plain_model(saved):
    model = load_adapter(mlp(), saved)
    expected = {f"{fc}.{name}" for fc in ("fc1", "fc2") for name in SUPPORT} | {"head.weight", "head.bias"}
    assert {name for name, p in model.named_parameters() if p.requires_grad} == expected


def test_loading_keeps_a_frozen_head_frozen(saved):
    model = mlp()
    model.head.requires_grad_(False)
    load_adapter(model, saved)
    assert not model.head.weight.requires_grad
    assert torch.equal(model.head.weight, trained_mlp().head.weight)


def test_loading_into_a_half_model_keeps_its_dtypes(saved):
    model = load_adapter(mlp().bfloat16(), saved)
    assert model.fc1.weight.dtype == model.head.weight.dtype == torch.bfloat16
    assert model.fc1.Ad.dtype == torch.float32


def nested():
    """The name of one layer is a part of another's."""
    with seeded():
        inner = nn.Sequential(OrderedDict(fc=nn.Linear(4, 4)))
        return nn.Sequential(OrderedDict(fc=nn.Linear(4, 4), encoder=inner))


def test_a_bare_linear_layer_cannot_be_replaced(file):
    with seeded():
        layer = GLoRALinear(4, 4, rank=2)
    randomize(layer)
    save_adapter(layer, file)
    with (
        unchanged(linear := nn.Linear(4, 4)),
        pytest.raises(ValueError, match=r"expected layers that GLoRA adapts at \[''\]"),
    ):
        load_adapter(linear, file)
    with seeded():
        other = GLoRALinear(4, 4, rank=2)
    assert torch.equal(load_adapter(other, file).Ad, layer.Ad)


def test_exactly_the_layers_of_the_file_are_adapted(file):
    save_adapter(inject(nested(), 2, exclude=("encoder",), heads=()), file)
    assert list(glora_layers(load_adapter(nested(), file))) == ["fc"]


def test_a_shared_layer(file):
    def model():
        with seeded():
            shared = nn.Linear(4, 4)
        return nn.Sequential(shared, nn.ReLU(), shared)

    save_adapter(inject(model(), 2), file)
    loaded = load_adapter(model(), file)
    assert loaded[0] is loaded[2]


def test_description_is_versioned_json(saved):
    with safe_open(saved, "pt") as opened:
        description = json.loads(opened.metadata()["glora"])
    paths = get_paths(trained_mlp())
    base = description.pop("base")
    assert sorted(base) == ["fc1.bias", "fc1.weight", "fc2.bias", "fc2.weight"]
    assert all(mark.startswith("torch.float32:") for mark in base.values())
    assert description == {
        "format": 2,
        "product": "hadamard",
        "layers": {name: {"rank": 2, "path": path.to_dict()} for name, path in paths.items()},
    }


@pytest.mark.parametrize(
    "damage",
    [
        lambda d: d.pop("layers"),
        lambda d: d.pop("product"),
        lambda d: d.update(product="kronecker"),
        lambda d: d.update(layers={}),
        lambda d: d.update(layers=[]),
        lambda d: d["layers"]["fc1"].update(rank="2"),
        lambda d: d["layers"]["fc1"].pop("path"),
        lambda d: d["layers"]["fc1"]["path"].update(A="lora_9"),
        lambda d: d["layers"]["fc1"]["path"].update(C="constant"),
    ],
)
def test_damaged_description_is_refused(saved, damage):
    with safe_open(saved, "pt") as opened:
        description = json.loads(opened.metadata()["glora"])
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}
    damage(description)
    save_file(tensors, saved, {"glora": json.dumps(description)})
    for model in (mlp(), trained_mlp(seed=1)):
        with unchanged(model), pytest.raises(ValueError, match="its description is damaged"):
            load_adapter(model, saved)


def test_file_may_be_given_as_text(file):
    save_adapter(trained_mlp(), str(file))
    load_adapter(mlp(), str(file))


# -- saving is atomic ------------------------------------------------------------------------------


def test_a_failing_writer_leaves_the_old_file(saved, monkeypatch):
    before = saved.read_bytes()

    def fail(descriptor):
        raise OSError("disk full")

    monkeypatch.setattr(glora.files.os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        save_adapter(trained_mlp(seed=1), saved)
    assert saved.read_bytes() == before
    assert list(saved.parent.iterdir()) == [saved]


def test_saving_again_replaces(saved):
    save_adapter(trained_mlp(seed=1), saved)
    assert same_bits(state(load_adapter(mlp(), saved)), state(trained_mlp(seed=1)))


def test_saving_onto_the_file_it_came_from(saved):
    model, before = load_adapter(mlp(), saved), saved.read_bytes()
    save_adapter(model, saved)
    assert saved.read_bytes() == before


def test_nothing_to_save(file):
    with pytest.raises(ValueError, match="at least one adapted layer, found none"):
        save_adapter(mlp(), file)
    assert not file.exists()


# -- refused before anything is changed --------------------------------------------------------------

both_models = pytest.mark.parametrize("make", [trained_mlp, mlp], ids=["injected", "plain"])


def assert_refused(model, file, message, error=ValueError):
    with unchanged(model), pytest.raises(error, match=message):
        load_adapter(model, file)


@both_models
def test_refuses_a_missing_file(make, file):
    assert_refused(make(), file, "expected an adapter file, found none at", FileNotFoundError)


@both_models
def test_refuses_no_path(make):
    assert_refused(make(), None, "^file: expected the path of a file, got NoneType", TypeError)
    with pytest.raises(TypeError, match=r"^file: expected the path of a file, got NoneType"):
        save_adapter(trained_mlp(), None)


@both_models
def test_refuses_a_folder_and_names_the_file_in_it(make, tmp_path):
    assert_refused(make(), tmp_path, "expected an adapter file, found none at", FileNotFoundError)
    save_adapter(trained_mlp(), tmp_path / "adapter.safetensors")
    message = r"^file: expected an adapter file, got the folder of one: pass '.*adapter\.safetensors'$"
    assert_refused(make(), tmp_path, message, FileNotFoundError)


@both_models
@pytest.mark.parametrize("share", [0, 0.02, 0.5, 0.99])
def test_refuses_a_truncated_file(make, saved, share):
    content = saved.read_bytes()
    saved.write_bytes(content[: int(share * len(content))])
    assert_refused(make(), saved, "expected a safetensors file, it is damaged or something else")


@both_models
@pytest.mark.parametrize("seed", range(3))
def test_refuses_random_bytes(make, file, seed):
    noise = torch.randint(256, (1000,), generator=generator(seed), dtype=torch.uint8)
    file.write_bytes(bytes(noise.tolist()))
    assert_refused(make(), file, "expected a safetensors file")


@both_models
@pytest.mark.parametrize("metadata", [None, {}, {"format": "pt"}, {"glora": "no JSON"}, {"glora": "[]"}], ids=str)
def test_refuses_safetensors_of_others(make, file, metadata):
    save_file(state(trained_mlp()), file, metadata)
    assert_refused(make(), file, "expected a GLoRA adapter, got a safetensors file without its description")


def edited(file, change):
    """The same file with another description."""
    with safe_open(file, "pt") as opened:
        description = json.loads(opened.metadata()["glora"])
    change(description)
    save_file(load_file(file), file, {"glora": json.dumps(description)})


@both_models
@pytest.mark.parametrize("version", [5, 0, "1", None])
def test_refuses_another_format(make, saved, version):
    edited(saved, lambda description: description.update(format=version))
    assert_refused(make(), saved, f"expected adapter format 1 to 4, got {version!r}; a newer glora may read it")


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: trained_mlp(rank=4), r"differing \['fc1: rank 4 hadamard in the model, 2 hadamard in the file'"),
        (lambda: trained_mlp(product="matmul"), r"fc2: rank 2 matmul in the model, 2 hadamard in the file"),
        (lambda: inject(mlp(), 2, targets=["fc1"]), r"missing \[\], unknown \['fc2'\]"),
        (lambda: inject(mlp(), 2, heads=()), r"missing \['head'\], unknown \[\]"),
        (lambda: inject(tiny_vit(), 2), r"missing \['blocks.0.attn.proj', .*unknown \['fc1', 'fc2'\]"),
    ],
    ids=["rank", "product", "fewer-layers", "more-layers", "vit"],
)
def test_refuses_other_layers(saved, model, message):
    assert_refused(model(), saved, message)


def replaced(name, module):
    model = mlp()
    setattr(model, name, module)
    return model


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            lambda: nn.Sequential(nn.Linear(4, 4)),
            r"made for another model: expected layers that GLoRA adapts at \['fc1', 'fc2'\]",
        ),
        (
            lambda: replaced("fc2", nn.Identity()),
            r"made for another model: expected layers that GLoRA adapts at \['fc2'\]",
        ),
    ],
    ids=["other-names", "no-linear"],
)
def test_refuses_a_plain_model_without_the_layers(saved, model, message):
    assert_refused(model(), saved, message)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: replaced("fc2", nn.Linear(9, 5)), r"fc2.Bu: \(2, 9\) in the model, \(2, 8\) in the file"),
        (lambda: replaced("head", nn.Linear(5, 4)), r"head.bias: \(4,\) in the model, \(3,\) in the file"),
        (lambda: replaced("head", nn.Identity()), r"unknown tensors \['head.bias', 'head.weight'\]"),
    ],
    ids=["other-layer-shape", "other-classes", "no-head"],
)
@pytest.mark.parametrize("prepare", [lambda model: model, lambda model: inject(model, 2)], ids=["plain", "injected"])
def test_refuses_other_shapes(saved, model, message, prepare):
    assert_refused(prepare(model()), saved, message)


@both_models
def test_refuses_a_file_without_some_tensors(make, saved):
    with safe_open(saved, "pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(saved)
    del tensors["fc1.Au"], tensors["fc2.E"]
    save_file(tensors, saved, metadata)
    assert_refused(make(), saved, r"missing tensors \['fc1.Au', 'fc2.E'\]")


def test_loading_after_a_refusal_works(saved):
    model = trained_mlp(seed=3)
    content = saved.read_bytes()
    saved.write_bytes(content[:-1])
    assert_refused(model, saved, "damaged")
    saved.write_bytes(content)
    assert same_bits(state(load_adapter(model, saved)), state(trained_mlp()))


def test_paths_are_those_of_the_file(saved):
    model = trained_mlp(seed=5)
    set_paths(model, get_paths(adapted_mlp()))
    assert get_paths(load_adapter(model, saved)) == get_paths(trained_mlp())
