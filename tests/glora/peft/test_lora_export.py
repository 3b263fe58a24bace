"""PEFT loads what export_lora writes as LoRA, and computes the same; errors are the measured ones, and the least."""

import json
from collections import OrderedDict

import peft
import pytest
import torch
import transformers
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch import nn
from transformers.pytorch_utils import Conv1D

import glora
from glora import PathConfig, export_lora
from glora_kernels import reference
from tests.glora.peft.peft_toys import TARGETS, tokens
from tests.glora.toys import adapted_mlp, generator, mlp, randomize, seeded, unchanged

RANK = 3
LORA = PathConfig(B="lora_3")
APPROXIMATED = PathConfig("lora_3", "lora_3")


def on_paths(first, second=None, **options):
    """Everything trained is random, the head too, and tensors hold more than the paths read."""
    model = adapted_mlp(RANK, **options)
    randomize(model)
    glora.set_paths(model, {"fc1": first, "fc2": first if second is None else second})
    return model


def loaded(base, folder):
    """PEFT's model; a warning of PEFT's is an error, as everywhere in the tests."""
    return peft.PeftModel.from_pretrained(base, folder).eval()


def assert_same(outputs, expected):
    torch.testing.assert_close(outputs, expected, rtol=0, atol=1e-6)


def config_of(folder):
    return json.loads((folder / "adapter_config.json").read_text())


def tensors_of(folder):
    """By the names in the model."""
    tensors = load_file(folder / "adapter_model.safetensors")
    assert all(name.startswith("base_model.model.") for name in tensors)
    return {name.removeprefix("base_model.model."): tensor for name, tensor in tensors.items()}


def product_of(tensors, name):
    left, right = (tensors[f"{name}.lora_{factor}.weight"].double().flatten(1) for factor in "BA")
    return left @ right


def true_update(layer):
    """dW in fp64, by the dense formula."""
    weight = layer.matrix.double()
    return reference.effective_weight(weight, layer.terms().map(lambda t: t.double())).detach() - weight


def delta_of(model, name):
    """dW as PEFT forms it."""
    found = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    return found[f"base_model.model.{name}"].get_delta_weight("default").detach()


# -- exact -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize(("path", "rank"), [("lora_3", 3), ("lora_2", 2), ("vector", 1), ("constant", 1)], ids=str)
def test_peft_computes_the_same_with_b_alone(tmp_path, path, rank, bias):
    model = on_paths(PathConfig(B=path), bias=bias)
    with unchanged(model):
        report = export_lora(model, tmp_path / "adapter")
    assert (report.rank, report.exact, report.bias) == (rank, True, False)
    assert all(layer.relative_error == layer.largest_error == 0 for layer in report.layers)
    again = loaded(mlp(bias=bias), tmp_path / "adapter")
    assert_same(again(tokens()), model(tokens()))
    assert not torch.allclose(again(tokens()), mlp(bias=bias)(tokens()), atol=1e-3)


def test_a_low_rank_b_keeps_its_bits_and_is_filled_up_with_zeros(tmp_path):
    model = on_paths(LORA, PathConfig(B="lora_2"))
    report = export_lora(model, tmp_path / "adapter")
    tensors = tensors_of(tmp_path / "adapter")
    assert [layer.rank for layer in report.layers] == [3, 2]
    for name, rank in (("fc1", 3), ("fc2", 2)):
        layer = getattr(model, name)
        left, right = tensors[f"{name}.lora_B.weight"], tensors[f"{name}.lora_A.weight"]
        assert torch.equal(left[:, :rank], layer.Bd[:, :rank])
        assert torch.equal(right[:rank], layer.Bu[:rank])
        assert left.shape[1] == right.shape[0] == 3
        assert not left[:, rank:].any()
        assert not right[rank:].any()
    assert_same(loaded(mlp(), tmp_path / "adapter")(tokens()), model(tokens()))


