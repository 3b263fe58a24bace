"""Backbones: weights from every kind of file, and a head for the task."""

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from glora.backbones import features, load_backbone
from tests.glora.toys import same_bits, seeded

NAME = "vit_tiny_patch16_224"
OPTIONS = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}


def pretrained(classes=5):
    """Every tensor random, biases and norms too."""
    model = timm.create_model(NAME, num_classes=classes, **OPTIONS)
    with torch.no_grad(), seeded(1):
        for parameter in model.parameters():
            parameter.normal_()
    return model


def load(file, classes=5):
    return load_backbone(NAME, classes, weights=file, options=OPTIONS)


def as_google_has_it(model):
    """The arrays of a ViT in the layout of ``ViT-B_16.npz``: kernels are (in, out), heads apart."""
    heads, width = OPTIONS["num_heads"], OPTIONS["embed_dim"]
    state = {name: tensor.detach().numpy() for name, tensor in model.state_dict().items()}
    arrays = {
        "embedding/kernel": state["patch_embed.proj.weight"].transpose(2, 3, 1, 0),
        "embedding/bias": state["patch_embed.proj.bias"],
        "cls": state["cls_token"],
        "Transformer/posembed_input/pos_embedding": state["pos_embed"],
        "Transformer/encoder_norm/scale": state["norm.weight"],
        "Transformer/encoder_norm/bias": state["norm.bias"],
        "head/kernel": state["head.weight"].T,
        "head/bias": state["head.bias"],
    }
    for i in range(OPTIONS["depth"]):
        ours, theirs = f"blocks.{i}.", f"Transformer/encoderblock_{i}/"
        attention = f"{theirs}MultiHeadDotProductAttention_1/"
        for norm, name in (("norm1", "LayerNorm_0"), ("norm2", "LayerNorm_2")):
            arrays[f"{theirs}{name}/scale"] = state[f"{ours}{norm}.weight"]
            arrays[f"{theirs}{name}/bias"] = state[f"{ours}{norm}.bias"]
        weights, biases = np.split(state[f"{ours}attn.qkv.weight"], 3), np.split(state[f"{ours}attn.qkv.bias"], 3)
        for name, weight, bias in zip(("query", "key", "value"), weights, biases):
            arrays[f"{attention}{name}/kernel"] = weight.T.reshape(width, heads, -1)
            arrays[f"{attention}{name}/bias"] = bias.reshape(heads, -1)
        arrays[f"{attention}out/kernel"] = state[f"{ours}attn.proj.weight"].T.reshape(heads, -1, width)
        arrays[f"{attention}out/bias"] = state[f"{ours}attn.proj.bias"]
        for layer, name in (("fc1", "Dense_0"), ("fc2", "Dense_1")):
            arrays[f"{theirs}MlpBlock_3/{name}/kernel"] = state[f"{ours}mlp.{layer}.weight"].T
            arrays[f"{theirs}MlpBlock_3/{name}/bias"] = state[f"{ours}mlp.{layer}.bias"]
    return arrays


WRITERS = {
    "plain.pth": lambda model, file: torch.save(model.state_dict(), file),
    "model.pth": lambda model, file: torch.save({"model": model.state_dict(), "epoch": 3}, file),
    "state_dict.pt": lambda model, file: torch.save({"state_dict": model.state_dict()}, file),
    "wrapped.bin": lambda model, file: torch.save({f"module.{n}": t for n, t in model.state_dict().items()}, file),
    "plain.safetensors": lambda model, file: save_file(model.state_dict(), file),
    "google.npz": lambda model, file: np.savez(file, **as_google_has_it(model)),
}


@pytest.fixture(params=WRITERS)
def file(request, tmp_path):
    path = tmp_path / request.param
    WRITERS[request.param](pretrained(), path)
    return path


def test_every_tensor_is_that_of_the_file(file):
    assert same_bits(load(file).state_dict(), pretrained().state_dict())


def test_a_head_of_other_classes_is_drawn_anew(file):
    with seeded(7):
        model = load(file, classes=3)
    expected = pretrained().state_dict()
    found = model.state_dict()
    assert found.pop("head.weight").shape == (3, 16)
    assert found.pop("head.bias").shape == (3,)
    assert same_bits(found, {name: expected[name] for name in found})
    with seeded(7):
        assert same_bits(load(file, classes=3).state_dict(), model.state_dict())


