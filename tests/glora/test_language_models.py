"""Hugging Face's language models: by name, bias-less layers, Conv1D, generation, files. All tiny and random."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import glora
from glora import GLoRAConv1D, GLoRALinear, LayerShape, PathConfig
from glora_kernels.error_bound import PROMISED, largest_constant
from tests.glora.toys import every_path, generator, randomize, same_bits, seeded, state, unchanged

transformers = pytest.importorskip("transformers")
from transformers.pytorch_utils import Conv1D  # noqa: E402

PRODUCTS = ("hadamard", "matmul")
SIZES = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
}
TOKENS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
LORA = PathConfig(B="lora_2")
MIXED = PathConfig("lora_2", "lora_1", "lora_2", "vector", "constant")
each_product = pytest.mark.parametrize("product", PRODUCTS)


def llama():
    return transformers.LlamaConfig(**SIZES, **TOKENS)


def qwen2():
    return transformers.Qwen2Config(**SIZES, **TOKENS)


def qwen3():
    return transformers.Qwen3Config(**SIZES, head_dim=8, **TOKENS)


def gpt2():
    return transformers.GPT2Config(vocab_size=40, n_positions=32, n_embd=16, n_layer=2, n_head=2, **TOKENS)


def build(config):
    with seeded():
        return transformers.AutoModelForCausalLM.from_config(config()).eval()


def prompt():
    return torch.randint(3, 40, (2, 6), generator=generator(5))


def generate(model):
    ids = prompt()
    return model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False)


def layout(model):
    modules = [(name, type(module)) for name, module in model.named_modules()]
    return modules, [(name, tuple(p.shape), p.dtype) for name, p in model.named_parameters()]


each_model = pytest.mark.parametrize(
    ("config", "targets"),
    [
        (llama, ("q_proj", "v_proj")),
        (qwen2, ("q_proj", "v_proj")),
        (qwen3, ("self_attn", "mlp.down_proj")),
        (gpt2, ("c_attn", "mlp.c_fc")),
    ],
    ids=["llama", "qwen2", "qwen3", "gpt2"],
)


@each_model
def test_as_lora_is_used(config, targets):
    """By name, a step of training, generation before and after merging: the same model again, with the same tokens."""
    model, ids = build(config), prompt()
    base = model(ids).logits
    glora.inject(model, 2, targets=targets, heads=())
    assert all(any(t in name for t in targets) for name in glora.glora_layers(model))
    assert torch.equal(model(ids).logits, base)
    glora.set_paths(model, dict.fromkeys(glora.glora_layers(model), LORA))
    trained = glora.trainable_parameters(model)
    optimizer = torch.optim.AdamW(trained, lr=0.3)
    losses = []
    for _ in range(4):
        logits = model(ids).logits
        losses.append(F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()))
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    with torch.no_grad():
        expected, tokens = model(ids).logits, generate(model)
        assert not torch.allclose(expected, base)
        report = glora.merge(model, bias="forbid")
        torch.testing.assert_close(model(ids).logits, expected, rtol=1e-5, atol=1e-6)
        assert torch.equal(generate(model), tokens)
    assert not any(layer.bias_created for layer in report.layers)
    assert layout(model) == layout(build(config))


def test_every_linear_layer_but_the_excluded_ones():
    model = build(llama)
    glora.inject(model, 2, exclude=("lm_head",))
    linears = {name for name, module in build(llama).named_modules() if type(module) is nn.Linear}
    assert set(glora.glora_layers(model)) == linears - {"lm_head"}
    gpt = glora.inject(build(gpt2), 2, exclude=("lm_head",))
    transposed = {name for name, module in build(gpt2).named_modules() if type(module) is Conv1D}
    assert len(transposed) == 8
    assert set(glora.glora_layers(gpt)) == transposed


def test_adapter_files_of_a_model_with_transposed_layers(tmp_path):
    model = glora.inject(build(gpt2), 2, targets=("c_attn", "c_proj"))
    randomize(model)
    glora.save_adapter(model, tmp_path / "adapter")
    other = glora.load_adapter(build(gpt2), tmp_path / "adapter").eval()
    assert torch.equal(other(prompt()).logits, model(prompt()).logits)


# -- merging layers without bias -------------------------------------------------------------------


def adapted_llama(path):
    model = glora.inject(build(llama), 2, targets=("q_proj", "v_proj"), heads=())
    randomize(model)
    glora.set_paths(model, {**dict.fromkeys(glora.glora_layers(model), LORA), "model.layers.1.self_attn.v_proj": path})
    return model


@pytest.mark.parametrize("path", [PathConfig(C="lora_1"), PathConfig(A="vector", E="constant"), PathConfig(C="vector")])
def test_a_bias_is_created_or_refused_never_dropped(path):
    model = adapted_llama(path)
    with torch.no_grad():
        expected = model(prompt()).logits
        with (
            unchanged(model),
            pytest.raises(ValueError, match=r"got C or E in .* 'model.layers.1.self_attn.v_proj'; train and search"),
        ):
            glora.merge(model, bias="forbid")
        with unchanged(model), pytest.raises(ValueError, match=r"LlamaForCausalLM.from_pretrained would drop; got C"):
            glora.merge(model)
        with pytest.warns(UserWarning, match=r"from_pretrained will drop, in 'model.layers.1.self_attn.v_proj'"):
            report = glora.merge(model, bias="create")
        torch.testing.assert_close(model(prompt()).logits, expected, rtol=1e-5, atol=1e-6)
    assert [layer.name for layer in report.layers if layer.bias_created] == ["model.layers.1.self_attn.v_proj"]
    assert model.model.layers[1].self_attn.v_proj.bias.any()
    assert model.model.layers[0].self_attn.v_proj.bias is None


def test_d_alone_makes_no_bias():
    glora.merge(adapted_llama(PathConfig(B="vector", D="vector")), bias="forbid")


def test_a_layer_with_a_bias_may_have_any_path():
    model = glora.inject(build(qwen2), 2, targets=("q_proj",))
    glora.set_paths(model, dict.fromkeys(glora.glora_layers(model), MIXED))
    glora.merge(model, bias="forbid")


def test_an_unknown_policy_is_refused():
    model = adapted_llama(LORA)
    with unchanged(model), pytest.raises(ValueError, match=r"bias: expected 'auto', .* or 'forbid', got 'drop'"):
        glora.merge(model, bias="drop")


# -- the transposed layer --------------------------------------------------------------------------


def plain(dtype=torch.float32):
    with seeded():
        conv = Conv1D(7, 5)
        nn.init.normal_(conv.bias)
    return conv.to(dtype)


def make(product="hadamard", path=MIXED, dtype=torch.float32):
    layer = GLoRAConv1D.from_conv1d(plain(dtype), 2, product)
    randomize(layer)
    layer.path = path
    return layer


def transposed(layer):
    state = layer.state_dict()
    state["weight"] = layer.weight.t()
    return state


def tokens(dtype=torch.float32):
    return torch.randn(2, 4, 5, generator=generator(1)).to(dtype)


@each_product
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@torch.no_grad()
def test_conv1d_is_the_linear_layer_of_the_transposed_weight(product, dtype):
    layer, x = make(product, dtype=dtype), tokens(dtype)
    twin = GLoRALinear(5, 7, rank=2, product=product, dtype=dtype)
    twin.load_state_dict(transposed(layer))
    for path in every_path(2)[::5]:
        layer.path = twin.path = path
        scale = copy.deepcopy(twin)
        for parameter in scale.parameters():
            parameter.data = parameter.data.abs()
        bound = scale.exact(x.abs())
        assert largest_constant(layer(x), twin.exact(x), bound, dtype) <= PROMISED[dtype], path
        torch.testing.assert_close(layer.exact(x), twin.exact(x), rtol=0, atol=1e-12)


@each_product
def test_conv1d_gradients(product):
    layer, x = make(product, dtype=torch.float64), tokens(torch.float64).requires_grad_()
    twin = GLoRALinear(5, 7, rank=2, product=product, dtype=torch.float64)
    twin.load_state_dict(transposed(layer))
    twin.path = layer.path
    names = [name for name, p in layer.named_parameters() if p.requires_grad]

    def gradients(module):
        return torch.autograd.grad(module(x).sin().sum(), [x, *(getattr(module, name) for name in names)])

    for got, want in zip(gradients(layer), gradients(twin)):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


@each_product
def test_conv1d_merges_into_a_conv1d_of_the_same_weights(product):
    layer = make(product)
    merged = layer.merge()
    twin = GLoRALinear(5, 7, rank=2, product=product)
    twin.load_state_dict(transposed(layer))
    twin.path = layer.path
    assert type(merged) is Conv1D
    assert merged.weight.is_contiguous()
    assert same_bits(state(merged), {"weight": twin.merge().weight.t(), "bias": twin.merge().bias})
    torch.testing.assert_close(merged(tokens()), layer(tokens()), rtol=1e-6, atol=1e-6)


def test_conv1d_is_taken_over_as_it_is():
    conv = plain()
    layer = GLoRAConv1D.from_conv1d(conv, 2)
    assert layer.weight is conv.weight
    assert layer.shape == LayerShape(7, 5)
    assert torch.equal(layer.merge(PathConfig()).weight, conv.weight)
    torch.testing.assert_close(layer(tokens()), conv(tokens()), rtol=1e-6, atol=1e-6)
    own = GLoRAConv1D(7, 5, rank=3, product="matmul", dtype=torch.bfloat16)
    assert own.weight.shape == (5, 7)
    assert own.weight.dtype == torch.bfloat16
    assert own.Ad.shape == (5, 3)


def test_conv1d_copies_and_pickles():
    layer = make()
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(tokens()), layer(tokens()))


def test_conv1d_subclasses_are_refused():
    class Own(Conv1D):
        pass

    with pytest.raises(TypeError, match=r"conv: expected exactly transformers.pytorch_utils.Conv1D, got .*Own"):
        GLoRAConv1D.from_conv1d(Own(2, 2))
    model = nn.Sequential(Own(2, 2), Conv1D(2, 2))
    with unchanged(model), pytest.raises(TypeError, match=r"Conv1D at '0', got its subclass"):
        glora.inject(model, 2, targets=["0"])