@pytest.mark.parametrize(
    ("path", "rank"),
    [
        (PathConfig("lora_2"), 2),
        (PathConfig("lora_2", "lora_3"), 5),
        (PathConfig("lora_3", "vector"), 4),
        (PathConfig("lora_2", "constant"), 3),
    ],
    ids=["A", "A and B", "A and a vector", "A and a constant"],
)
def test_the_matmul_product_with_a_low_rank_a(tmp_path, path, rank):
    model = on_paths(path, product="matmul")
    report = export_lora(model, tmp_path / "adapter")
    assert report.rank == rank
    assert report.exact
    assert 0 < report.worst.relative_error < 1e-7
    assert_same(loaded(mlp(), tmp_path / "adapter")(tokens()), model(tokens()))


def test_ranks_that_add_up_to_more_than_a_layer_has(tmp_path):
    """fc2 is (5, 8): ranks 3 and 3 are full rank there; rank 5 then expresses it, and fc1 (8, 6) not."""
    model = on_paths(PathConfig("lora_3", "lora_3"), product="matmul")
    assert export_lora(model, tmp_path / "adapter").rank == 6
    assert_same(loaded(mlp(), tmp_path / "adapter")(tokens()), model(tokens()))
    report = export_lora(model, tmp_path / "adapter", rank=5, tolerance=1)
    assert [layer.exact for layer in report.layers] == [False, True]
    assert report.layers[1].relative_error < 1e-6 < report.layers[0].relative_error


@pytest.mark.parametrize("product", ["hadamard", "matmul"])
@pytest.mark.parametrize("kind", ["lora_3", "vector", "constant"])
def test_an_update_of_full_rank_is_exact_where_the_rank_is_that_of_the_layer(tmp_path, kind, product):
    model = on_paths(PathConfig(kind, kind), product=product)
    report = export_lora(model, tmp_path / "adapter", rank=8, tolerance=0)
    assert report.exact
    assert report.worst.relative_error < 1e-6
    again = loaded(mlp(), tmp_path / "adapter")
    assert_same(again(tokens()), model(tokens()))
    for name in TARGETS:
        torch.testing.assert_close(delta_of(again, name), true_update(getattr(model, name)).float())


def test_layers_that_were_not_trained_are_zeros(tmp_path):
    """Their paths are of full rank, their values zero, as after inject."""
    model = adapted_mlp(RANK)
    report = export_lora(model, tmp_path / "adapter")
    assert (report.rank, report.exact, report.worst.relative_error) == (1, True, 0.0)
    assert_same(loaded(mlp(), tmp_path / "adapter")(tokens()), mlp()(tokens()))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtypes(tmp_path, dtype):
    """Factors are of fp32, and of fp64 for fp64."""
    model = on_paths(PathConfig("lora_2", "lora_2"), dtype=dtype, product="matmul")
    report = export_lora(model, tmp_path / "adapter")
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    tensors = tensors_of(tmp_path / "adapter")
    assert {tensor.dtype for name, tensor in tensors.items() if "lora" in name} == {wide}
    assert report.worst.relative_error < (1e-15 if wide == torch.float64 else 1e-7)
    for name in TARGETS:
        error = product_of(tensors, name) - true_update(getattr(model, name))
        assert error.norm() <= 1e-7 * true_update(getattr(model, name)).norm()


# -- approximated ----------------------------------------------------------------------------------


