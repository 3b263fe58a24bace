"""The drop-in convolution, alone and in a ConvNeXt and a ViT: formula, merging, counting, training, files."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import TensorDataset

import glora
from glora import GLoRAConv2d, LayerShape, PathConfig
from glora.peft import export_peft
from glora_kernels.error_bound import PROMISED, largest_constant
from tests.glora.toys import CLASSES, every_path, generator, randomize, same_bits, seeded, state, tiny_vit, unchanged

PRODUCTS = ("hadamard", "matmul")
MIXED = PathConfig("lora_2", "lora_1", "lora_2", "vector", "constant")
GEOMETRIES = {
    "plain": {},
    "strided": {"stride": (2, 1), "padding": 1},
    "same": {"padding": "same", "dilation": (1, 2)},
    "dilated": {"padding": "same", "padding_mode": "circular", "dilation": (2, 1)},
    "reflect": {"padding": (1, 2), "padding_mode": "reflect"},
    "replicate": {"padding": "same", "padding_mode": "replicate"},
    "circular": {"padding": (2, 1), "padding_mode": "circular", "stride": 2},
    "grouped": {"groups": 2, "padding": 1},
    "no-bias": {"bias": False},
}
each_product = pytest.mark.parametrize("product", PRODUCTS)
each_geometry = pytest.mark.parametrize("geometry", list(GEOMETRIES))


def plain_conv(geometry="plain", dtype=None):
    return nn.Conv2d(4, 6, (3, 2), **GEOMETRIES[geometry], dtype=dtype)


def make_conv(geometry="plain", product="hadamard", path=MIXED, dtype=None):
    layer = GLoRAConv2d.from_conv2d(plain_conv(geometry, dtype), 2, product)
    randomize(layer)
    layer.path = path
    return layer


def image(dtype=torch.float32):
    return torch.randn(2, 4, 6, 7, generator=generator(1)).to(dtype)


def literal(layer, x, values=lambda t: t):
    """The formula of the paper, on ``values`` of every tensor: one weight, one bias, a convolution of PyTorch's."""
    twin = copy.deepcopy(layer)
    for parameter in twin.parameters():
        parameter.data = values(parameter.data)
    return twin.exact(values(x))


# -- the layer -------------------------------------------------------------------------------------


@each_geometry
@each_product
def test_a_fresh_layer_computes_what_the_convolution_does(geometry, product):
    conv = plain_conv(geometry)
    expected = conv(image())
    layer = GLoRAConv2d.from_conv2d(conv, 2, product)
    assert layer.weight is conv.weight
    for path in (MIXED, PathConfig(), PathConfig("vector", "constant", "vector", "constant", "vector")):
        layer.path = path
        assert torch.equal(layer(image()), expected)


@each_geometry
@each_product
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@torch.no_grad()
def test_every_twentieth_path_is_within_the_contract(geometry, product, dtype):
    layer, x = make_conv(geometry, product, dtype=dtype), image(dtype)
    for path in every_path(2)[::20]:
        layer.path = path
        scale = literal(layer, x.double(), lambda t: t.double().abs())
        assert largest_constant(layer(x), layer.exact(x), scale, dtype) <= PROMISED[dtype], path


def test_the_formula_written_out():
    layer, x = make_conv(dtype=torch.float64), image(torch.float64)
    p = {name: parameter.detach().double() for name, parameter in layer.named_parameters()}
    w0 = p["weight"].flatten(1)
    w = w0 + w0 * (p["Ad"] @ p["Au"]) + p["Bd"][:, :1] @ p["Bu"][:1]
    b = p["bias"] + p["bias"] * p["D"] + p["E"][0] + w0 @ (p["Cd"] @ p["Cu"])[:, 0]
    expected = nn.functional.conv2d(x, w.reshape(6, 4, 3, 2)) + b[:, None, None]
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(layer.exact(x), expected, rtol=0, atol=1e-12)


@each_geometry
@each_product
def test_merging_gives_the_convolution_of_the_same_bits(geometry, product):
    layer, x = make_conv(geometry, product), image()
    for path in every_path(2)[::40]:
        layer.path = path
        merged = layer.merge()
        base = plain_conv(geometry)
        assert type(merged) is nn.Conv2d
        assert merged.extra_repr().split(", bias")[0] == base.extra_repr().split(", bias")[0]
        assert (merged.bias is None) == (base.bias is None and not path.makes_bias)
        assert torch.equal(merged(x), layer(x)), path


def test_merge_shares_nothing_and_keeps_the_mode():
    layer = make_conv(path=PathConfig()).eval()
    merged = layer.merge()
    assert not merged.training
    assert not any(p.requires_grad for p in merged.parameters())
    merged.weight.zero_()
    merged.bias.zero_()
    assert layer.weight.any()
    assert layer.bias.any()


