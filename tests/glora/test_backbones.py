"""Loading timm models: every file format gives back the model that was saved, and nothing is left out in silence."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from timm import create_model

import glora
from glora.backbones import VIT_B_16
from tests.glora.toys import generator, same_bits, seeded, state

# timm's own model for tests: 306,240 parameters without a head, 6 blocks, images of 160 x 160
NAME, CLASSES = "test_vit", 7
SWIN = {"img_size": 56, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4)}
CONVNEXT = {"dims": (8, 8, 16, 16), "depths": (1, 1, 1, 1)}
ARCHITECTURES = {
    NAME: (NAME, {}, 160),
    "swin": ("swin_tiny_patch4_window7_224", SWIN, 56),
    "convnext": ("convnext_tiny", CONVNEXT, 32),
}


def saved_model(classes=CLASSES, name=NAME, **options):
    """A model whose every parameter is random, so that none can be right by chance."""
    with seeded():
        model = create_model(name, num_classes=classes, **options).eval()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def load(weights, classes=CLASSES, name=NAME, seed=0, **arguments):
    with seeded():
        torch.manual_seed(seed)
        return glora.load_backbone(name, classes, weights=weights, **arguments).eval()


def google_layout(model, head=True):
    """The arrays of a plain ViT by the names and shapes of Google's files."""
    tensors = {name: tensor.detach().numpy() for name, tensor in model.state_dict().items()}
    heads = model.blocks[0].attn.num_heads
    arrays = {
        "cls": tensors["cls_token"],
        "embedding/kernel": tensors["patch_embed.proj.weight"].transpose(2, 3, 1, 0),
        "embedding/bias": tensors["patch_embed.proj.bias"],
        "Transformer/posembed_input/pos_embedding": tensors["pos_embed"],
        "Transformer/encoder_norm/scale": tensors["norm.weight"],
        "Transformer/encoder_norm/bias": tensors["norm.bias"],
    }
    if head:
        arrays |= {"head/kernel": tensors["head.weight"].T, "head/bias": tensors["head.bias"]}
        arrays |= {"pre_logits/kernel": np.zeros((64, 64)), "pre_logits/bias": np.zeros(64)}
    for i in range(len(model.blocks)):
        block = {name: tensors[f"blocks.{i}.{name}"] for name, _ in model.blocks[i].named_parameters()}
        arrays |= {f"Transformer/encoderblock_{i}/{name}": array for name, array in google_block(block, heads)}
    return arrays


def google_block(block, heads):
    for ours, theirs in (("norm1", "LayerNorm_0"), ("norm2", "LayerNorm_2")):
        yield f"{theirs}/scale", block[f"{ours}.weight"]
        yield f"{theirs}/bias", block[f"{ours}.bias"]
    for i in range(2):
        yield f"MlpBlock_3/Dense_{i}/kernel", block[f"mlp.fc{i + 1}.weight"].T
        yield f"MlpBlock_3/Dense_{i}/bias", block[f"mlp.fc{i + 1}.bias"]
    attention, width = "MultiHeadDotProductAttention_1", len(block["attn.proj.bias"])
    for i, part in enumerate(("query", "key", "value")):
        rows = slice(i * width, (i + 1) * width)
        yield f"{attention}/{part}/kernel", block["attn.qkv.weight"][rows].T.reshape(width, heads, -1)
        yield f"{attention}/{part}/bias", block["attn.qkv.bias"][rows].reshape(heads, -1)
    yield f"{attention}/out/kernel", block["attn.proj.weight"].T.reshape(heads, -1, width)
    yield f"{attention}/out/bias", block["attn.proj.bias"]


def write(model, file: Path):
    tensors = model.state_dict()
    if file.suffix == ".npz":
        np.savez(file, **google_layout(model))
    elif file.suffix == ".safetensors":
        save_file(tensors, file)
    else:
        key = file.stem if file.stem in ("model", "state_dict") else None
        torch.save({key: tensors, "epoch": 3} if key else tensors, file)
    return file


def without_head(model):
    return {name: tensor for name, tensor in state(model).items() if name.partition(".")[0] != "head"}


FILES = ("a.npz", "a.safetensors", "a.pth", "a.pt", "model.pth", "state_dict.pt")