@pytest.mark.parametrize("product", ["hadamard", "matmul"])
@pytest.mark.parametrize("b", ["lora_2", "vector", "constant", "none"])
@pytest.mark.parametrize("a", ["lora_3", "vector", "constant"])
def test_errors_are_the_measured_ones_and_the_least(tmp_path, a, b, product):
    model = on_paths(PathConfig(a, b), product=product)
    report = export_lora(model, tmp_path / "adapter", rank=2, tolerance=1)
    again, tensors = loaded(mlp(), tmp_path / "adapter"), tensors_of(tmp_path / "adapter")
    for layer in report.layers:
        update = true_update(getattr(model, layer.name))
        error = update - product_of(tensors, layer.name)
        assert layer.relative_error == pytest.approx(float(error.norm() / update.norm()), rel=1e-9)
        assert layer.largest_error == pytest.approx(float(error.abs().max()), rel=1e-9)
        values = torch.linalg.svdvals(update)
        least = float(values[2:].norm() / values.norm())
        assert layer.relative_error == pytest.approx(least, rel=1e-6)
        assert layer.kept_energy == pytest.approx(float(values[:2].square().sum() / values.square().sum()), rel=1e-6)
        assert layer.relative_error > 0.01
        assert not layer.exact
        theirs = delta_of(again, layer.name)
        torch.testing.assert_close(theirs, product_of(tensors, layer.name).float())


def test_a_larger_rank_is_nearer(tmp_path):
    model = on_paths(APPROXIMATED)
    errors = [
        export_lora(model, tmp_path / "adapter", rank=rank, tolerance=1).worst.relative_error for rank in range(1, 7)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 0.4
    assert errors[-1] < 1e-6


def test_factors_share_the_singular_values(tmp_path):
    """No factor is far smaller than the other, as half types need it."""
    export_lora(on_paths(APPROXIMATED), tmp_path / "adapter", rank=2, tolerance=1)
    tensors = tensors_of(tmp_path / "adapter")
    for name in TARGETS:
        left, right = tensors[f"{name}.lora_B.weight"], tensors[f"{name}.lora_A.weight"]
        torch.testing.assert_close(left.norm(dim=0), right.norm(dim=1))


def test_the_same_files_every_time(tmp_path):
    contents = []
    for _ in range(2):
        export_lora(on_paths(APPROXIMATED), tmp_path / "adapter", rank=2, tolerance=1)
        contents.append([file.read_bytes() for file in sorted((tmp_path / "adapter").iterdir())])
    assert contents[0] == contents[1]


def test_the_report_says_it_in_words_and_as_data(tmp_path):
    report = export_lora(on_paths(LORA, PathConfig("vector")), tmp_path / "adapter", rank=3, tolerance=1)
    second = report.layers[1]
    assert str(report) == (
        "exported 2 layers as LoRA of rank 3: 1 exactly, largest relative error of an update "
        f"{second.relative_error:.2e} ('fc2'), largest error of a weight {second.largest_error:.2e}"
    )
    data = json.loads(json.dumps(report.to_dict()))
    assert data["rank"] == 3
    assert data["layers"][0] == {
        "name": "fc1",
        "rank": 3,
        "exact": True,
        "relative_error": 0.0,
        "largest_error": 0.0,
        "kept_energy": 1.0,
    }
    assert data["layers"][1]["relative_error"] == second.relative_error


# -- biases and what is trained beside -------------------------------------------------------------

BIASES = [PathConfig(B="lora_2", C="vector"), PathConfig(B="lora_2", D="vector"), PathConfig(B="lora_2", E="vector")]


@pytest.mark.parametrize(
    "path",
    [
        *BIASES,
        PathConfig(C="lora_3"),
        PathConfig(D="constant", E="constant"),
        PathConfig(B="lora_2", C="lora_2", D="vector", E="constant"),
    ],
    ids=lambda path: "".join(slot for slot in "CDE" if getattr(path, slot) != "none"),
)
def test_biases_of_peft(tmp_path, path):
    model = on_paths(path, LORA)
    assert_refused(model, tmp_path / "adapter", r"bias: expected biases that stay .* changes those of 'fc1'\. Search")
    report = export_lora(model, tmp_path / "adapter", bias=True)
    assert report.bias
    tensors = tensors_of(tmp_path / "adapter")
    merged = model.fc1.merge().bias
    torch.testing.assert_close(tensors["fc1.lora_B.bias"] + mlp().fc1.bias, merged)
    assert not tensors["fc2.lora_B.bias"].any()
    again = loaded(mlp(), tmp_path / "adapter")
    assert_same(again(tokens()), model(tokens()))
    assert_same(again.merge_and_unload()(tokens()), model(tokens()))


def test_biases_of_layers_without_one(tmp_path):
    model = on_paths(PathConfig(B="lora_2", C="vector", E="vector"), bias=False)
    export_lora(model, tmp_path / "adapter", bias=True)
    with pytest.warns(UserWarning, match="has no bias"):
        again = peft.PeftModel.from_pretrained(mlp(bias=False), tmp_path / "adapter")
    assert_same(again(tokens()), model(tokens()))


def test_no_bias_is_written_where_none_changes(tmp_path):
    """D has nothing to scale in layers without bias."""
    model = on_paths(PathConfig(B="lora_2", D="vector"), bias=False)
    export_lora(model, tmp_path / "adapter")
    assert not export_lora(model, tmp_path / "adapter", bias=True).bias
    assert not config_of(tmp_path / "adapter")["lora_bias"]
    assert not any(name.endswith("lora_B.bias") for name in tensors_of(tmp_path / "adapter"))


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
def test_heads(tmp_path, frozen):
    model = on_paths(LORA)
    if frozen:
        model.head = mlp().head.requires_grad_(False)
    export_lora(model, tmp_path / "adapter")
    assert config_of(tmp_path / "adapter")["modules_to_save"] == (None if frozen else ["head"])
    assert any(name.startswith("head.") for name in tensors_of(tmp_path / "adapter")) is not frozen
    assert_same(loaded(mlp(), tmp_path / "adapter")(tokens()), model(tokens()))


def test_norm_layers_with_statistics(tmp_path):
    def make():
        with seeded():
            return nn.Sequential(OrderedDict(fc1=nn.Linear(6, 5), norm=nn.BatchNorm1d(5), head=nn.Linear(5, 3)))

    model = glora.inject(make(), RANK)
    randomize(model)
    glora.set_paths(model, {"fc1": LORA})
    model(tokens() * 3 + 1)
    model.eval()
    export_lora(model, tmp_path / "adapter")
    assert config_of(tmp_path / "adapter")["modules_to_save"] == ["head", "norm"]
    assert_same(loaded(make(), tmp_path / "adapter")(tokens()), model(tokens()))


def test_buffers_that_peft_cannot_save_are_named(tmp_path):
    """The warning points at the call."""
    model = on_paths(LORA)
    model.register_buffer("shift", torch.ones(3))
    with pytest.warns(UserWarning, match="other buffers, as in 'shift'") as record:
        export_lora(model, tmp_path / "adapter")
    assert record[0].filename == __file__


# -- other layers ----------------------------------------------------------------------------------

TOKENS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}


