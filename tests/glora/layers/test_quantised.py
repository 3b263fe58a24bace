"""Quantised bases: what is read is what their packages decode, nothing dense is kept, merging is asked for."""

import copy
import math
import pickle

import pytest
import torch
from torch import nn

import glora
from glora import GLoRALinear, GLoRAQuantisedLinear, PathConfig
from glora.files import checksum
from glora.layers import quantised
from glora_kernels import glora_linear
from glora_kernels.error_bound import PROMISED, largest_constant
from tests.glora.toys import every_path, generator, randomize, seeded, unchanged

OUT, IN = 12, 48
MIXED = PathConfig("lora_2", "lora_1", "lora_2", "vector", "constant")


def bitsandbytes_linear(name, bias=True, dtype=torch.float32, sizes=(IN, OUT), **options):
    bnb = pytest.importorskip("bitsandbytes")
    dense = dense_linear(bias, sizes, dtype)
    linear = getattr(bnb.nn, name)(*sizes, bias, **options)
    linear.load_state_dict(dense.state_dict())
    return linear.to(dtype).to("cpu")


def dense_linear(bias=True, sizes=(IN, OUT), dtype=torch.float32):
    with seeded():
        return nn.Linear(*sizes, bias).to(dtype)


def four_bit(bias=True, **options):
    return bitsandbytes_linear("Linear4bit", bias, **{"quant_type": "nf4", **options})


def four_bit_plain_scales(bias=True):
    return bitsandbytes_linear("LinearFP4", bias, compress_statistics=False)


def eight_bit(bias=True, **options):
    return bitsandbytes_linear("Linear8bitLt", bias, has_fp16_weights=False, **options)


def torchao_linear(bias=True, granularity="PerRow", dtype=torch.float32, **options):
    pytest.importorskip("torchao")
    from torchao import quantization

    linear = dense_linear(bias, dtype=dtype)
    kind = getattr(quantization, granularity)
    kind = kind(16) if granularity == "PerGroup" else kind()
    weight = quantization.Int8Tensor.from_hp(linear.weight.detach(), kind, **options)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear


def torchao_groups(bias=True):
    return torchao_linear(bias, "PerGroup")