@pytest.mark.parametrize("file", FILES)
def test_a_file_gives_back_what_was_saved(file, tmp_path):
    model = saved_model()
    loaded = load(write(model, tmp_path / file))
    assert same_bits(state(loaded), state(model))
    assert all(parameter.requires_grad for parameter in loaded.parameters())


def test_averaged_weights_are_preferred(tmp_path):
    model = saved_model()
    last = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    torch.save({"model": last, "model_ema": model.state_dict()}, tmp_path / "a.pth")
    assert same_bits(state(load(tmp_path / "a.pth")), state(model))


@pytest.mark.parametrize("file", FILES)
def test_a_head_of_another_class_count_is_replaced_by_a_fresh_one(file, tmp_path):
    model = saved_model()
    loaded = load(str(write(model, tmp_path / file)), classes=3)
    assert same_bits(without_head(loaded), without_head(model))
    assert loaded.num_classes == 3 and loaded(torch.zeros(1, 3, 160, 160)).shape == (1, 3)
    again, other = load(tmp_path / file, classes=3), load(tmp_path / file, classes=3, seed=1)
    assert torch.equal(again.head.weight, loaded.head.weight)  # drawn from torch's generator
    assert not torch.equal(other.head.weight, loaded.head.weight)
    # nn.Linear's initialisation, as reset_classifier of the official code's run: uniform within 1 / sqrt(64)
    assert 0.1 < loaded.head.weight.abs().max() <= 0.125


@pytest.mark.parametrize("file", ["a.npz", "a.safetensors"])
def test_a_file_without_a_head_gets_one(file, tmp_path):
    model = saved_model(0)
    if file == "a.npz":
        np.savez(tmp_path / file, **google_layout(model, head=False))
    else:
        write(model, tmp_path / file)
    loaded = load(tmp_path / file)
    assert same_bits(without_head(loaded), state(model))
    assert loaded.head.weight.shape == (CLASSES, 64)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_head_of_every_architecture_is_replaced(architecture, tmp_path):
    name, options, size = ARCHITECTURES[architecture]
    model = saved_model(name=name, **options)
    file = write(model, tmp_path / "a.safetensors")
    same, other = (load(file, classes, name, options=options) for classes in (CLASSES, 3))
    assert same_bits(state(same), state(model))
    x = torch.randn(2, 3, size, size, generator=generator())
    with torch.no_grad():
        assert torch.equal(glora.features(other, x), glora.features(model, x))
        assert other(x).shape == (2, 3)


def test_the_names_of_a_first_release_are_understood(tmp_path):
    """Microsoft's Swin files say ``head`` for timm's ``head.fc``, and count the reductions from another stage."""
    model = saved_model(name="swin_tiny_patch4_window7_224", **SWIN)
    renamed = {"head.fc.": "head.", "layers.1.downsample.": "layers.0.downsample."}
    tensors = dict(model.state_dict())
    for ours, theirs in renamed.items():
        tensors = {name.replace(ours, theirs): tensor for name, tensor in tensors.items()}
    torch.save({"model": tensors}, tmp_path / "swin.pth")
    loaded = load(tmp_path / "swin.pth", name="swin_tiny_patch4_window7_224", options=SWIN)
    assert same_bits(state(loaded), state(model))


@pytest.mark.parametrize("file", ["a.npz", "a.pth"])
def test_position_embeddings_are_resampled_to_the_size_of_the_images(file, tmp_path):
    model = saved_model()
    loaded = load(write(model, tmp_path / file), options={"img_size": 64})
    assert loaded.pos_embed.shape == (1, 17, 64)
    assert torch.equal(loaded.blocks[0].attn.qkv.weight, model.blocks[0].attn.qkv.weight)
    assert loaded(torch.zeros(1, 3, 64, 64)).shape == (1, CLASSES)


def test_without_weights_everything_is_random():
    one, again, other = load(None), load(None), load(None, seed=1)
    assert same_bits(state(one), state(again))
    assert not torch.equal(one.blocks[0].attn.qkv.weight, other.blocks[0].attn.qkv.weight)