@pytest.mark.parametrize("size", [48, 24])
def test_positions_of_another_image_size_are_interpolated(file, size):
    model = load_backbone(NAME, 5, weights=file, options={**OPTIONS, "img_size": size})
    assert model.pos_embed.shape == (1, (size // 8) ** 2 + 1, 16)
    assert model(torch.zeros(1, 3, size, size)).shape == (1, 5)
    assert same_bits({"": model.blocks[1].mlp.fc1.weight}, {"": pretrained().blocks[1].mlp.fc1.weight})


def test_random_weights_are_those_of_the_generator():
    with seeded(3):
        one = load(None)
    with seeded(3):
        other = timm.create_model(NAME, num_classes=5, **OPTIONS)
    assert same_bits(one.state_dict(), other.state_dict())


def test_drop_path_acts_in_training_alone():
    model = load_backbone(NAME, 5, drop_path=0.5, options=OPTIONS)
    assert model.blocks[1].drop_path1.drop_prob == 0.5
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(model.eval()(x), model(x))


def test_features_are_what_the_head_sees():
    model, x = pretrained().eval(), torch.randn(2, 3, 32, 32)
    assert torch.equal(model.head(features(model, x)), model(x))


@pytest.mark.parametrize(("name", "width"), [("convnext_atto", 320), ("swin_tiny_patch4_window7_224", 768)])
def test_features_of_other_architectures(name, width):
    model = timm.create_model(name, num_classes=3).eval()
    x = torch.randn(1, 3, 224 if "swin" in name else 32, 224 if "swin" in name else 32)
    assert features(model, x).shape == (1, width)
    assert torch.allclose(model.get_classifier()(features(model, x)), model(x))


def test_a_state_of_convnext(tmp_path):
    """Whose head is ``head.fc``, beside ``head.norm``, which is loaded."""
    model = timm.create_model("convnext_atto", num_classes=5)
    nn.init.normal_(model.head.norm.weight)
    torch.save(model.state_dict(), tmp_path / "a.pth")
    found = load_backbone("convnext_atto", 3, weights=tmp_path / "a.pth")
    assert torch.equal(found.head.norm.weight, model.head.norm.weight)
    assert found.head.fc.weight.shape[0] == 3


def write_damaged(tmp_path):
    state = pretrained().state_dict()
    lacking = {n: t for n, t in state.items() if n != "blocks.1.attn.proj.bias"}
    torch.save(lacking, tmp_path / "lacking.pth")
    torch.save({**state, "more.weight": torch.zeros(1)}, tmp_path / "more.pth")
    torch.save({**state, "norm.weight": torch.zeros(3)}, tmp_path / "shape.pth")
    (tmp_path / "bytes.pth").write_bytes(b"no archive")
    (tmp_path / "bytes.safetensors").write_bytes(b"no archive")
    (tmp_path / "bytes.npz").write_bytes(b"no archive")
    np.savez(tmp_path / "other.npz", a=np.zeros(3))


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("lacking.pth", r"missing tensors \['blocks.1.attn.proj.bias'\], unknown tensors \[\]"),
        ("more.pth", r"missing tensors \[\], unknown tensors \['more.weight'\]"),
        ("shape.pth", "norm.weight"),
        ("bytes.pth", "bytes.pth does not fit VisionTransformer"),
        ("bytes.safetensors", "bytes.safetensors does not fit VisionTransformer"),
        ("bytes.npz", "bytes.npz does not fit VisionTransformer"),
        ("other.npz", "other.npz does not fit VisionTransformer"),
        ("weights.h5", r"expected 'hub' or a file that ends in one of .*weights\.h5"),
    ],
)
def test_refused_files(tmp_path, file, message):
    write_damaged(tmp_path)
    with pytest.raises(ValueError, match=f"(?s)^weights: .*{message}"):
        load(tmp_path / file)


def test_a_missing_file_and_an_unknown_model(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"weights: expected a file, found none at .*a\.npz"):
        load(tmp_path / "a.npz")
    with pytest.raises(ValueError, match=r"name: expected a model of timm .*, got 'vit_enormous'"):
        load_backbone("vit_enormous", 3)


def test_npz_for_another_architecture(tmp_path):
    np.savez(tmp_path / "a.npz", a=np.zeros(1))
    with pytest.raises(ValueError, match=r"reads \.npz files for ViT-like models alone|does not fit"):
        load_backbone("convnext_atto", 3, weights=tmp_path / "a.npz")


def test_a_model_that_timm_has_no_weights_of():
    with pytest.raises(ValueError, match=r"weights: timm could not download .*local file"):
        load_backbone("vit_tiny_patch16_224.nothing", 3, weights="hub")


def test_no_network(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def refuse(*arguments, **options):
        raise ConnectionError("offline")

    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", refuse)
    with pytest.raises(ValueError, match=r"weights: timm could not download .*offline.*give a local file instead"):
        load_backbone("vit_tiny_patch16_224.augreg_in21k", 3, weights="hub")
