"""What save_pretrained and from_pretrained keep of a model: created biases, layers that are not merged."""

import copy
import io
import pickle
import warnings

import pytest
import torch
from torch import nn

import glora
from glora import PathConfig
from glora.models.pretrained import SavingGuard
from tests.glora.toys import generator, randomize, seeded, unchanged

transformers = pytest.importorskip("transformers")

SIZES = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
T5 = {"vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2, "pad_token_id": 0}
CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**SIZES),
    "qwen2": lambda: transformers.Qwen2Config(**SIZES),
    "qwen3": lambda: transformers.Qwen3Config(**SIZES, head_dim=8),
    "gemma2": lambda: transformers.Gemma2Config(**SIZES, head_dim=8),
    "phi3": lambda: transformers.Phi3Config(**SIZES),
    "t5": lambda: transformers.T5Config(**T5, decoder_start_token_id=0),
}
MIXED = PathConfig("lora_2", "lora_1", "lora_2", "vector", "constant")


def base(name):
    kind = transformers.AutoModelForSeq2SeqLM if name == "t5" else transformers.AutoModelForCausalLM
    with seeded():
        return kind.from_config(CONFIGS[name]()).eval()


def adapted(name, *targets, path=MIXED):
    model = glora.inject(base(name), 2, targets=targets, heads=())
    randomize(model)
    glora.set_paths(model, dict.fromkeys(glora.glora_layers(model), path))
    return model


@torch.no_grad()
def logits(model):
    ids = torch.randint(3, 40, (2, 6), generator=generator(5))
    return model(ids, **({"decoder_input_ids": ids} if model.config.is_encoder_decoder else {})).logits


def reloaded(model, folder):
    model.save_pretrained(folder)
    return type(model).from_pretrained(folder, output_loading_info=True)


# -- biases that a merge creates -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "targets", "entries"),
    [
        ("llama", ("q_proj", "v_proj"), ["config.attention_bias"]),
        ("llama", ("o_proj", "down_proj"), ["config.attention_bias", "config.mlp_bias"]),
        ("qwen3", ("q_proj",), ["config.attention_bias"]),
        ("gemma2", ("k_proj",), ["config.attention_bias"]),
    ],
)
def test_the_config_makes_the_place_and_the_model_loads_to_the_same_bits(name, targets, entries, tmp_path):
    model = adapted(name, *targets)
    expected = logits(model)
    report = glora.merge(model, keep=True, bias="config")
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-6)
    assert list(report.config_changes) == entries
    assert len(report.created_biases) == 2 * len(targets)
    assert report.zero_biases
    assert not report.dropped_biases
    assert f"so that they load: {', '.join(entries)}, {len(report.zero_biases)} other layers" in str(report)
    other, found = reloaded(model, tmp_path)
    assert not any(found.values())
    assert torch.equal(logits(other), logits(model))

    glora.unmerge(model, report)
    assert not getattr(model.config, entries[0].removeprefix("config."))
    assert {n for n, _ in model.named_parameters() if n.endswith(".bias")} == set()
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize(
    ("name", "targets", "bias"),
    [
        ("llama", ("q_proj",), "auto"),
        *(("qwen2", ("o_proj",), bias) for bias in ("auto", "config")),
        *(("phi3", ("qkv_proj",), bias) for bias in ("auto", "config")),
        *(("t5", ("q", "wo"), bias) for bias in ("auto", "config")),
    ],
)
def test_a_bias_that_would_be_dropped_is_refused_with_ways_out(name, targets, bias):
    model = adapted(name, *targets)
    config = model.config.to_dict()
    with unchanged(model), pytest.raises(ValueError, match=r"bias: expected no new bias that \w+.from_pretrained") as e:
        glora.merge(model, bias=bias)
    text = str(e.value)
    assert f"{type(model).__name__}.from_pretrained" in text
    assert repr(next(iter(glora.glora_layers(model)))) in text
    assert "glora.SearchSpace(..., bias_free=True)" in text
    assert "bias='create'" in text
    assert ("bias='config', which sets config.attention_bias" in text) == (name == "llama")
    assert ("no entry in its config" in text) == (bias == "config")
    assert model.config.to_dict() == config


def test_a_long_list_of_layers_is_shortened():
    with pytest.raises(ValueError, match=r"'model.layers.1.self_attn.q_proj' and 6 more\. Train"):
        glora.merge(adapted("llama", "self_attn", "mlp"))