def gpt2():
    config = transformers.GPT2Config(vocab_size=40, n_positions=32, n_embd=16, n_layer=1, n_head=2, **TOKENS)
    with seeded():
        return transformers.AutoModelForCausalLM.from_config(config).eval()


def llama():
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.LlamaConfig(vocab_size=40, num_key_value_heads=1, **sizes, **TOKENS)
    with seeded():
        return transformers.AutoModelForCausalLM.from_config(config).eval()


def adapted_language_model(build, targets, path, product="hadamard"):
    model = glora.inject(build(), RANK, targets=targets, heads=(), product=product)
    randomize(model)
    glora.set_paths(model, dict.fromkeys(glora.glora_layers(model), path))
    return model


def logits(model):
    return model(torch.randint(3, 40, (2, 6), generator=generator(5))).logits


@pytest.mark.parametrize(
    ("path", "product", "options"),
    [
        (LORA, "hadamard", {}),
        (PathConfig("lora_2", "lora_2"), "matmul", {}),
        (PathConfig("vector"), "hadamard", {"rank": 16}),
        (PathConfig(B="lora_2", C="vector", D="vector"), "hadamard", {"bias": True}),
    ],
    ids=["B", "matmul", "full rank", "bias"],
)
def test_transposed_layers_of_gpt2(tmp_path, path, product, options):
    model = adapted_language_model(gpt2, ("c_attn", "mlp.c_fc"), path, product)
    report = export_lora(model, tmp_path / "adapter", **options)
    assert report.exact
    assert len(report.layers) == 2
    assert config_of(tmp_path / "adapter")["fan_in_fan_out"]
    again = loaded(gpt2(), tmp_path / "adapter")
    torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=1e-5)
    assert not torch.allclose(logits(again), logits(gpt2()), atol=1e-2)
    for name, layer in glora.glora_layers(model).items():
        torch.testing.assert_close(delta_of(again, name), true_update(layer).t().float())


