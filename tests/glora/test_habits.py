"""What users of PEFT type."""

import json

import peft
import pytest
import torch
from safetensors import safe_open

import glora
from glora import PathConfig, SearchSpace
from tests.glora.hugging_face import bert, gpt2, llama, vit
from tests.glora.toys import generator, mlp, same_bits, state, unchanged

LORA = PathConfig(B="lora_2")
TOKENS = torch.randint(2, 32, (3, 10), generator=generator(9))
QV = ("q_proj", "v_proj")


def lora_model(rank=8, **options):
    model = glora.inject(llama(), rank, targets=QV, heads=(), preset="lora", **options)
    return randomised(model)


def randomised(model):
    with torch.no_grad():
        for index, layer in enumerate(glora.glora_layers(model).values()):
            for parameter in layer.support_parameters():
                parameter.normal_(0, 0.3, generator=generator(index))
    return model


def test_the_line_of_trainable_parameters(capsys):
    """Of LoRA's path on q and v, PEFT counts the same."""
    model = lora_model()
    theirs = peft.get_peft_model(llama(), peft.LoraConfig(r=8, target_modules=list(QV)))
    trainable, _ = theirs.get_nb_trainable_parameters()
    glora.print_trainable_parameters(model)
    line = capsys.readouterr().out
    stored = sum(p.numel() for layer in glora.glora_layers(model).values() for p in layer.support_parameters())
    every = sum(p.numel() for p in llama().parameters()) + stored
    assert line == (
        f"trainable params: {trainable:,} (paths {trainable:,}, heads 0) || stored: {stored:,} || "
        f"all params: {every:,} || trainable%: {trainable / every:.4%}\n"
    )


def test_the_line_of_a_supernet_with_a_head(capsys):
    model = glora.inject(vit(), 4)
    glora.print_trainable_parameters(model)
    head = sum(p.numel() for p in vit().classifier.parameters())
    paths = glora.count_parameters(model)
    assert f"{paths + head:,} (paths {paths:,}, heads {head:,}) || stored: {paths:,} ||" in capsys.readouterr().out


@pytest.mark.parametrize("preset", list(glora.PRESETS))
@pytest.mark.parametrize("make", [llama, vit, gpt2])
def test_a_preset_by_name(make, preset):
    known = glora.PRESETS[preset]
    with torch.random.fork_rng():
        if known.needs_bias and make is llama:
            with unchanged(model := make()), pytest.raises(ValueError, match="with a bias for 'bitfit', found none"):
                glora.inject(model, 4, preset=preset)
            return
        torch.manual_seed(0)
        model = glora.inject(make(), 4, preset=preset)
        torch.manual_seed(0)
        expected = glora.inject(make(), 4, product=known.product or "hadamard")
        glora.apply_preset(expected, preset, 4)
    assert glora.get_paths(model) == glora.get_paths(expected)
    assert same_bits(state(model), state(expected))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preset": "dora"}, r"^preset: expected one of \['lora', .*got 'dora'"),
        ({"preset": "hira", "product": "matmul"}, r"^product: expected 'hadamard' for the preset 'hira', got 'matmul'"),
        ({"preset": "lora", "product": "other"}, r"^product: expected"),
    ],
)
def test_a_preset_that_does_not_fit(options, message):
    with unchanged(model := mlp()), pytest.raises(ValueError, match=message):
        glora.inject(model, 2, **options)


def test_paths_of_all_layers_and_of_some():
    model = lora_model()
    glora.set_paths(model, LORA)
    assert set(glora.get_paths(model).values()) == {LORA}
    some = {"model.layers.1.self_attn.q_proj": PathConfig(A="vector")}
    glora.set_paths(model, some, partial=True)
    assert glora.get_paths(model) == dict.fromkeys(glora.get_paths(model), LORA) | some
    compiled = torch.compile(model)
    wrapped = {f"_orig_mod.{name}": LORA for name in some}
    glora.set_paths(compiled, wrapped, partial=True)
    assert set(glora.get_paths(model).values()) == {LORA}
    for paths, options in ((some, {}), (some, {"partial": False})):
        with pytest.raises(ValueError, match=r"^paths: expected exactly .*; to change some of them: .*partial=True"):
            glora.set_paths(model, paths, **options)
    glora.set_paths(model, PathConfig(), partial=True)
    assert set(glora.get_paths(model).values()) == {PathConfig()}


def test_disabled_is_the_frozen_model():
    model, plain = lora_model(), llama()
    before, paths = model(TOKENS).logits, glora.get_paths(model)
    with glora.disabled(model) as same:
        assert same is model
        assert torch.equal(model(TOKENS).logits, plain(TOKENS).logits)
    assert glora.get_paths(model) == paths
    assert torch.equal(model(TOKENS).logits, before)
    assert not torch.equal(before, plain(TOKENS).logits)


def size(file):
    return file.stat().st_size


def test_a_compact_file_is_as_small_as_that_of_peft(tmp_path):
    """LoRA of rank 8 on q and v: as many values. The header also holds paths, and checksums of the base."""
    model = lora_model()
    glora.save_adapter(model, tmp_path / "whole.safetensors")
    glora.save_adapter(model, tmp_path / "compact.safetensors", compact=True)
    glora.export_lora(model, tmp_path / "peft")
    with (
        safe_open(tmp_path / "compact.safetensors", "pt") as ours,
        safe_open(tmp_path / "peft/adapter_model.safetensors", "pt") as theirs,
    ):
        values = [sum(file.get_tensor(name).numel() for name in file.keys()) for file in (ours, theirs)]
    assert values[0] == values[1] == glora.count_parameters(model)
    assert size(tmp_path / "compact.safetensors") < 0.6 * size(tmp_path / "whole.safetensors")