MAKERS = [four_bit, four_bit_plain_scales, eight_bit, torchao_linear, torchao_groups]
each_kind = pytest.mark.parametrize("make", MAKERS, ids=lambda make: make.__name__)
each_product = pytest.mark.parametrize("product", ["hadamard", "matmul"])


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Several blocks a layer, the last of them smaller: 5 rows, or 4 where blocks of values end only there."""
    monkeypatch.setattr(quantised, "BLOCK_ELEMENTS", 5 * IN)


def decoded(linear):
    """W0 as its package decodes it; 4 bits by the table, since the CPU kernel is wrong for a K of 48 (0.50.2)."""
    if type(linear) is nn.Linear:
        return linear.weight.dequantize()
    from bitsandbytes import functional
    from bitsandbytes import nn as quantised_nn

    if isinstance(linear, quantised_nn.Linear8bitLt):
        return functional.int8_vectorwise_dequant(linear.weight.data, linear.weight.SCB)
    state = linear.weight.quant_state
    scales = state.absmax
    if state.nested:
        scales = functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
    pairs = linear.weight.data.reshape(-1)
    places = torch.stack([pairs >> 4, pairs & 15], 1).reshape(-1).long()
    return (state.code[places] * scales.repeat_interleave(state.blocksize)[: len(places)]).reshape(state.shape)


def adapted(make, product="hadamard", path=MIXED, bias=True):
    layer = GLoRAQuantisedLinear.from_linear(make(bias), 2, product)
    randomize(layer)
    layer.path = path
    return layer


def dense_twin(layer):
    """The dense layer on the decoded weight."""
    twin = GLoRALinear(IN, OUT, layer.bias is not None, rank=2, product=layer.product)
    twin.path = layer.path
    tensors = twin.state_dict()
    tensors.update({**dict(layer.named_parameters()), "weight": layer.matrix})
    twin.load_state_dict(tensors)
    return twin


def tokens(*leading):
    return torch.randn(*(leading or (4,)), IN, generator=generator(1))


# -- the layer -------------------------------------------------------------------------------------


@each_kind
def test_the_weight_is_read_as_its_package_decodes_it(make):
    linear = make()
    layer = GLoRAQuantisedLinear.from_linear(linear, 2)
    assert type(layer) is GLoRAQuantisedLinear
    assert layer.weight is linear.weight
    assert len(quantised._Blocks(layer).bounds) == 3
    assert torch.equal(layer.matrix, decoded(linear).to(layer.matrix.dtype))


@each_kind
def test_a_fresh_layer_multiplies_by_the_decoded_weight(make):
    linear = make()
    weight = decoded(linear)
    layer = GLoRAQuantisedLinear.from_linear(linear, 2)
    torch.testing.assert_close(layer(tokens(2, 3)), nn.functional.linear(tokens(2, 3), weight, linear.bias))


def test_outputs_stay_those_of_the_layer():
    """Not of int8 of bitsandbytes, whose kernel quantises x, too: there they stay within that rounding."""
    x = torch.randn(4, 64, generator=generator(1))
    for linear, inputs in ((four_bit(sizes=(64, OUT)).train(), x), (torchao_linear(), tokens())):
        expected = linear(inputs)
        torch.testing.assert_close(GLoRAQuantisedLinear.from_linear(linear, 2)(inputs), expected)
    linear = eight_bit()
    expected = linear(tokens())
    layer = GLoRAQuantisedLinear.from_linear(linear, 2)  # after a call: its scales are in another place then
    torch.testing.assert_close(layer(tokens()), expected, rtol=0.05, atol=0.05)


@each_kind
@each_product
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_outputs_and_gradients_are_those_of_the_dense_layer(make, product, bias):
    layer, x = adapted(make, product, bias=bias), tokens().requires_grad_()
    twin = dense_twin(layer)
    names = [name for name, p in twin.named_parameters() if p.requires_grad]
    for path in every_path(2)[::20]:
        layer.path = twin.path = path
        got, want = (
            torch.autograd.grad(m(x).sin().sum(), [x, *(getattr(m, n) for n in names)], allow_unused=True)
            for m in (layer, twin)
        )
        for name, one, other in zip(("x", *names), got, want):
            assert (one is None) == (other is None), (path, name)
            if one is not None:
                torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5, msg=f"{path} {name}")


@each_kind
@torch.no_grad()
def test_outputs_are_within_the_contract(make):
    layer, x = adapted(make), tokens()
    scale = dense_twin(layer)
    for path in every_path(2)[::10]:
        layer.path = scale.path = path
        twin = copy.deepcopy(scale)
        for parameter in twin.parameters():
            parameter.data = parameter.data.abs()
        assert largest_constant(layer(x), layer.exact(x), twin.exact(x.abs()), x.dtype) <= PROMISED[x.dtype], path


@each_kind
def test_no_dense_weight_is_kept_for_backward(make):
    layer, kept = adapted(make), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(tokens().requires_grad_())
    assert kept
    assert all(tuple(tensor.shape) != (OUT, IN) for tensor in kept)
    support = {p.data_ptr() for p in layer.parameters()}
    assert all(t.data_ptr() in support or t.shape == (4, IN) or t.numel() == OUT for t in kept)


def test_four_bits_take_what_eight_bits_and_fp32_do_not():
    """The memory of the frozen weight and its scales, for a layer of 512 x 512: bytes a value."""
    sizes = {}
    for name, make in (("nf4", four_bit), ("int8", eight_bit)):
        linear = make(False, sizes=(512, 512))
        layer = GLoRAQuantisedLinear.from_linear(linear, 2)
        frozen = {
            k: t for k, t in layer.state_dict().items() if k not in dict(layer.named_parameters()) or k == "weight"
        }
        sizes[name] = sum(t.numel() * t.element_size() for t in frozen.values()) / 512**2
    assert sizes["nf4"] < 0.53
    assert sizes["int8"] < 1.02


def test_compute_dtype_of_a_four_bit_layer():
    layer = GLoRAQuantisedLinear.from_linear(four_bit(compute_dtype=torch.bfloat16), 2)
    randomize(layer)
    x = tokens()
    expected = glora_linear(x.bfloat16(), layer.matrix.bfloat16(), layer.bias.bfloat16(), layer.terms())
    assert layer(x).dtype == torch.float32
    torch.testing.assert_close(layer(x), expected.float())


def test_half_inputs():
    layer = adapted(eight_bit)
    assert layer(tokens().bfloat16()).dtype == torch.bfloat16
    torch.testing.assert_close(layer(tokens().bfloat16()).float(), layer(tokens()), rtol=0.05, atol=0.1)


@each_kind
def test_copies_pickles_and_state(make):
    layer, x = adapted(make), tokens()
    expected = layer(x)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), expected)
    changed = layer.merge(PathConfig(A="constant", B="vector"), requantise=True)
    other = GLoRAQuantisedLinear.from_linear(changed, 2)  # on another weight: all that is frozen comes from the state
    assert not torch.equal(other.matrix, layer.matrix)
    other.load_state_dict(layer.state_dict(), strict=True)
    other.path = layer.path
    assert torch.equal(other(x), expected)


@pytest.mark.parametrize("make", [four_bit, four_bit_plain_scales, eight_bit], ids=lambda make: make.__name__)
def test_loads_the_plain_layer_strictly(make):
    layer, plain = (
        adapted(make),
        GLoRAQuantisedLinear.from_linear(make(), 2).merge(PathConfig(A="constant"), requantise=True),
    )
    layer.load_state_dict(plain.state_dict(), strict=True)
    layer.path = PathConfig()
    torch.testing.assert_close(layer(tokens()), nn.functional.linear(tokens(), decoded(plain), plain.bias))


@pytest.mark.parametrize("make", [four_bit, four_bit_plain_scales, eight_bit], ids=lambda make: make.__name__)
def test_casting_leaves_the_weight_as_it_is(make):
    layer = adapted(make)
    weight = layer.matrix
    layer.to(torch.bfloat16)
    assert layer.D.dtype == torch.bfloat16
    assert torch.equal(layer.matrix, weight)


# -- merging ---------------------------------------------------------------------------------------


@each_kind
@each_product
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_requantised(make, product, bias):
    """The merged layer holds what its package makes of W_eff, and the error that is reported is that of its values."""
    layer = adapted(make, product, bias=bias)
    w_eff = dense_twin(layer).merge()
    merged = layer.merge(requantise=True)
    base = make(bias)
    assert type(merged) is type(base)
    assert merged.weight.shape == base.weight.shape
    assert merged.weight.dtype == base.weight.dtype
    assert not any(p.requires_grad for p in merged.parameters())
    torch.testing.assert_close(merged.bias, w_eff.bias)
    held = decoded(merged)
    lost = float((held - w_eff.weight).abs().max())
    assert math.isclose(layer.requantisation_error(merged), lost, rel_tol=1e-4)
    assert 0 < lost < 0.2 * float(w_eff.weight.abs().max())
    again = GLoRAQuantisedLinear.from_linear(merged, 2)
    torch.testing.assert_close(again(tokens()), nn.functional.linear(tokens(), held, merged.bias))


def test_an_asymmetric_int8_weight_stays_one():
    quantization = pytest.importorskip("torchao.quantization")
    linear = dense_linear()
    linear.weight.data += 1  # no value near or below zero: symmetric values would use half of their range
    weight = quantization.Int8Tensor.from_hp(
        linear.weight.detach(), quantization.PerRow(), quantization.MappingType.ASYMMETRIC
    )
    linear.weight = nn.Parameter(weight, requires_grad=False)
    layer = GLoRAQuantisedLinear.from_linear(linear, 2)
    layer.path = PathConfig(A="constant")
    layer.Ad.data.fill_(0.5)
    merged = layer.merge(requantise=True)
    assert merged.weight.zero_point.any()
    assert layer.requantisation_error(merged) <= 0.51 * float(merged.weight.scale.max())


@each_kind
def test_requantising_what_was_not_changed_loses_little(make):
    layer = adapted(make, path=PathConfig())
    merged = layer.merge(requantise=True)
    assert layer.requantisation_error(merged) <= 0.01 * float(layer.matrix.abs().max())


def model(make):
    with seeded():
        return nn.Sequential(make(), nn.Tanh(), nn.Linear(OUT, OUT), nn.Linear(OUT, 3))


@each_kind
def test_merging_a_model(make):
    net = glora.inject(model(make), 2)
    randomize(net)
    assert [type(layer) for layer in glora.glora_layers(net).values()] == [
        GLoRAQuantisedLinear,
        GLoRALinear,
        GLoRALinear,
    ]
    x = tokens()
    with torch.no_grad():
        expected = net(x)
        with unchanged(net), pytest.raises(ValueError, match=r"requantise: expected True .* got False with \['0'\]"):
            glora.merge(net)
        report = glora.merge(net, keep=True, requantise=True)
    assert type(net[0]) is type(make())
    first, *others = report.layers
    assert 0 < first.requantisation == report.largest_requantisation
    assert first.difference > 0
    assert all(layer.requantisation is None and layer.difference == 0 for layer in others)
    assert "quantising it anew" in str(report)
    assert report.to_dict()["largest_requantisation"] == report.largest_requantisation
    glora.unmerge(net, report)
    assert torch.equal(net(x), expected)


def test_a_plain_layer_does_not_pass_for_a_merged_quantised_one():
    net = glora.inject(model(torchao_linear), 2, targets=["0"])
    report = glora.merge(net, keep=True, requantise=True)
    net[0] = dense_linear()
    with pytest.raises(ValueError, match="model: expected a merged"):
        glora.unmerge(net, report)


def test_a_layer_refuses_to_merge_unasked():
    with pytest.raises(ValueError, match="requantise: expected True"):
        adapted(eight_bit).merge()


@each_kind
def test_what_is_not_finite_is_refused(make):
    layer = adapted(make)
    layer.Bu.data[0, 0] = torch.inf
    with pytest.raises(ValueError, match="merged weight: expected finite values"):
        layer.merge(requantise=True)


def test_int8_is_made_from_fp16():
    layer = adapted(eight_bit, path=PathConfig(B="constant"))
    layer.Bd.data.fill_(1e5)
    with pytest.raises(ValueError, match="within the range of fp16"):
        layer.merge(requantise=True)


# -- in models -------------------------------------------------------------------------------------


@each_kind
def test_train_search_and_files(make, tmp_path):
    from torch.utils.data import TensorDataset

    data = TensorDataset(tokens(9), torch.arange(9) % 3)
    net, space = glora.inject(model(make), 2, targets=["0", "2"]), glora.SearchSpace((2, 1))
    frozen = checksum([net[0].weight])
    before = {name: p.detach().clone() for name, p in net[0].named_parameters() if p.requires_grad}
    glora.train(net, data, glora.Recipe(steps=4, batch_size=3), space=space, progress=False, checkpoint=tmp_path / "c")
    assert any(not torch.equal(getattr(net[0], name), tensor) for name, tensor in before.items())
    assert checksum([net[0].weight]) == frozen
    settings = glora.SearchSettings(population=3, top=1, crossover=1, mutation=1, generations=1)
    best = glora.search(net, space, data, settings=settings, progress=False).best
    candidate = glora.evaluate_merged(net, best.paths, data)
    with glora.using_paths(net, best.paths):
        assert glora.evaluate(net, data) == candidate
        glora.save_adapter(net, tmp_path / "adapter")
        expected = net(tokens())
    other = glora.load_adapter(model(make), tmp_path / "adapter")
    assert type(other[0]) is GLoRAQuantisedLinear
    assert torch.equal(other(tokens()), expected)


def test_lycoris_files_of_a_quantised_base(tmp_path):
    net = glora.inject(model(four_bit), 2, product="matmul", targets=["0"])
    randomize(net)
    glora.set_paths(net, {"0": PathConfig("lora_2", "lora_1")})
    glora.save_lycoris(net, tmp_path / "a.safetensors", adapters_only=True)
    other = glora.load_lycoris(model(four_bit), tmp_path / "a.safetensors")
    assert type(other[0]) is GLoRAQuantisedLinear
    assert torch.equal(other(tokens()), net(tokens()))


def test_a_language_model_in_four_bits():
    """As QLoRA: q_proj and v_proj of a LLaMA in NF4, adapted, trained, run."""
    transformers = pytest.importorskip("transformers")
    bnb = pytest.importorskip("bitsandbytes")
    sizes = {"vocab_size": 40, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=2, bos_token_id=0, eos_token_id=1, pad_token_id=2)
    with seeded():
        llm = transformers.AutoModelForCausalLM.from_config(config)
        attention = llm.model.layers[0].self_attn
        for name in ("q_proj", "v_proj"):
            linear = bnb.nn.Linear4bit(64, 64, False, quant_type="nf4")
            linear.load_state_dict(getattr(attention, name).state_dict())
            setattr(attention, name, linear.to("cpu"))
    ids = torch.randint(3, 40, (2, 6), generator=generator(5))
    expected = llm(ids).logits
    glora.inject(llm, 2, targets=("q_proj", "v_proj"))
    assert {type(layer) for layer in glora.glora_layers(llm).values()} == {GLoRAQuantisedLinear}
    torch.testing.assert_close(llm(ids).logits, expected)
    optimizer = torch.optim.AdamW(glora.trainable_parameters(llm), lr=0.1)
    losses = [train_step(llm, ids, optimizer) for _ in range(4)]
    assert losses[-1] < losses[0]
    written = llm.eval().generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False)
    assert written.shape[1] <= 9


def train_step(llm, ids, optimizer):
    logits = llm(ids).logits
    loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return float(loss.detach())


# -- what is refused -------------------------------------------------------------------------------


def test_weights_that_are_not_quantised_yet():
    bnb = pytest.importorskip("bitsandbytes")
    for linear in (
        bnb.nn.Linear4bit(IN, OUT),
        bnb.nn.Linear8bitLt(IN, OUT),
        bnb.nn.Linear8bitLt(IN, OUT, has_fp16_weights=False),
    ):
        flags = [p.requires_grad for p in linear.parameters()]
        with pytest.raises(TypeError, match="not quantised yet; move the model to its device first"):
            GLoRAQuantisedLinear.from_linear(linear, 2)
        assert [p.requires_grad for p in linear.parameters()] == flags


def test_weights_that_were_repacked_for_the_cpu():
    """On CPUs with AVX512-BF16 bitsandbytes exchanges the weight's layout at a first call in eval mode."""
    linear = four_bit(sizes=(64, 64))
    linear.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(TypeError, match="repacked for this CPU; adapt the model before it is run"):
        GLoRAQuantisedLinear.from_linear(linear, 2)