def test_drop_path_grows_to_its_largest_in_the_last_block(tmp_path):
    model = load(write(saved_model(), tmp_path / "a.npz"), drop_path=0.1)
    assert model.blocks[-1].drop_path1.drop_prob == pytest.approx(0.1)
    assert isinstance(load(None).blocks[-1].drop_path1, torch.nn.Identity)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_features_are_what_the_head_reads(architecture):
    name, options, size = ARCHITECTURES[architecture]
    model = saved_model(name=name, **options)
    x = torch.randn(2, 3, size, size, generator=generator())
    with torch.no_grad():
        found = glora.features(model, x)
        assert found.shape == (2, model.num_features)
        assert torch.equal(model.get_classifier()(found), model(x))


def test_features_of_something_else():
    with pytest.raises(TypeError, match=r"model: expected one of timm.*got Linear"):
        glora.features(torch.nn.Linear(2, 2), torch.zeros(1, 2))


def hub_cache(folder, model):
    """A cache of the hub that holds ``model`` as timm/test_vit.r160_in1k."""
    repository = folder / "models--timm--test_vit.r160_in1k"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    (repository / "snapshots" / ("0" * 40)).mkdir(parents=True)
    save_file(model.state_dict(), repository / "snapshots" / ("0" * 40) / "model.safetensors")
    return {"cache_dir": folder}


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.mark.parametrize("classes", [1000, CLASSES])
def test_the_hub_through_its_cache(classes, offline, tmp_path):
    model = saved_model(1000)
    loaded = load("hub", classes, options=hub_cache(tmp_path, model))
    assert same_bits(without_head(loaded), without_head(model))
    assert torch.equal(loaded.head.weight, model.head.weight) == (classes == 1000)
    assert loaded.head.weight.shape == (classes, 64)


def test_the_hub_without_a_network_says_how_to_do_without(offline, tmp_path):
    with pytest.raises(ConnectionError, match=r"huggingface.co/timm/test_vit.r160_in1k.*weights='/path/to/it'"):
        load("hub", options={"cache_dir": tmp_path})


def test_the_hub_with_options_that_its_weights_do_not_fit(offline, tmp_path):
    cache = hub_cache(tmp_path, saved_model(1000))
    with pytest.raises(ValueError, match=r"(?s)expected those of 'test_vit', .*blocks\.2\.norm1\.weight"):
        load("hub", options={**cache, "depth": 2})


def test_a_missing_file_says_what_to_download():
    with pytest.raises(FileNotFoundError, match=r"found none at 'ViT-B_16.npz'; download .*") as raised:
        load("ViT-B_16.npz", name="vit_base_patch16_224.orig_in21k")
    assert VIT_B_16 in str(raised.value)
    assert "https://huggingface.co/timm/vit_base_patch16_224.orig_in21k" in str(raised.value)
    with pytest.raises(FileNotFoundError, match=r"swin_base_patch4_window7_224_22kto1k\.pth") as raised:
        load("a.pth", name="swin_base_patch4_window7_224")
    assert VIT_B_16 not in str(raised.value)


@pytest.mark.parametrize("file", ["a.safetensors", "a.pth"])
@pytest.mark.parametrize("classes", [CLASSES, 3])
def test_what_is_missing_and_unexpected_is_listed_whatever_the_classes(file, classes, tmp_path):
    tensors = state(saved_model())
    tensors["blocks.0.extra"] = tensors.pop("blocks.1.mlp.fc2.bias")
    save_file(tensors, tmp_path / file) if file.endswith("s") else torch.save(tensors, tmp_path / file)
    with pytest.raises(ValueError, match=r"(?s)Missing.*blocks\.1\.mlp\.fc2\.bias.*Unexpected.*blocks\.0\.extra"):
        load(tmp_path / file, classes)


@pytest.mark.parametrize("classes", [CLASSES, 3])
def test_what_is_missing_and_unexpected_in_an_npz_is_listed(classes, tmp_path):
    arrays = google_layout(saved_model())
    arrays["Transformer/encoderblock_6/extra"] = arrays.pop("Transformer/encoderblock_1/MlpBlock_3/Dense_1/bias")
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(ValueError, match=r"missing \['[^']*_1/Mlp[^']*'\], unexpected \['[^']*_6/extra'\]"):
        load(tmp_path / "a.npz", classes)


def test_blocks_that_an_npz_has_beyond_the_model_are_refused(tmp_path):
    file = write(saved_model(), tmp_path / "a.npz")
    with pytest.raises(ValueError, match=r"missing \[\], unexpected \['Transformer/encoderblock_2/"):
        load(file, options={"depth": 2})