def test_a_language_model_as_servers_read_it(tmp_path):
    """One r, names of tensors and modules, nothing saved beside: what vLLM and SGLang ask of a folder."""
    model = adapted_language_model(llama, ("q_proj", "v_proj"), LORA)
    export_lora(model, tmp_path / "adapter", rank=8)
    assert_same(logits(loaded(llama(), tmp_path / "adapter")), logits(model))
    config = config_of(tmp_path / "adapter")
    names = [f"model.layers.0.self_attn.{name}" for name in ("q_proj", "v_proj")]
    assert config["target_modules"] == names
    assert (config["r"], config["lora_alpha"], config["bias"], config["modules_to_save"]) == (8, 8, "none", None)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors_of(tmp_path / "adapter").items()}
    assert shapes == {
        f"{names[0]}.lora_A.weight": (8, 16),
        f"{names[0]}.lora_B.weight": (16, 8),
        f"{names[1]}.lora_A.weight": (8, 16),
        f"{names[1]}.lora_B.weight": (8, 8),
    }


def test_transposed_layers_among_others_are_refused(tmp_path):
    model = glora.inject(nn.Sequential(OrderedDict(conv=Conv1D(4, 3), linear=nn.Linear(4, 3))), 2, heads=())
    glora.set_paths(model, dict.fromkeys(("conv", "linear"), PathConfig(B="lora_2")))
    assert_refused(model, tmp_path / "adapter", r"model: expected no Conv1D among other .* got Conv1D and 'linear';")


def convolutions(**options):
    with seeded():
        return nn.Sequential(
            OrderedDict(
                one=nn.Conv2d(4, 6, (3, 2), stride=2, padding=1, **options), two=nn.Conv2d(6, 4, 1), act=nn.GELU()
            )
        )


def adapted_convolutions(path, product="hadamard", **options):
    model = glora.inject(convolutions(**options), RANK, product=product, convolutions=True, heads=())
    randomize(model)
    glora.set_paths(model, dict.fromkeys(("one", "two"), path))
    return model


@pytest.mark.parametrize(
    ("path", "product", "options"),
    [
        (LORA, "hadamard", {}),
        (PathConfig(B="vector"), "hadamard", {}),
        (PathConfig("lora_2", "lora_2"), "matmul", {}),
        (PathConfig("lora_2", "lora_2"), "hadamard", {"rank": 6}),
        (PathConfig(B="lora_2", C="vector", E="vector"), "hadamard", {"bias": True}),
    ],
    ids=["B", "vector", "matmul", "full rank", "bias"],
)
def test_convolutions(tmp_path, path, product, options):
    model = adapted_convolutions(path, product)
    report = export_lora(model, tmp_path / "adapter", **options)
    assert report.exact
    tensors = tensors_of(tmp_path / "adapter")
    assert tensors["one.lora_A.weight"].shape == (report.rank, 4, 3, 2)
    assert tensors["one.lora_B.weight"].shape == (6, report.rank, 1, 1)
    again = loaded(convolutions(), tmp_path / "adapter")
    images = torch.randn(2, 4, 7, 7, generator=generator(1))
    torch.testing.assert_close(again(images), model(images), rtol=1e-6, atol=3e-6)
    assert not torch.allclose(again(images), convolutions()(images), atol=1e-2)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"groups": 2}, "2 groups"),
        ({"dilation": 2}, r"dilation \(2, 2\), which PEFT leaves out"),
        ({"padding_mode": "reflect"}, "padding mode reflect, which PEFT leaves out"),
    ],
)
def test_convolutions_that_peft_computes_otherwise(tmp_path, options, reason):
    model = adapted_convolutions(LORA, **options)
    message = f"model: expected layers that PEFT's LoRA can express, not so are 'one: {reason}'; leave"
    assert_refused(model, tmp_path / "adapter", message)