def test_other_formats_and_types():
    pytest.importorskip("torchao")
    from torchao.quantization import Int8Tensor, PerRow
    from torchao.quantization.quantize_.workflows.nf4.nf4_tensor import to_nf4

    linear = nn.Linear(64, 256)
    linear.weight = nn.Parameter(to_nf4(linear.weight.detach(), 64, 256), requires_grad=False)
    with pytest.raises(TypeError, match=r"expected a weight of torchao's Int8Tensor, got .*NF4Tensor"):
        GLoRAQuantisedLinear.from_linear(linear, 2)
    scaled = Int8Tensor.from_hp(torch.ones(4, 4), PerRow(), act_pre_scale=torch.ones(4))
    linear.weight = nn.Parameter(scaled, requires_grad=False)
    with pytest.raises(TypeError, match="without act_pre_scale"):
        GLoRAQuantisedLinear.from_linear(linear, 2)
    with pytest.raises(TypeError, match=r"linear: expected .* got torch.nn.Linear"):
        GLoRAQuantisedLinear.from_linear(nn.Linear(2, 2))
    with pytest.raises(TypeError, match="expected to be made from a layer"):
        GLoRAQuantisedLinear(2, 2)


@each_kind
def test_the_dense_layer_names_the_quantised_one(make):
    linear = make(True)
    with pytest.raises(TypeError, match=r"linear: expected a dense weight, got a quantised one .*GLoRAQuantisedLinear"):
        GLoRALinear.from_linear(linear, 2)
    assert isinstance(glora.inject(nn.Sequential(linear), 2)[0], GLoRAQuantisedLinear)