@pytest.mark.parametrize(
    "option, unread",
    [
        ({"init_values": 1e-5}, r"no finite values for \['blocks.0.ls1.gamma', 'blocks.0.ls2.gamma'"),
        ({"qk_norm": True}, r"no finite values for \['blocks.0.attn.q_norm.weight'"),
        ({"reg_tokens": 1}, r"a\.npz does not fit: shape"),  # timm tries to resample them
    ],
)
def test_parameters_that_an_npz_cannot_fill_are_refused(option, unread, tmp_path):
    file = write(saved_model(), tmp_path / "a.npz")
    with pytest.raises(ValueError, match=unread):
        load(file, options=option)


def test_not_a_number_in_an_npz_is_refused(tmp_path):
    model = saved_model()
    model.blocks[3].norm2.bias.data[5] = torch.nan
    with pytest.raises(ValueError, match=r"no finite values for \['blocks\.3\.norm2\.bias'\]"):
        load(write(model, tmp_path / "a.npz"))


@pytest.mark.parametrize("file", ["a.npz", "a.pth"])
def test_weights_of_another_width_are_refused(file, tmp_path):
    path = write(saved_model(embed_dim=32), tmp_path / file)
    with pytest.raises(ValueError, match="weights: expected those of 'test_vit'"):
        load(path)


def test_an_npz_is_for_vision_transformers(tmp_path):
    file = write(saved_model(), tmp_path / "a.npz")
    with pytest.raises(ValueError, match=r"weights: expected no .npz.*'convnext_tiny'"):
        load(file, name="convnext_tiny", options=CONVNEXT)


@pytest.mark.parametrize("suffix", [".npz", ".pth", ".pt", ".safetensors"])
def test_a_damaged_file(suffix, tmp_path):
    file = write(saved_model(), tmp_path / f"a{suffix}")
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(ValueError, match=rf"weights: expected a {suffix} file of weights, .*a{suffix} is damaged"):
        load(file)


def test_a_flipped_byte_in_an_npz(tmp_path):
    file = write(saved_model(), tmp_path / "a.npz")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.npz does not fit: Bad CRC-32 for file 'Transformer/encoderblock_"):
        load(file)


class Malicious:
    def __reduce__(self):
        return (Path.touch, (Path("touched"),))


def test_code_in_a_file_is_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": Malicious()}, "a.pth")
    with pytest.raises(ValueError, match="weights_only"):
        load("a.pth")
    assert not Path("touched").exists()


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"name": "vit_bse_patch16_224"}, "name: expected a model of timm.*vit_base_patch16_224"),
        ({"name": "vit_base_patch16_224.none"}, r"name: expected a tag among \[.*'orig_in21k'.*got 'none'"),
        ({"name": "vit_base_patch16_224_in21k"}, r"name: expected a current name.*'vit_base_patch16_224.augreg_in21k'"),
        ({"classes": 0}, "classes: expected an integer from 1, got 0"),
        ({"classes": True}, "classes: .* got True"),
        ({"drop_path": 1.0}, r"drop_path: expected a number from 0 and below 1, got 1\.0"),
        ({"drop_path": "0.1"}, "drop_path: .* got '0.1'"),
        ({"options": {"num_classes": 3}}, r"options: .* got \['num_classes'\]"),
        ({"weights": "a.bin"}, "weights: expected None, 'hub' or a file that ends in .npz, .pth, .pt, .safetensors"),
        ({"weights": "hub", "name": "vit_large_patch14_224"}, "timm has no pretrained weights of"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        glora.load_backbone(**{"name": NAME, "classes": 3, **arguments})


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"name": 3}, "name: expected timm's name of a model, got 3"),
        ({"weights": 3}, "weights: expected None, 'hub' or a file, got 3"),
        ({"options": 3}, "options: expected a mapping"),
        ({"options": {"colour": 3}}, "options: expected arguments of timm's test_vit, .*colour"),
    ],
)
def test_arguments_of_a_wrong_type(arguments, message):
    with pytest.raises(TypeError, match=message):
        glora.load_backbone(**{"name": NAME, "classes": 3, **arguments})