def quantised_mlp():
    quantization = pytest.importorskip("torchao.quantization")
    model = mlp()
    for name in TARGETS:
        linear = getattr(model, name)
        weight = quantization.Int8Tensor.from_hp(linear.weight.detach(), quantization.PerRow())
        linear.weight = nn.Parameter(weight, requires_grad=False)
    return model


def decoded_mlp():
    """The dense model that the quantised one stands for."""
    model, quantised = mlp(), quantised_mlp()
    for name in TARGETS:
        getattr(model, name).weight = nn.Parameter(getattr(quantised, name).weight.dequantize())
    return model


@pytest.mark.parametrize(
    ("path", "options"), [(LORA, {}), (APPROXIMATED, {"rank": 6})], ids=["B alone", "of the decoded weight"]
)
def test_quantised_bases(tmp_path, monkeypatch, path, options):
    model = glora.inject(quantised_mlp(), RANK)
    randomize(model)
    glora.set_paths(model, dict.fromkeys(TARGETS, path))
    with monkeypatch.context() as patched:
        if path == LORA:
            patched.setattr(glora.GLoRAQuantisedLinear, "matrix", property(lambda layer: pytest.fail("decoded")))
        assert export_lora(model, tmp_path / "adapter", **options).exact
    again = loaded(decoded_mlp(), tmp_path / "adapter")
    torch.testing.assert_close(again(tokens()), model(tokens()), rtol=0, atol=3e-6)


# -- the folder ------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*have invalid shape.*lora_B.bias")  # PEFT's, of its own biases (0.21.2)
def test_files_are_those_that_peft_would_write(tmp_path):
    export_lora(on_paths(BIASES[0]), tmp_path / "ours", bias=True)
    loaded(mlp(), tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    ours, theirs = config_of(tmp_path / "ours"), config_of(tmp_path / "theirs")
    assert ours == {**{name: theirs[name] for name in ours}, "target_modules": TARGETS}
    ours, theirs = (load_file(tmp_path / who / "adapter_model.safetensors") for who in ("ours", "theirs"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_an_earlier_export_is_replaced_or_stays_whole(tmp_path):
    folder = tmp_path / "adapter"
    export_lora(on_paths(LORA), folder)
    export_lora(on_paths(PathConfig(B="lora_2")), folder)
    assert config_of(folder)["r"] == 2
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    with pytest.raises(ValueError, match="tolerance: expected relative errors up to"):
        export_lora(on_paths(APPROXIMATED), folder, rank=1)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    assert list(tmp_path.iterdir()) == [folder]


# -- refused -----------------------------------------------------------------------------------------


def assert_refused(model, folder, message, error=ValueError, **options):
    with unchanged(model), pytest.raises(error, match=message):
        export_lora(model, folder, **options)
    assert not list(folder.parent.iterdir())


@pytest.mark.parametrize(("tolerance", "said"), [(None, "0.1"), (0.05, "0.05"), (0, "0")])
def test_errors_above_the_tolerance_are_refused_the_worst_first(tmp_path, tolerance, said):
    model = on_paths(APPROXIMATED)
    errors = {name: float(tail_of(getattr(model, name), 2)) for name in TARGETS}
    worst, other = sorted(errors, key=errors.get, reverse=True)
    assert errors[other] > 0.1
    figures = f"'{worst}: {errors[worst]:.3g}', '{other}: {errors[other]:.3g}'"
    message = f"tolerance: expected relative errors up to {said} at rank 2, "
    assert_refused(model, tmp_path / "adapter", f"{message}got {figures}; give", rank=2, tolerance=tolerance)
    assert_refused(model, tmp_path / "adapter", f"got '{worst}: [^']*'; give", rank=2, tolerance=errors[other] + 1e-6)
    export_lora(model, tmp_path / "adapter", rank=2, tolerance=errors[worst] + 1e-6)


def tail_of(layer, rank):
    values = torch.linalg.svdvals(true_update(layer))
    return values[rank:].norm() / values.norm()


def test_an_update_of_full_rank_needs_a_rank(tmp_path):
    model = on_paths(LORA, PathConfig("vector", "lora_2"))
    message = r"got None with 'fc2: A is vector, hadamard product, exact from rank 5'; give rank="
    assert_refused(model, tmp_path / "adapter", message)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"rank": 0}, ValueError, "rank: expected an integer from 1, got 0"),
        ({"rank": True}, ValueError, "rank: expected an integer from 1, got True"),
        ({"rank": 2.0}, ValueError, r"rank: expected an integer from 1, got 2\.0"),
        ({"rank": 2, "tolerance": -0.1}, ValueError, "tolerance: expected a number from 0, got -0.1"),
        ({"rank": 2, "tolerance": float("nan")}, ValueError, "tolerance: expected a number from 0, got nan"),
        ({"rank": 2, "tolerance": "0.1"}, ValueError, "tolerance: expected a number from 0, got '0.1'"),
        ({"tolerance": 0.1}, ValueError, r"tolerance: expected None without a rank, .* got 0\.1; give rank="),
        ({"bias": "none"}, TypeError, "bias: expected True or False, got str"),
    ],
)
def test_wrong_arguments(tmp_path, options, error, message):
    assert_refused(on_paths(LORA), tmp_path / "adapter", message, error, **options)