@each_product
def test_count_is_what_the_path_reads(product):
    layer = make_conv("grouped", product)
    assert layer.shape == LayerShape(6, 12, True, product)
    rows = 6 if product == "hadamard" else 12
    assert MIXED.count(layer.shape) == 2 * (rows + 12) + (6 + 12) + 2 * (12 + 1) + 6 + 1


def test_only_what_the_path_reads_gets_a_gradient():
    layer = make_conv(path=PathConfig(A="vector", C="lora_1"))
    layer(image()).sum().backward()
    got = {name for name, p in layer.named_parameters() if p.grad is not None}
    assert got == {"Ad", "Cd", "Cu"}


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoint_repeats_the_path_of_its_first_run(reentrant):
    layer, x = make_conv(), image().requires_grad_()
    layer(x).square().sum().backward()
    expected = {name: p.grad for name, p in layer.named_parameters()}
    layer.zero_grad(set_to_none=True)
    y = checkpoint(layer, x, use_reentrant=reentrant)
    layer.path = PathConfig("vector", "constant")
    y.square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert (parameter.grad is None) == (expected[name] is None), name
        assert parameter.grad is None or torch.equal(parameter.grad, expected[name]), name


def test_unbatched_images():
    layer = make_conv("circular")
    torch.testing.assert_close(layer(image()[0]), layer(image())[0])


def test_own_constructor_takes_the_arguments_of_the_convolution():
    layer = GLoRAConv2d(4, 6, (3, 2), 2, 1, groups=2, bias=False, padding_mode="reflect", rank=3, product="matmul")
    assert layer.weight.shape == (6, 2, 3, 2)
    assert layer.Ad.shape == (12, 3)
    assert layer.bias is None
    assert layer(image()).shape == layer.merge(PathConfig())(image()).shape
    text = "4, 6, kernel_size=(3, 2), stride=(2, 2), padding=(1, 1), groups=2, padding_mode=reflect"
    assert repr(layer).startswith(f"GLoRAConv2d({text}, bias=False, product=matmul, rank=3, A=lora_3")


def test_copies_and_pickles():
    layer, x = make_conv("reflect"), image()
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert other.path == layer.path
        assert torch.equal(other(x), layer(x))


def test_loads_a_plain_convolution_strictly():
    layer, conv = make_conv(), plain_conv()
    layer.load_state_dict(conv.state_dict(), strict=True)
    layer.path = PathConfig()
    assert torch.equal(layer(image()), conv(image()))


def test_refuses_what_it_cannot_stand_for():
    class Own(nn.Conv2d):
        pass

    with pytest.raises(TypeError, match=r"conv: expected exactly torch.nn.Conv2d, got .*Own"):
        GLoRAConv2d.from_conv2d(Own(1, 1, 1))
    hooked = nn.Conv2d(1, 1, 1)
    hooked.register_forward_hook(lambda *_: None)
    with pytest.raises(TypeError, match="conv: expected one without hooks"):
        GLoRAConv2d.from_conv2d(hooked)
    with pytest.raises(ValueError, match="rank: expected an integer from 1, got 0"):
        GLoRAConv2d(1, 1, 1, rank=0)


# -- in models -------------------------------------------------------------------------------------


def tiny_convnext():
    """One block a stage: depthwise convolutions of 7 x 7, and strided ones of 2 x 2 between the stages."""
    from timm.models.convnext import ConvNeXt

    with seeded():
        return ConvNeXt(in_chans=1, num_classes=CLASSES, depths=(1, 1, 1, 1), dims=(4, 6, 8, 10), patch_size=1).eval()


def images(count=6):
    x = torch.randn(count, 1, 8, 8, generator=generator(3))
    return TensorDataset(x, torch.arange(count) % CLASSES)


MODELS = {"convnext": tiny_convnext, "vit": tiny_vit}
each_model = pytest.mark.parametrize("make", MODELS.values(), ids=list(MODELS))


def layout(model):
    modules = [(name, type(module)) for name, module in model.named_modules()]
    return modules, [(name, tuple(p.shape), p.dtype) for name, p in model.named_parameters()]


@each_model
def test_convolutions_are_adapted_when_asked_and_only_then(make):
    plain = {name for name, module in make().named_modules() if type(module) is nn.Conv2d}
    layers = glora.glora_layers(glora.inject(make(), 2))
    assert plain
    assert not plain & set(layers)
    with_convolutions = glora.glora_layers(glora.inject(make(), 2, convolutions=True))
    assert set(with_convolutions) == set(layers) | plain
    assert {type(with_convolutions[name]) for name in plain} == {GLoRAConv2d}


def test_convolutions_by_name():
    model = glora.inject(tiny_vit(), 2, targets=["patch_embed"], convolutions=True)
    assert list(glora.glora_layers(model)) == ["patch_embed.proj"]
    with pytest.raises(ValueError, match=r"targets: .* selects no nn.Linear or nn.Conv2d"):
        glora.inject(tiny_vit(), 2, targets=["norm"], convolutions=True)
    with pytest.raises(ValueError, match=r"targets: 'patch_embed' selects convolutions.*convolutions=True"):
        glora.inject(tiny_vit(), 2, targets=["patch_embed"])