PATHS = [
    PathConfig("lora_1", "lora_2", "lora_2", "vector", "constant"),
    PathConfig("vector", "constant", "vector", "constant", "vector"),
    PathConfig("constant", "vector", "none", "none", "none"),
    PathConfig("none", "lora_1", "none", "vector", "none"),
    PathConfig(),
]


def mixed(make, product):
    model = randomised(glora.inject(make(), 4, product=product))
    layers = glora.glora_layers(model)
    glora.set_paths(model, {name: PATHS[index % len(PATHS)] for index, name in enumerate(layers)})
    return model


def inputs(model):
    return (
        {"pixel_values": torch.randn(2, 3, 8, 8, generator=generator())}
        if hasattr(model, "vit")
        else {"input_ids": TOKENS}
    )


@pytest.mark.parametrize("product", ["hadamard", "matmul"])
@pytest.mark.parametrize("make", [llama, vit, gpt2, bert])
def test_a_compact_file_holds_all_that_counts(tmp_path, make, product):
    """Into the plain base, and into one that is adapted with larger ranks, whose other entries stay."""
    model = mixed(make, product).eval()
    file = tmp_path / "adapter.safetensors"
    glora.save_adapter(model, file, compact=True)
    expected = model(**inputs(model)).logits
    fresh = glora.load_adapter(make(), file).eval()
    assert glora.get_paths(fresh) == glora.get_paths(model)
    assert torch.equal(fresh(**inputs(model)).logits, expected)
    assert {layer.rank for layer in glora.glora_layers(fresh).values()} == {1, 2}
    larger = randomised(glora.inject(make(), 7, product=product)).eval()
    before = {n: t.clone() for n, t in state(larger).items()}
    glora.load_adapter(larger, file)
    assert torch.equal(larger(**inputs(model)).logits, expected)
    read = {f"{name}.{part}" for name, layer in glora.glora_layers(larger).items() for part in layer.parts_read()}
    support = {f"{n}.{s}" for n in glora.glora_layers(larger) for s in ("Ad", "Au", "Bd", "Bu", "Cd", "Cu", "D", "E")}
    assert all(torch.equal(state(larger)[name], before[name]) for name in support - read)
    again = tmp_path / "again.safetensors"
    glora.save_adapter(fresh, again, compact=True)
    with safe_open(file, "pt") as one, safe_open(again, "pt") as other:
        assert {n: one.get_tensor(n).tolist() for n in one.keys()} == {
            n: other.get_tensor(n).tolist() for n in other.keys()
        }


def test_what_a_compact_file_does_not_fit(tmp_path):
    file = tmp_path / "adapter.safetensors"
    glora.save_adapter(lora_model(4), file, compact=True)
    smaller = lora_model(2)
    for model, message in (
        (smaller, "rank 2 hadamard in the model, 4 hadamard in the file"),
        (glora.inject(llama(), 8), "unknown|missing"),
    ):
        with unchanged(model), pytest.raises(ValueError, match=message):
            glora.load_adapter(model, file)
    with safe_open(file, "pt") as opened:
        assert json.loads(opened.metadata()["glora"])["format"] == 3
    content = file.read_bytes().replace(b"lora_4", b"lora_3")
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"rank 4 with|shapes that differ"):
        glora.load_adapter(llama(), file)


def test_several_adapters_on_one_base(tmp_path):
    """Each in a file of its own; loading one switches, to the last bit."""
    model, outputs = lora_model(8), {}
    for index, (name, path) in enumerate(
        {"a": PathConfig(B="lora_8"), "b": PathConfig(A="vector", B="lora_4"), "c": LORA}.items()
    ):
        with torch.no_grad():
            for layer in glora.glora_layers(model).values():
                for parameter in layer.support_parameters():
                    parameter.normal_(0, 0.3, generator=generator(index))
        glora.set_paths(model, path)
        outputs[name] = model(TOKENS).logits
        glora.save_adapter(model, tmp_path / name, compact=True)
    for name in "abcabcba":
        glora.load_adapter(model, tmp_path / name)
        assert torch.equal(model(TOKENS).logits, outputs[name]), name


def test_searched_winners_are_saved_compactly(tmp_path):
    model = randomised(glora.inject(llama(), 8))
    space = SearchSpace(ranks=(8, 4), bias_free=True)
    glora.set_paths(model, glora.sample_paths(model, space, generator(3)))
    glora.save_adapter(model, tmp_path / "winner", compact=True)
    merged = glora.load_adapter(llama(), tmp_path / "winner")
    glora.merge(merged)
    torch.testing.assert_close(merged(TOKENS).logits, model(TOKENS).logits)


@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (glora.GLoRALinear(4, 3, rank=2), torch.randn(2, 4)),
        (glora.GLoRAConv2d(2, 3, 3, rank=2), torch.randn(1, 2, 5, 5)),
    ],
    ids=["linear", "conv2d"],
)
def test_the_input_by_name_as_of_the_plain_layer(layer, x):
    assert torch.equal(layer(input=x), layer(x))


@pytest.mark.parametrize("product", ["", "hadamar"])
def test_an_unknown_product(product):
    with unchanged(model := mlp()), pytest.raises(ValueError, match=rf"^product: expected .*got '{product}'"):
        glora.inject(model, 2, product=product)