def test_no_folder():
    with pytest.raises(TypeError, match=r"^folder: expected the path of a folder, got NoneType"):
        export_lora(on_paths(LORA), None)


def test_wrong_models(tmp_path):
    with pytest.raises(ValueError, match="model: expected at least one adapted layer, found none"):
        export_lora(mlp(), tmp_path / "adapter")
    with pytest.raises(ValueError, match="model: expected a model that contains GLoRALinear layers, got a single one"):
        export_lora(glora.GLoRALinear(4, 3), tmp_path / "adapter")
    with pytest.raises(ValueError, match="model: expected real tensors, got parameters on meta"):
        export_lora(on_paths(LORA).to("meta"), tmp_path / "adapter")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("path", "tensor", "options"),
    [(LORA, "Bd", {}), (APPROXIMATED, "Ad", {"rank": 6}), (PathConfig(E="vector"), "E", {"bias": True})],
    ids=["low rank", "full rank", "bias"],
)
def test_values_that_are_not_finite(tmp_path, path, tensor, options):
    model = on_paths(path)
    with torch.no_grad():
        getattr(model.fc2, tensor)[0] = float("nan")
    message = "model: expected finite values, got NaN or infinity in 'fc2'; training has diverged"
    assert_refused(model, tmp_path / "adapter", message, **options)


def test_what_a_path_does_not_read_may_be_anything(tmp_path):
    model = on_paths(PathConfig(B="lora_2"))
    with torch.no_grad():
        for tensor in (model.fc1.Bd[:, 2:], model.fc1.Ad, model.fc1.Cd, model.fc1.E):
            tensor.fill_(float("nan"))
    export_lora(model, tmp_path / "adapter")
    assert_same(loaded(mlp(), tmp_path / "adapter")(tokens()), model(tokens()))


def test_a_folder_of_others_is_left_alone(tmp_path):
    """It is refused before any work, which would find the error too large."""
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"folder: expected a new folder, or one with nothing but .*notes\.txt"):
        export_lora(on_paths(APPROXIMATED), tmp_path, rank=1)
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]