def test_a_subclass_among_the_targets_is_refused():
    class Own(nn.Conv2d):
        pass

    model = nn.Sequential(Own(1, 1, 1), nn.Conv2d(1, 1, 1))
    with unchanged(model), pytest.raises(TypeError, match=r"expected exactly torch.nn.Conv2d at '0', got its subclass"):
        glora.inject(model, 2, targets=["0"], convolutions=True)


@each_model
@each_product
def test_train_merge_and_back(make, product):
    model = glora.inject(make(), 2, convolutions=True, product=product)
    x = images().tensors[0]
    assert torch.equal(model.eval()(x), make()(x))
    before = state(model)
    recipe = glora.Recipe(steps=3, batch_size=3, lr=0.05)
    glora.train(model, images(), recipe, space=glora.SearchSpace((2, 1)), progress=False)
    model.eval()
    moved = {name for name, tensor in state(model).items() if not torch.equal(tensor, before[name])}
    convs = [name for name, layer in glora.glora_layers(model).items() if isinstance(layer, GLoRAConv2d)]
    assert all(any(name.startswith(f"{conv}.") for name in moved) for conv in convs)
    assert not any(name.endswith((".weight", ".bias")) and not name.startswith("head") for name in moved)
    space = glora.SearchSpace((2, 1))
    glora.set_paths(model, glora.sample_paths(model, space, generator(7)))
    expected, adapted = model(x), state(model)
    assert not torch.allclose(expected, make()(x))
    report = glora.merge(model, x, keep=True)
    assert torch.equal(model(x), expected)
    assert report.largest_difference == report.model_difference == 0
    assert report.largest_error < 1e-5
    made = {f"{layer.name}.bias" for layer in report.layers if layer.bias_created}
    modules, parameters = layout(model)
    assert (modules, [p for p in parameters if p[0] not in made]) == layout(make())
    glora.unmerge(model, report)
    assert same_bits(state(model), adapted)
    assert torch.equal(model(x), expected)


def test_search_counts_convolutions_and_merges_candidates():
    model = glora.inject(tiny_convnext(), 2, convolutions=True)
    randomize(model)
    space = glora.SearchSpace((2, 1))
    settings = glora.SearchSettings(population=4, top=2, crossover=2, mutation=2, generations=1)
    result = glora.search(model, space, images(), limit=600, settings=settings, progress=False)
    assert glora.count_parameters(model, result.best.paths) == result.best.parameters <= 600
    paths = result.best.paths
    merged = glora.evaluate_merged(model, paths, images())
    with glora.using_paths(model, paths):
        assert glora.evaluate(model, images()) == merged


def test_adapter_files(tmp_path):
    model = glora.inject(tiny_convnext(), 2, convolutions=True)
    randomize(model)
    glora.set_paths(model, glora.sample_paths(model, glora.SearchSpace((2,)), generator(7)))
    glora.save_adapter(model, tmp_path / "adapter")
    for other in (tiny_convnext(), glora.inject(tiny_convnext(), 2, convolutions=True)):
        glora.load_adapter(other, tmp_path / "adapter")
        assert glora.get_paths(other) == glora.get_paths(model)
        assert torch.equal(other.eval()(images().tensors[0]), model(images().tensors[0]))


def test_unmerging_a_linear_layer_into_a_convolution_is_refused():
    model = glora.inject(nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU()), 2, convolutions=True)
    report = glora.merge(model, keep=True)
    model[0] = nn.Conv2d(4, 4, 3)
    with pytest.raises(ValueError, match=r"expected a merged torch.nn.Conv2d of \(4, 4, 1, 1\) at '0'"):
        glora.unmerge(model, report)


def test_formats_of_linear_layers_refuse_convolutions(tmp_path):
    model = glora.inject(tiny_vit(), 2, product="matmul", convolutions=True)
    glora.set_paths(model, dict.fromkeys(glora.glora_layers(model), PathConfig(B="lora_2")))
    message = r"model: expected adapted linear layers, .* got \['patch_embed.proj \(GLoRAConv2d\)'\]"
    for save, file in ((glora.save_official, "a.pt"), (export_peft, "peft")):
        with pytest.raises(ValueError, match=message):
            save(model, tmp_path / file)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_the_merged_convolution_keeps_the_memory_format(memory_format):
    net = nn.Sequential(nn.Conv2d(4, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3)).to(memory_format=memory_format)
    glora.inject(net, 2, convolutions=True)
    randomize(net)
    x = torch.randn(2, 4, 9, 9, generator=generator()).to(memory_format=memory_format)
    expected = net(x)
    strides = [net[index].weight.stride() for index in (0, 2)]
    glora.merge(net)
    assert [net[index].weight.stride() for index in (0, 2)] == strides
    assert net[2].weight.is_contiguous(memory_format=memory_format)
    assert torch.equal(net(x), expected)
