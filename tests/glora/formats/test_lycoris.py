"""Files of LyCORIS: against the package itself, against the formulas of both layouts, and what must be refused."""

import re
from collections import OrderedDict

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import glora.files
from glora import PathConfig, get_paths, glora_layers, inject, load_lycoris, save_lycoris, set_paths
from tests.glora.toys import generator, randomize, same_bits, seeded, state, unchanged

FACTORS = ("a1", "a2", "b1", "b2")
LAYERS = ("square", "block.wide", "block.narrow")


@pytest.fixture
def file(tmp_path):
    return tmp_path / "adapter.safetensors"


@pytest.fixture
def wrapper():
    return pytest.importorskip("lycoris.wrapper")


def plain(dtype=torch.float64):
    """Linear layers of as many inputs as outputs, of more and of fewer, the last without bias."""
    with seeded():
        block = OrderedDict(wide=nn.Linear(6, 9), act=nn.GELU(), narrow=nn.Linear(9, 4, bias=False))
        return nn.Sequential(OrderedDict(square=nn.Linear(6, 6), block=nn.Sequential(block))).to(dtype)


def adapted(rank=3, dtype=torch.float64, paths=None):
    """A of low rank, B of a lower one, each of them none once."""
    model = inject(plain(dtype), rank, product="matmul")
    randomize(model)
    low, full = f"lora_{max(rank - 1, 1)}", f"lora_{rank}"
    chosen = paths or [PathConfig(full, low), PathConfig(A="none", B=full), PathConfig(A=low, B="none")]
    set_paths(model, dict(zip(LAYERS, chosen)))
    return model


def inputs(dtype=torch.float64):
    return torch.randn(5, 6, generator=generator(2)).to(dtype)


def random_file(file, rank=2, alpha=2.0, layout="new", prefix="lycoris", model=None, dtype=torch.float64, seed=0):
    """A file as others write it, one entry at a time; returns its tensors."""
    gen, tensors = generator(seed), {}
    for name, module in (model or plain()).named_modules():
        if not isinstance(module, nn.Linear):
            continue
        rows, columns = module.weight.shape
        shapes = [(columns, rank), (rank, columns), (rows, rank), (rank, columns)]
        if layout == "old":
            shapes = [(rank, columns), (columns, rank), (rank, columns), (rows, rank)]
        key = f"{prefix}_{name}".replace(".", "_")
        for factor, shape in zip(FACTORS, shapes):
            tensors[f"{key}.{factor}.weight"] = (torch.randn(shape, generator=gen) * 0.3).to(dtype)
        if alpha is not None:
            tensors[f"{key}.alpha"] = torch.tensor(alpha)
    save_file(tensors, file)
    return tensors