def test_hooks_and_subclasses():
    linear = eight_bit()
    linear.register_forward_hook(lambda *_: None)
    with pytest.raises(TypeError, match="linear: expected one without hooks"):
        GLoRAQuantisedLinear.from_linear(linear, 2)

    class Own(type(four_bit())):
        pass

    own = four_bit()
    own.__class__ = Own
    net = nn.Sequential(own, nn.Linear(OUT, OUT))
    with unchanged(net), pytest.raises(TypeError, match=r"at '0', got its subclass .*Own"):
        glora.inject(net, 2, targets=["0"])


def test_two_bases_of_equal_packed_values_and_other_scales_are_told_apart():
    pytest.importorskip("bitsandbytes")
    one, two = four_bit(sizes=(64, 64)), four_bit(sizes=(64, 64))
    two.weight.quant_state.absmax = 2 * two.weight.quant_state.absmax
    assert torch.equal(one.weight, two.weight)
    assert checksum(one.parameters()) != checksum(two.parameters())


@pytest.mark.parametrize("make", [four_bit, eight_bit])
def test_a_state_of_a_plain_layer_is_refused_and_nothing_is_loaded(make):
    pytest.importorskip("bitsandbytes")
    layer = GLoRAQuantisedLinear.from_linear(make(sizes=(64, 64)), 2)
    before = layer(torch.ones(1, 64))
    with pytest.raises(RuntimeError, match="weight: expected the packed"):
        layer.load_state_dict(nn.Linear(64, 64).state_dict())
    assert torch.equal(layer(torch.ones(1, 64)), before)


def test_packed_values_without_their_scales_are_missing_keys():
    pytest.importorskip("bitsandbytes")
    layer = GLoRAQuantisedLinear.from_linear(four_bit(sizes=(64, 64)), 2)
    state = {name: tensor for name, tensor in layer.state_dict().items() if not name.startswith("weight.")}
    with pytest.raises(RuntimeError, match=r"Missing key.*weight\.absmax"):
        layer.load_state_dict(state)


def test_a_quantised_base_cannot_be_exported_to_peft(tmp_path):
    pytest.importorskip("bitsandbytes")
    model = glora.inject(nn.Sequential(four_bit(sizes=(64, 64))), 2)
    with pytest.raises(ValueError, match="a quantised base"):
        glora.peft.export_peft(model, tmp_path / "folder")