def test_created_all_the_same_with_a_warning_and_a_line_in_the_report(tmp_path):
    model = adapted("llama", "q_proj")
    expected = logits(model)
    with pytest.warns(UserWarning, match=r"from_pretrained will drop, in 'model.layers.0.self_attn.q_proj', ") as said:
        report = glora.merge(model, bias="create")
    assert said[0].filename == __file__
    assert report.dropped_biases == report.created_biases != ()
    assert "created a bias in 2 layers that had none: 'model.layers.0" in str(report)
    assert str(report).endswith("from_pretrained will drop them")
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-6)
    other, found = reloaded(model, tmp_path)
    assert len(found["unexpected_keys"]) == 2
    assert not torch.allclose(logits(other), expected, atol=1e-3)


def test_paths_without_c_and_e_merge_and_load_as_ever(tmp_path):
    model = glora.inject(base("t5"), 2, exclude=("lm_head",))
    randomize(model)
    glora.set_paths(model, glora.sample_paths(model, glora.SearchSpace((2,), bias_free=True), generator()))
    report = glora.merge(model)
    assert report.created_biases == ()
    assert "bias" not in str(report)
    other, found = reloaded(model, tmp_path)
    assert not any(found.values())
    assert torch.equal(logits(other), logits(model))


def test_a_model_within_another_is_found():
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone, self.head = base("llama"), nn.Linear(16, 3, bias=False)

    model = glora.inject(Wrapped(), 2, targets=("q_proj",))
    with unchanged(model), pytest.raises(ValueError, match=r"LlamaForCausalLM.*'backbone.model.layers.0"):
        glora.merge(model)
    report = glora.merge(model, bias="config")
    assert report.config_changes == ("backbone.config.attention_bias",)
    assert model.backbone.config.attention_bias

    beside = glora.inject(Wrapped(), 2, targets=("head",))
    assert glora.merge(beside).created_biases == ("head",)


def test_other_models_take_created_biases_and_the_report_names_them():
    model = glora.inject(nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4)), 2)
    report = glora.merge(model)
    assert report.created_biases == ("0",)
    assert report.dropped_biases == ()
    assert "created a bias in 1 layers that had none: '0'; a model that is built anew needs" in str(report)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*0.bias"):
        nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4)).load_state_dict(model.state_dict())


def test_a_class_that_cannot_be_built_from_its_config_is_taken_to_drop_them():
    hub = pytest.importorskip("huggingface_hub")

    class Net(nn.Sequential, hub.PyTorchModelHubMixin):
        pass

    model = glora.inject(Net(nn.Linear(4, 4, bias=False)), 2)
    with unchanged(model), pytest.raises(ValueError, match=r"that Net.from_pretrained would drop"):
        glora.merge(model)
    glora.set_paths(model, {"0": MIXED.without_bias()})
    glora.merge(model)


def test_looking_for_a_place_draws_no_random_number():
    model = adapted("llama", "q_proj")
    before = torch.get_rng_state()
    glora.merge(model, bias="config")
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("kind", ["four_bit", "eight_bit"])
def test_a_quantised_base_goes_through_the_same_door(kind):
    bnb = pytest.importorskip("bitsandbytes")
    model = base("llama")
    for layer in model.model.layers:
        plain = layer.self_attn.q_proj
        if kind == "four_bit":
            quantised = bnb.nn.Linear4bit(16, 16, bias=False, compute_dtype=torch.float32)
        else:
            quantised = bnb.nn.Linear8bitLt(16, 16, bias=False, has_fp16_weights=False)
        quantised.load_state_dict(plain.state_dict())
        layer.self_attn.q_proj = quantised.to("cpu")
    with torch.no_grad():
        model(torch.zeros(1, 2, dtype=torch.long))
    glora.inject(model, 2, targets=("q_proj",))
    with unchanged(model), pytest.raises(ValueError, match=r"LlamaForCausalLM.from_pretrained would drop"):
        glora.merge(model, requantise=True)
    report = glora.merge(model, requantise=True, bias="config")
    assert len(report.created_biases) == 2
    assert len(report.zero_biases) == 6


# -- reparameterisation of timm's models -----------------------------------------------------------