def as_others_read(model, tensors, prefix="lycoris"):
    """``model`` with the weights that ComfyUI gives it: its rule for the layout, then that layout's formula."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            key, weight = f"{prefix}_{name}".replace(".", "_"), module.weight.detach()
            a1, a2, b1, b2 = (tensors[f"{key}.{factor}.weight"].to(weight) for factor in FACTORS)
            fits_old = a1.shape[0] == a2.shape[1] == b1.shape[0] == b2.shape[1]
            fits_new = a1.shape[1] == a2.shape[0] == b1.shape[1] == b2.shape[0]
            old = fits_old and (not fits_new or a2.shape[0] == weight.shape[0] == weight.shape[1])
            delta = weight @ a2 @ a1 + b2 @ b1 if old else weight @ a1 @ a2 + b1 @ b2
            alpha = tensors.get(f"{key}.alpha")
            scale = 1.0 if alpha is None else float(alpha) / (a1.shape[0] if old else a1.shape[1])
            module.weight.data += scale * delta
    return model


def assert_equal_outputs(one, other, dtype=torch.float64):
    x = inputs(dtype)
    with torch.no_grad():
        torch.testing.assert_close(one(x), other(x), **({"rtol": 1e-12, "atol": 1e-12} if dtype.itemsize == 8 else {}))


# -- against the package lycoris-lora ----------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(("rank", "alpha"), [(1, 1.0), (2, 2.0), (4, 1.0), (3, 1.0), (3, 0.75), (6, 16.0)])
def test_reads_what_lycoris_writes(wrapper, file, rank, alpha, dtype):
    theirs = plain(dtype)
    network = wrapper.LycorisNetwork(theirs, 1.0, lora_dim=rank, alpha=alpha, network_module="glora")
    network.apply_to()
    randomize(network, seed=rank)
    network.to(dtype).save_weights(str(file), None, {})
    ours = load_lycoris(plain(dtype), file)
    assert list(glora_layers(ours)) == list(LAYERS)
    assert not torch.allclose(ours(inputs(dtype)), plain(dtype)(inputs(dtype)))
    assert_equal_outputs(ours, theirs, dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("rank", [1, 3, 6])
def test_lycoris_reads_what_we_write(wrapper, file, rank, dtype):
    ours = adapted(rank, dtype)
    save_lycoris(ours, file)
    theirs = plain(dtype)
    network, _ = wrapper.create_lycoris_from_weights(1.0, str(file), theirs)
    assert [lora.lora_name for lora in network.loras] == [
        "lycoris_block_narrow",
        "lycoris_block_wide",
        "lycoris_square",
    ]
    network.apply_to()
    network.to(dtype)
    assert_equal_outputs(ours, theirs, dtype)


def test_lycoris_continues_from_what_we_write(wrapper, file):
    """Into a network that was made before, of one rank, as its trainers do."""
    ours = adapted(2, paths=[PathConfig("lora_2", "lora_1"), PathConfig("lora_1", "lora_2"), PathConfig(B="lora_2")])
    save_lycoris(ours, file)
    theirs = plain()
    network = wrapper.LycorisNetwork(theirs, 1.0, lora_dim=2, alpha=2, network_module="glora")
    network.apply_to()
    assert network.double().load_weights(str(file)) == {}
    assert_equal_outputs(ours, theirs)


# -- both layouts against their formulas -------------------------------------------------------------


@pytest.mark.parametrize("layout", ["new", "old"])
@pytest.mark.parametrize(("rank", "alpha"), [(1, 1.0), (2, 0.5), (3, 1.0), (5, 6.0), (3, -1.0), (3, None)])
def test_reads_both_layouts(file, rank, alpha, layout):
    tensors = random_file(file, rank, alpha, layout)
    assert_equal_outputs(load_lycoris(plain(), file), as_others_read(plain(), tensors))


@pytest.mark.parametrize("layout", ["new", "old"])
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_others_read_both_layouts(file, rank, layout):
    ours = adapted(rank)
    save_lycoris(ours, file, layout=layout)
    assert_equal_outputs(ours, as_others_read(plain(), load_file(file)))


def test_names_and_shapes_of_a_file(file):
    save_lycoris(adapted(3, torch.float32), file, prefix="lora_unet", layout="old")
    tensors = load_file(file)
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items() if "wide" in name} == {
        "lora_unet_block_wide.a1.weight": (3, 6),
        "lora_unet_block_wide.a2.weight": (6, 3),
        "lora_unet_block_wide.b1.weight": (3, 6),
        "lora_unet_block_wide.b2.weight": (9, 3),
        "lora_unet_block_wide.alpha": (),
    }
    assert len(tensors) == 15 and all(tensor.dtype == torch.float32 for tensor in tensors.values())
    assert not tensors["lora_unet_block_wide.a1.weight"].any() and not tensors["lora_unet_block_wide.a2.weight"].any()


@pytest.mark.parametrize("make", [plain, adapted], ids=["plain", "adapted"])
@pytest.mark.parametrize("layout", ["new", "old"])
def test_round_trip_keeps_paths_and_bits(file, layout, make):
    original = adapted(3, torch.float32)
    save_lycoris(original, file, layout=layout)
    model = make(dtype=torch.float32)
    assert load_lycoris(model, file) is model
    assert get_paths(model) == get_paths(original)
    assert torch.equal(model(inputs(torch.float32)), original(inputs(torch.float32)))


def test_a_layer_of_none_is_kept(file):
    original = adapted(2, paths=[PathConfig(), PathConfig("lora_2"), PathConfig()])
    save_lycoris(original, file)
    assert load_file(file)["lycoris_square.a1.weight"].shape == (6, 1)
    assert get_paths(load_lycoris(plain(), file)) == get_paths(original)


def test_a_component_that_is_zero_in_one_factor_counts(file):
    """As LyCORIS initialises: it is trained, so it belongs to the path."""
    tensors = random_file(file, rank=2)
    tensors["lycoris_square.a2.weight"].zero_()
    save_file(tensors, file)
    assert get_paths(load_lycoris(plain(), file))["square"] == PathConfig("lora_2", "lora_2")


# -- convolutions ------------------------------------------------------------------------------------

CONVOLUTIONS = ("point", "block.strided", "block.wide", "out")


def convolutional(dtype=torch.float64):
    """Kernels of 1 x 1, 3 x 3 (strided, padded) and 3 x 2 (dilated), and a linear layer after them."""
    with seeded():
        block = OrderedDict(
            strided=nn.Conv2d(3, 5, 3, stride=2, padding=1),
            act=nn.GELU(),
            wide=nn.Conv2d(5, 4, (3, 2), dilation=(1, 2), bias=False),
        )
        layers = OrderedDict(
            point=nn.Conv2d(3, 3, 1), block=nn.Sequential(block), flat=nn.Flatten(), out=nn.Linear(4 * 3 * 3, 2)
        )
        return nn.Sequential(layers).to(dtype)


def images(dtype=torch.float64):
    return torch.randn(2, 3, 9, 9, generator=generator(3)).to(dtype)


def conv_file(file, rank=2, alpha=1.0, layout="new", model=None):
    """As LyCORIS writes it; returns the tensors."""
    gen, tensors = generator(5), {}
    for name, module in (model or convolutional()).named_modules():
        if isinstance(module, nn.Conv2d):
            inner, outer, kernel = module.in_channels, module.out_channels, module.kernel_size
            shapes = [(inner, rank, 1, 1), (rank, inner, 1, 1), (outer, rank, 1, 1), (rank, inner, *kernel)]
        elif isinstance(module, nn.Linear):
            inner, outer = module.in_features, module.out_features
            shapes = [(inner, rank), (rank, inner), (outer, rank), (rank, inner)]
        else:
            continue
        order = FACTORS if layout == "new" else ("a2", "a1", "b2", "b1")
        key = f"lycoris_{name}".replace(".", "_")
        for factor, shape in zip(order, shapes):
            tensors[f"{key}.{factor}.weight"] = torch.randn(shape, generator=gen) * 0.3
        tensors[f"{key}.alpha"] = torch.tensor(alpha)
    save_file(tensors, file)
    return tensors


def as_lycoris_computes(tensors, layout="new"):
    """The model in fp64 with the weights of LyCORIS' and ComfyUI's formula, channel by channel and position."""
    model = convolutional()
    for name, module in model.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            key, weight = f"lycoris_{name}".replace(".", "_"), module.weight.detach()
            a1, a2, b1, b2 = (tensors[f"{key}.{factor}.weight"].double().flatten(1) for factor in FACTORS)
            if layout == "old":
                a1, a2, b1, b2 = a2, a1, b2, b1
            delta = torch.einsum("oi...,ij->oj...", weight, a1 @ a2) + (b1 @ b2).reshape(weight.shape)
            module.weight.data += float(tensors[f"{key}.alpha"]) / a1.shape[1] * delta
    return model


def assert_equal_images(one, other, dtype=torch.float64):
    x = images(dtype)
    tolerance = 1e-12 if dtype == torch.float64 else 2e-6
    with torch.no_grad():
        torch.testing.assert_close(one(x), other(x).to(dtype), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(("rank", "conv_rank"), [(2, 2), (3, 1)])
@pytest.mark.parametrize("bypass", [False, True])
def test_reads_convolutions_that_lycoris_writes(wrapper, file, rank, conv_rank, dtype, bypass):
    theirs = convolutional(dtype)
    options = {"conv_lora_dim": conv_rank, "alpha": 1.0, "conv_alpha": 0.75, "network_module": "glora"}
    network = wrapper.LycorisNetwork(theirs, 1.0, lora_dim=rank, **options)
    network.apply_to()
    randomize(network, seed=rank)
    network.to(dtype).save_weights(str(file), None, {})
    for lora in network.loras:
        # its bypass knows no dilation
        lora.bypass_mode = bypass and lora.lora_name != "lycoris_block_wide"
    exact = as_lycoris_computes(load_file(file))
    ours = load_lycoris(convolutional(dtype), file)
    assert sorted(glora_layers(ours)) == sorted(CONVOLUTIONS)
    assert {name: layer.rank for name, layer in glora_layers(ours).items()} == {
        "point": rank,
        "block.strided": 9 * conv_rank,
        "block.wide": 6 * conv_rank,
        "out": rank,
    }
    assert not torch.allclose(ours(images(dtype)), convolutional(dtype)(images(dtype)))
    for one in (theirs, ours):
        assert_equal_images(one, lambda x: exact(x.double()), dtype)
    glora.merge(ours)
    assert_equal_images(ours, lambda x: exact(x.double()), dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_lycoris_reads_convolutions_that_we_write(wrapper, file, dtype):
    """A as a file brought it, trained on where a kernel has one position; B of any kernel trained."""
    conv_file(file, rank=2)
    ours = load_lycoris(convolutional(dtype), file)
    for name, layer in glora_layers(ours).items():
        layer.requires_grad_(False)
        for trained in ("Ad", "Au", "Bd", "Bu")[2 if "block" in name else 0 :]:
            getattr(layer, trained).requires_grad_()
    randomize(ours, seed=7)
    save_lycoris(ours, file)
    theirs = convolutional(dtype)
    network, _ = wrapper.create_lycoris_from_weights(1.0, str(file), theirs)
    assert len(network.loras) == 4
    network.apply_to()
    network.to(dtype)
    assert_equal_images(ours, theirs, dtype)
    exact = as_lycoris_computes(load_file(file))
    assert_equal_images(ours, lambda x: exact(x.double()), dtype)


@pytest.mark.parametrize("make", [convolutional, None], ids=["plain", "adapted"])
def test_round_trip_of_convolutions_keeps_paths_and_bits(file, make):
    """Of different ranks of A and B, and of A alone and B alone."""
    tensors = conv_file(file, rank=2)
    tensors["lycoris_block_strided.a1.weight"][:, 1] = tensors["lycoris_block_strided.a2.weight"][1] = 0
    for factor in ("a1", "a2"):
        tensors[f"lycoris_block_wide.{factor}.weight"].zero_()
    for factor in ("b1", "b2"):
        tensors[f"lycoris_point.{factor}.weight"].zero_()
    save_file(tensors, file)
    original = load_lycoris(convolutional(torch.float32), file)
    assert get_paths(original) == {
        "point": PathConfig("lora_2"),
        "block.strided": PathConfig("lora_9", "lora_2"),
        "block.wide": PathConfig(B="lora_2"),
        "out": PathConfig("lora_2", "lora_2"),
    }
    save_lycoris(original, file)
    copy = inject(convolutional(torch.float32), 20, product="matmul", convolutions=True) if make is None else make()
    model = load_lycoris(copy.float(), file)
    assert get_paths(model) == get_paths(original)
    assert torch.equal(model(images(torch.float32)), original(images(torch.float32)))
    written = load_file(file)
    save_lycoris(model, file)
    assert same_bits(load_file(file), written)


def test_an_adapter_file_holds_layers_of_different_ranks(file):
    conv_file(file, rank=2)
    original = load_lycoris(convolutional(), file)
    glora.save_adapter(original, file)
    assert_equal_images(glora.load_adapter(convolutional(), file), original)


def test_names_and_shapes_of_convolutions(file):
    conv_file(file, rank=2)
    save_lycoris(load_lycoris(convolutional(), file), file)
    assert {name: tuple(tensor.shape) for name, tensor in load_file(file).items() if "wide" in name} == {
        "lycoris_block_wide.a1.weight": (5, 2, 1, 1),
        "lycoris_block_wide.a2.weight": (2, 5, 1, 1),
        "lycoris_block_wide.b1.weight": (4, 2, 1, 1),
        "lycoris_block_wide.b2.weight": (2, 5, 3, 2),
        "lycoris_block_wide.alpha": (),
    }


def without_kernels(tensors):
    return {name: tensor for name, tensor in tensors.items() if "block" not in name}


def test_the_old_layout_has_convolutions_of_one_position(file):
    tensors = without_kernels(conv_file(file, rank=2, layout="old"))
    save_file(tensors, file)
    ours = load_lycoris(convolutional(), file)
    zeros = {name: torch.zeros_like(t) for name, t in conv_file(file, rank=2).items() if "block" in name}
    old = {f"{name[:-9]}{PARTNER[name[-9:]]}" if "weight" in name else name: t for name, t in zeros.items()}
    assert_equal_images(ours, as_lycoris_computes({**tensors, **old}, "old"))
    save_lycoris(ours, file, layout="old")
    assert load_file(file)["lycoris_point.b1.weight"].shape == (2, 3, 1, 1)
    assert_equal_images(load_lycoris(convolutional(), file), ours)

    save_file(conv_file(file, rank=2, layout="old"), file)
    assert_refused(convolutional(), file, r"'block.strided: weight \(5, 3, 3, 3\), a1.weight \(2, 3, 1, 1\)")
    model = inject(convolutional(), 2, targets=["strided"], product="matmul", convolutions=True)
    set_paths(model, {"block.strided": PathConfig(B="lora_2")})
    with pytest.raises(ValueError, match=r"'block.strided \(a kernel of 9 positions in the old layout\)'"):
        save_lycoris(model, file, layout="old")


PARTNER = {"a1.weight": "a2.weight", "a2.weight": "a1.weight", "b1.weight": "b2.weight", "b2.weight": "b1.weight"}


def test_a_of_a_kernel_that_was_trained_cannot_be_written(file):
    """What is the same at every position can, and so can a kernel of one; all that cannot are named."""
    conv_file(file, rank=2)
    model = load_lycoris(convolutional(), file)
    with torch.no_grad():
        model.block.strided.Ad[1, 0] += 1e-3
        model.block.wide.Au[3, 3] *= 2
    before = file.read_bytes()
    reason = "A=lora_{} that is not the same at each of the {} positions of the kernel"
    message = f"'block.strided ({reason.format(18, 9)})', 'block.wide ({reason.format(12, 6)})'"
    with unchanged(model), pytest.raises(ValueError, match=re.escape(f"got [{message}]")):
        save_lycoris(model, file)
    assert file.read_bytes() == before
    set_paths(model, {**get_paths(model), "block.strided": PathConfig(B="lora_2"), "block.wide": PathConfig()})
    save_lycoris(model, file)
    assert_equal_images(load_lycoris(convolutional(), file), model)


def grouped():
    with seeded():
        return nn.Sequential(OrderedDict(deep=nn.Conv2d(4, 4, 3, groups=4), fc=nn.Conv2d(4, 2, 1)))


def test_groups_are_refused_by_name(file):
    conv_file(file, model=grouped())
    assert_refused(grouped(), file, r"expected convolutions without groups, .* got \['deep'\]")
    model = inject(grouped(), 2, product="matmul", convolutions=True, heads=())
    set_paths(model, dict.fromkeys(("deep", "fc"), PathConfig(B="lora_2")))
    with pytest.raises(ValueError, match=r"got \['deep \(groups=4\)'\]"):
        save_lycoris(model, file)


def test_a_storage_too_small_for_every_position_is_refused(file):
    conv_file(file, rank=2)
    model = inject(convolutional(), 16, product="matmul", convolutions=True)
    assert_refused(model, file, r"differing \['block.strided: rank 16 matmul in the model, 18 matmul in the file'\]")


def test_other_layers_than_linear_ones_and_convolutions_are_refused(file):
    pytest.importorskip("transformers")
    from transformers.pytorch_utils import Conv1D

    model = inject(nn.Sequential(OrderedDict(c_attn=Conv1D(4, 3))), 2, product="matmul")
    with pytest.raises(ValueError, match=r"got \['c_attn \(GLoRAConv1D\)'\]"):
        save_lycoris(model, file)


# -- alpha -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rank", "alpha"), [(4, 1.0), (2, 8.0), (3, 1.0), (5, 0.7)])
def test_alpha_is_folded_with_one_rounding(file, rank, alpha):
    tensors = random_file(file, rank, alpha, dtype=torch.float32)
    layer = glora_layers(load_lycoris(plain(torch.float32), file))["square"]
    scale = float(torch.tensor(alpha)) / rank
    for storage, factor in ((layer.Ad, "a1"), (layer.Bd, "b1")):
        assert torch.equal(storage, (tensors[f"lycoris_square.{factor}.weight"].double() * scale).float())
    for storage, factor in ((layer.Au, "a2"), (layer.Bu, "b2")):
        assert torch.equal(storage, tensors[f"lycoris_square.{factor}.weight"])


@pytest.mark.parametrize("alpha", [0.0, float("nan"), float("inf"), [1.0, 1.0]], ids=str)
def test_refuses_an_alpha_without_one_meaning(file, alpha):
    tensors = random_file(file)
    tensors["lycoris_block_wide.alpha"] = torch.tensor(alpha)
    save_file(tensors, file)
    assert_refused(plain(), file, r"expected alpha of layer 'block.wide' to be one finite number but 0")


@pytest.mark.parametrize(("value", "alpha"), [(float("nan"), 2.0), (3e38, 4.0), (1e300, 1.0)])
def test_refuses_factors_that_are_not_finite_in_the_layer(file, value, alpha):
    tensors = random_file(file, alpha=alpha)
    tensors["lycoris_square.b1.weight"][0, 0] = value
    save_file(tensors, file)
    assert_refused(plain(torch.float32), file, r"expected finite factors, .* not so in \['square'\]")


def test_refuses_what_a_half_storage_cannot_hold(file):
    tensors = random_file(file)
    tensors["lycoris_square.a2.weight"][0, 0] = 1e5
    save_file(tensors, file)
    assert_refused(adapted().half(), file, r"not so in \['square'\]")
    assert load_lycoris(plain().half(), file).square.Au.dtype == torch.float32


# -- names -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["lycoris", "lora_unet", "lora_te", "lora_te1", "lora_te2"])
def test_finds_the_usual_prefixes(file, prefix):
    tensors = random_file(file, prefix=prefix)
    assert_equal_outputs(load_lycoris(plain(), file), as_others_read(plain(), tensors, prefix))


def test_takes_a_prefix_of_ones_own(file):
    tensors = random_file(file, prefix="mine")
    assert_refused(plain(), file, r"prefix: .* has \[\] of \['lycoris'")
    assert_equal_outputs(load_lycoris(plain(), file, prefix="mine"), as_others_read(plain(), tensors, "mine"))


def test_one_file_for_several_models(file):
    unet = random_file(file, prefix="lora_unet")
    encoder = random_file(file, prefix="lora_te", seed=1)
    save_file({**unet, **encoder}, file)
    assert_refused(plain(), file, r"prefix: .* has \['lora_unet', 'lora_te'\] of .*; give the one to load")
    assert_equal_outputs(load_lycoris(plain(), file, prefix="lora_te"), as_others_read(plain(), encoder, "lora_te"))
    with (
        unchanged(model := plain()),
        pytest.raises(ValueError, match=r"prefix: expected one that .* has, got 'lora_x'"),
    ):
        load_lycoris(model, file, prefix="lora_x")


@pytest.mark.parametrize("prefix", ["", "lora.unet", 3])
def test_refuses_an_empty_prefix(file, prefix):
    with pytest.raises(ValueError, match="prefix: expected a text"):
        save_lycoris(adapted(), file, prefix=prefix)
    with pytest.raises(ValueError, match="prefix: expected a text"):
        load_lycoris(plain(), file, prefix=prefix)


def alike():
    """Two layers of one name once dots are underscores, and a third."""
    with seeded():
        inner = nn.Sequential(OrderedDict(c=nn.Linear(6, 6)))
        outer = nn.Sequential(OrderedDict(b_c=nn.Linear(6, 6)))
        return nn.Sequential(OrderedDict(a_b=inner, a=outer, last=nn.Linear(6, 6)))


def test_refuses_names_that_fit_two_layers(file):
    tensors = random_file(file, model=alike())
    assert_refused(alike(), file, r"these layers share theirs: \[\['a_b.c', 'a.b_c'\]\]")
    save_file({name: tensor for name, tensor in tensors.items() if "last" in name}, file)
    assert list(glora_layers(load_lycoris(alike(), file))) == ["last"]


def test_refuses_to_write_one_name_twice(file):
    model = inject(alike(), 2, product="matmul")
    set_paths(model, dict.fromkeys(glora_layers(model), PathConfig("lora_2", "lora_2")))
    with pytest.raises(ValueError, match=r"model: expected names that differ .*, got \['a.b_c', 'a_b.c'\]"):
        save_lycoris(model, file)
    assert not file.exists()


# -- layouts that cannot be told apart ---------------------------------------------------------------


@pytest.mark.parametrize("layout", ["new", "old"])
def test_shapes_that_fit_both_layouts(file, layout):
    """Rank 6 in a layer of 6 x 6: as ComfyUI reads it if nothing is said, LyCORIS 3 means the other."""
    full = random_file(file, rank=6, alpha=None, layout=layout)
    assert_equal_outputs(load_lycoris(plain(), file), load_lycoris(plain(), file, layout=layout))

    save_file({name: tensor for name, tensor in full.items() if "square" in name}, file)
    assert_refused(plain(), file, r"layout: expected shapes that fit one of \['new', 'old'\], .* fit both; give one")
    a1, a2, b1, b2 = (full[f"lycoris_square.{factor}.weight"] for factor in FACTORS)
    weight, bias = plain().square.weight, plain().square.bias
    delta = weight @ a1 @ a2 + b1 @ b2 if layout == "new" else weight @ a2 @ a1 + b2 @ b1
    ours = load_lycoris(plain(), file, layout=layout).square(inputs())
    torch.testing.assert_close(ours, inputs() @ (weight + delta).T + bias, rtol=1e-12, atol=1e-12)


def test_refuses_mixed_layouts(file):
    new, old = random_file(file), random_file(file, layout="old")
    save_file({name: (old if "wide" in name else new)[name] for name in new}, file)
    assert_refused(plain(), file, r"layout: .* mix them: \{.*'block.wide': \['old'\]")


@pytest.mark.parametrize(("layout", "other"), [("new", "old"), ("old", "new")])
def test_refuses_the_other_layout_than_asked_for(file, layout, other):
    random_file(file, layout=layout)
    with unchanged(model := plain()), pytest.raises(ValueError, match=f"expected shapes of the {other} layout"):
        load_lycoris(model, file, layout=other)


def test_refuses_an_unknown_layout(file):
    with pytest.raises(ValueError, match=r"layout: expected one of \['new', 'old'\], got '3.0'"):
        save_lycoris(adapted(), file, layout="3.0")
    with pytest.raises(ValueError, match=r"layout: expected one of \['new', 'old'\], got '3.0'"):
        load_lycoris(plain(), file, layout="3.0")


# -- what may be written -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        (PathConfig(A="vector"), "A=vector"),
        (PathConfig(A="constant", B="lora_2"), "A=constant"),
        (PathConfig(B="vector"), "B=vector"),
        (PathConfig(C="lora_2"), "C=lora_2"),
        (PathConfig(D="vector", E="constant"), "D=vector, E=constant"),
    ],
)
def test_refuses_paths_that_lycoris_cannot_express(file, path, reason):
    model = adapted(paths=[PathConfig("lora_2", "lora_2"), path, PathConfig()])
    file.write_bytes(b"precious")
    with unchanged(model), pytest.raises(ValueError, match=rf"got \['block.wide \({reason}\)'\]"):
        save_lycoris(model, file)
    assert file.read_bytes() == b"precious"


def test_refuses_a_low_rank_of_the_hadamard_product(file):
    model = inject(plain(), 2)
    set_paths(model, dict.fromkeys(LAYERS, PathConfig("lora_2", "lora_2")))
    with pytest.raises(ValueError, match=r"'square \(A=lora_2 in the hadamard product\)'"):
        save_lycoris(model, file)


def test_without_a_low_rank_the_products_are_the_same(file):
    model = inject(plain(), 2)
    randomize(model)
    set_paths(model, dict.fromkeys(LAYERS, PathConfig(B="lora_2")))
    save_lycoris(model, file)
    assert_equal_outputs(load_lycoris(plain(), file), model)


def test_d_of_a_layer_without_bias_is_nothing(file):
    model = adapted(paths=[PathConfig(), PathConfig(), PathConfig("lora_2", "lora_1", D="vector")])
    save_lycoris(model, file)
    assert_equal_outputs(load_lycoris(plain(), file), model)


def with_head():
    return nn.Sequential(OrderedDict(fc=nn.Linear(6, 6), head=nn.Linear(6, 3)))


def test_refuses_to_lose_a_trained_head(file):
    model = inject(with_head(), 2, product="matmul")
    set_paths(model, {"fc": PathConfig("lora_2")})
    with pytest.raises(ValueError, match=r"got \['head.weight', 'head.bias'\], which the format cannot hold"):
        save_lycoris(model, file)
    save_lycoris(model, file, adapters_only=True)
    assert {name.partition(".")[0] for name in load_file(file)} == {"lycoris_fc"}


def test_refuses_a_name_by_which_lycoris_would_not_know_it(tmp_path):
    with pytest.raises(ValueError, match=r"file: expected a name in \.safetensors"):
        save_lycoris(adapted(), tmp_path / "adapter.pt")


def test_nothing_to_save(file):
    with pytest.raises(ValueError, match="at least one adapted layer, found none"):
        save_lycoris(plain(), file)


def test_a_failing_writer_leaves_the_old_file(file, monkeypatch):
    def fail(descriptor):
        raise OSError("disk full")

    save_lycoris(adapted(), file)
    before = file.read_bytes()
    monkeypatch.setattr(glora.files.os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        save_lycoris(adapted(1), file)
    assert file.read_bytes() == before and list(file.parent.iterdir()) == [file]


# -- loading into models -----------------------------------------------------------------------------


def test_only_the_layers_of_the_file_are_adapted_and_trained(file):
    tensors = random_file(file)
    save_file({name: tensor for name, tensor in tensors.items() if "wide" in name}, file)
    model = load_lycoris(plain(), file)
    assert list(glora_layers(model)) == ["block.wide"]
    support = {id(p) for p in model.block.wide.support_parameters()}
    assert {id(p) for p in model.parameters() if p.requires_grad} == support


def test_a_larger_storage_is_as_fresh_beyond_the_file(file):
    tensors = random_file(file, rank=2)
    model = inject(plain(), 5, product="matmul")
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.fill_(torch.nan)
    load_lycoris(model, file)
    assert all(p.isfinite().all() for p in model.parameters())
    assert not model.square.Ad[:, 2:].any() and model.square.Au[2:].all() and not model.square.E.any()
    assert_equal_outputs(model, as_others_read(plain(), tensors))
    set_paths(model, dict.fromkeys(LAYERS, PathConfig("lora_5", "lora_5", "lora_5", "vector", "vector")))
    assert_equal_outputs(model, as_others_read(plain(), tensors))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: inject(plain(), 1, product="matmul"), r"differing \['square: rank 1 matmul in the model, 2 matmul in"),
        (lambda: inject(plain(), 2), r"block.wide: rank 2 hadamard in the model, 2 matmul in the file"),
        (lambda: inject(plain(), 2, targets=["square"], product="matmul"), r"unknown \['block.narrow', 'block.wide'\]"),
    ],
    ids=["rank", "product", "fewer-layers"],
)
def test_refuses_other_adapted_layers(file, model, message):
    random_file(file)
    assert_refused(model(), file, message)


def test_refuses_a_file_without_some_adapted_layers(file):
    tensors = random_file(file)
    save_file({name: tensor for name, tensor in tensors.items() if "wide" not in name}, file)
    assert_refused(adapted(), file, r"missing \['block.wide'\], unknown \[\]")


def replaced(name, module):
    model = plain()
    setattr(model.block, name, module)
    return model


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            lambda: nn.Sequential(nn.Linear(6, 6)),
            r"no linear layer or nn.Conv2d is called \['lycoris_block_narrow', 'lycoris_block_wide'",
        ),
        (lambda: replaced("wide", nn.Conv1d(6, 9, 1)), r"called \['lycoris_block_wide \(a torch.nn.Conv1d\)'\]"),
        (lambda: replaced("wide", nn.Linear(6, 8)), r"got \['block.wide: weight \(8, 6\), a1.weight \(6, 2\), .*"),
        (lambda: replaced("wide", nn.Linear(7, 9)), r"got \['block.wide: weight \(9, 7\), .*, b2.weight \(2, 6\)'\]"),
        (lambda: nn.Linear(6, 6), r"no linear layer or nn.Conv2d is called"),
    ],
    ids=["other-names", "convolution", "other-outputs", "other-inputs", "bare"],
)
def test_refuses_a_file_of_another_model(file, model, message):
    random_file(file)
    assert_refused(model(), file, message)


def test_a_bare_linear_layer_cannot_be_replaced(file):
    tensors = random_file(file, model=nn.Linear(6, 6))
    assert "lycoris_.alpha" in tensors
    assert_refused(nn.Linear(6, 6), file, r"is called \['lycoris_ \(a torch.nn.Linear\)'\]")
    layer = glora.GLoRALinear(6, 6, rank=2, product="matmul")
    assert load_lycoris(layer, file).path == PathConfig("lora_2", "lora_2")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("lycoris_square.b2.weight"), r"missing \['lycoris_square.b2.weight'\], unknown \[\]"),
        (lambda t: t.update({"lycoris_square.bm.weight": torch.ones(2, 2)}), r"unknown \['lycoris_square.bm.weight'\]"),
        (
            lambda t: t.update({"lycoris_square.dora_scale": torch.ones(6, 1)}),
            r"unknown \['lycoris_square.dora_scale'\]",
        ),
        (lambda t: t.update({"lycoris_norm.w_norm": torch.ones(6)}), r"missing \['lycoris_norm.a1.weight', .*w_norm"),
        (lambda t: t.update({"norm": torch.ones(6)}), r"missing \['norm.a1.weight'"),
        (lambda t: t.update({"lycoris_square.a1.weight": torch.ones(6, 2, 1, 1)}), r"a1.weight \(6, 2, 1, 1\)"),
        (lambda t: t.update({"lycoris_square.a1.weight": torch.ones(())}), r"a1.weight \(\)"),
        (lambda t: t.update({"lycoris_square.b2.weight": torch.ones(3, 6)}), r"b2.weight \(3, 6\)"),
    ],
    ids=["missing", "tucker", "dora", "norm", "no-entry", "convolution", "scalar", "ranks"],
)
@pytest.mark.parametrize("make", [plain, adapted], ids=["plain", "adapted"])
def test_refuses_other_tensors(file, make, change, message):
    tensors = random_file(file)
    change(tensors)
    save_file(tensors, file)
    assert_refused(make(), file, message)


def test_refuses_rank_zero(file):
    random_file(file, rank=0, alpha=1.0)
    assert_refused(plain(), file, "expected shapes of a layout")


def test_refuses_what_cannot_be_replaced(file):
    class Scaled(nn.Linear):
        """Computes something else."""

    random_file(file)
    assert_refused(replaced("narrow", Scaled(9, 4)).double(), file, "expected exactly torch.nn.Linear", TypeError)


def test_refuses_what_a_transformer_encoder_layer_reads_directly(file):
    model = nn.Sequential(OrderedDict(layer=nn.TransformerEncoderLayer(8, 2, 16)))
    tensors = random_file(file, model=model)
    save_file({name: tensor for name, tensor in tensors.items() if "linear2" in name}, file)
    assert_refused(model, file, r"'layer.linear2' belongs to an nn.TransformerEncoderLayer", TypeError)


def test_refuses_a_model_on_meta(file):
    random_file(file)
    with pytest.raises(ValueError, match="model: expected real tensors, got parameters on meta"):
        load_lycoris(plain().to("meta"), file)


def test_refuses_a_missing_file(file):
    assert_refused(plain(), file, "expected a LyCORIS file, found none at", FileNotFoundError)


@pytest.mark.parametrize("share", [0, 0.02, 0.5, 0.99])
def test_refuses_a_truncated_file(file, share):
    random_file(file)
    content = file.read_bytes()
    file.write_bytes(content[: int(share * len(content))])
    assert_refused(plain(), file, "expected a safetensors file, it is damaged or something else")


def test_loading_after_a_refusal_works(file):
    model, good = adapted(2), random_file(file)
    save_file({**good, "lycoris_square.alpha": torch.tensor(0.0)}, file)
    assert_refused(model, file, "alpha")
    save_file(good, file)
    assert_equal_outputs(load_lycoris(model, file), as_others_read(plain(), good))


def assert_refused(model, file, message, error=ValueError):
    before = state(model)
    with unchanged(model), pytest.raises(error, match=message):
        load_lycoris(model, file)
    assert same_bits(state(model), before)