def test_a_bias_in_front_of_a_batch_norm_that_will_be_fused_is_named():
    timm = pytest.importorskip("timm")
    with seeded():
        model = timm.create_model("fastvit_t8", num_classes=3).eval()
    glora.inject(model, 2, targets=("stem",), convolutions=True)
    with torch.no_grad():
        for layer in glora.glora_layers(model).values():
            layer.E.fill_(0.1)
    x = torch.randn(1, 3, 64, 64, generator=generator())
    with torch.no_grad():
        expected = model(x)
        with pytest.warns(UserWarning, match=r"reparameterisation .* may drop them") as said:
            report = glora.merge(model)
    (text,) = (str(w.message) for w in said)
    assert repr(report.created_biases[0]) in text
    with torch.no_grad():
        assert torch.allclose(model(x), expected, atol=1e-5)
        fused = timm.utils.reparameterize_model(model)(x)
    assert not torch.allclose(fused, expected, atol=1e-2)  # if timm keeps them one day, nothing needs to be said


# -- adapted layers in a folder of save_pretrained -------------------------------------------------


def assert_warns(model, folder):
    with pytest.warns(UserWarning, match=r"LlamaForCausalLM.from_pretrained will drop what GLoRA has learnt") as said:
        model.save_pretrained(folder)
    assert [w.filename for w in said] == [__file__]


def saved_whole(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "copied",
    [lambda m: m, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), saved_whole],
    ids=["itself", "deepcopy", "pickle", "torch.save"],
)
def test_saving_a_model_that_is_not_merged_warns(copied, tmp_path):
    model = copied(adapted("llama", "q_proj"))
    randomize(model, seed=1)
    assert_warns(model, tmp_path)
    assert (tmp_path / "model.safetensors").exists()
    saved = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)  # as the warning says: the bare base
    assert torch.equal(logits(saved), logits(base("llama")))
    assert vars(model)["save_pretrained"].module is model


def test_a_merged_model_saves_in_silence_and_holds_nothing_of_ours(tmp_path):
    model = adapted("llama", "q_proj")
    report = glora.merge(model, keep=True, bias="config")
    assert b"glora" not in pickle.dumps(model)
    model.save_pretrained(tmp_path / "merged")
    glora.unmerge(model, report)
    assert_warns(model, tmp_path / "unmerged")


def test_parts_of_a_model_warn_too(tmp_path):
    model = nn.ModuleDict({"language": base("llama"), "other": nn.Linear(3, 3)})
    glora.inject(model, 2, targets=("q_proj",))
    assert_warns(model["language"], tmp_path / "whole")
    with pytest.warns(UserWarning, match=r"LlamaModel.from_pretrained"):
        model["language"].model.save_pretrained(tmp_path / "inner")


def test_loading_an_adapter_guards_too(tmp_path):
    glora.save_adapter(adapted("llama", "q_proj"), tmp_path / "adapter")
    assert_warns(glora.load_adapter(base("llama"), tmp_path / "adapter"), tmp_path / "folder")


def test_a_method_of_its_own_stays(tmp_path):
    model, calls = base("llama"), []
    model.save_pretrained = calls.append
    glora.inject(model, 2, targets=("q_proj",))
    with pytest.warns(UserWarning, match="is not merged"):
        model.save_pretrained(tmp_path)
    glora.set_paths(model, dict.fromkeys(glora.glora_layers(model), PathConfig()))
    glora.merge(model)
    model.save_pretrained(None)
    assert calls == [tmp_path, None]
    assert vars(model)["save_pretrained"].__self__ is calls


def test_a_hub_mixin_warns_too(tmp_path):
    hub = pytest.importorskip("huggingface_hub")

    class Net(nn.Module, hub.PyTorchModelHubMixin):
        def __init__(self):
            super().__init__()
            self.body = nn.Linear(4, 4)

    with pytest.warns(UserWarning, match=r"Net.from_pretrained will drop"):
        glora.inject(Net(), 2).save_pretrained(tmp_path)


def test_trainer_saves_its_checkpoints_with_one_warning(tmp_path):
    pytest.importorskip("accelerate")
    model = adapted("llama", "q_proj")
    samples = [{"input_ids": torch.arange(3, 9), "labels": torch.arange(3, 9)} for _ in range(4)]
    arguments = transformers.TrainingArguments(
        str(tmp_path), max_steps=3, save_steps=1, report_to=[], use_cpu=True, disable_tqdm=True, logging_strategy="no"
    )
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("default")
        transformers.Trainer(model, arguments, train_dataset=samples).train()
    assert {folder.name for folder in tmp_path.iterdir()} == {"checkpoint-1", "checkpoint-2", "checkpoint-3"}
    assert sum("is not merged" in str(w.message) for w in said) == 1
    assert isinstance(vars(model)["save_pretrained"], SavingGuard)
