"""Putting GLoRA into models: what is replaced, what is frozen, and what is refused."""

from collections import OrderedDict

import pytest
import torch
from torch import nn

from glora import GLoRALinear, LayerShape, glora_layers, inject
from tests.glora.toys import IN_FEATURES, generator, mlp, same_bits, state, tiny_vit, unchanged

SUPPORT = {"Ad", "Au", "Bd", "Bu", "Cd", "Cu", "D", "E"}


def linear():
    return nn.Linear(4, 4)


def named(**modules):
    return nn.Sequential(OrderedDict(modules))


def trainable(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


# -- what it does ----------------------------------------------------------------------------------


@pytest.mark.parametrize("product", ["hadamard", "matmul"])
def test_outputs_stay_the_same_bits(product):
    model, x = mlp(), torch.randn(7, IN_FEATURES, generator=generator())
    expected = model(x)
    assert inject(model, 4, product=product) is model
    assert torch.equal(model(x), expected)
    assert {layer.product for layer in glora_layers(model).values()} == {product}


def test_outputs_of_a_vit_stay_the_same_bits():
    model, x = tiny_vit(), torch.randn(3, 1, 8, 8, generator=generator())
    expected = model(x)
    inject(model, 4)
    assert torch.equal(model(x), expected)


def test_adapts_every_linear_of_a_vit_but_the_head():
    layers = glora_layers(inject(tiny_vit(), 4))
    parts = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    assert list(layers) == [f"blocks.{block}.{part}" for block in range(2) for part in parts]
    assert layers["blocks.0.attn.qkv"].shape == LayerShape(48, 16)


def test_only_support_tensors_and_the_head_stay_trainable():
    model = inject(tiny_vit(), 4)
    support = {f"{name}.{p}" for name in glora_layers(model) for p in SUPPORT}
    assert trainable(model) == support | {"head.weight", "head.bias"}


def test_a_frozen_head_stays_frozen_and_that_is_said():
    model = mlp()
    model.head.requires_grad_(False)
    with pytest.warns(UserWarning, match=r"heads \['head'\] were frozen.* heads=\['head'\] trains them"):
        inject(model, 4)
    assert not trainable(model) & {"head.weight", "head.bias"}


def test_a_head_that_is_named_trains():
    model = mlp()
    model.requires_grad_(False)
    assert trainable(inject(model, 4, heads=["head"])) >= {"head.weight", "head.bias"}


def test_without_heads_all_is_adapted():
    assert list(glora_layers(inject(mlp(), 4, heads=()))) == ["fc1", "fc2", "head"]


def test_the_base_keeps_its_bits_and_names():
    model = mlp()
    before = state(model)
    after = state(inject(model, 4))
    assert same_bits({name: after[name] for name in before}, before)


def test_a_model_without_a_head_is_fine():
    assert list(glora_layers(inject(named(fc1=linear()), 2))) == ["fc1"]


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_works_on_any_device(device):
    model = inject(mlp().to(device), 4)
    assert {p.device.type for p in model.parameters()} == {device}


def test_keeps_eval_mode():
    assert not any(module.training for module in inject(mlp().eval(), 4).modules())


# -- names select by whole components --------------------------------------------------------------


def deep():
    return named(blocks=nn.Sequential(*(linear() for _ in range(11))), head=named(fc=linear()), overhead=linear())


@pytest.mark.parametrize(
    ("targets", "adapted"),
    [
        (["blocks.1"], ["blocks.1"]),
        (["blocks.1", "blocks.10"], ["blocks.1", "blocks.10"]),
        (["1"], ["blocks.1"]),
        (["overhead"], ["overhead"]),
        ([f"blocks.{i}" for i in range(11)], [f"blocks.{i}" for i in range(11)]),
        (("blocks",), [f"blocks.{i}" for i in range(11)]),
        ((name for name in ["blocks.3", "overhead"]), ["blocks.3", "overhead"]),
    ],
    ids=["block-1", "blocks-1-and-10", "last-component", "no-part-of-a-component", "all", "container", "iterator"],
)
def test_targets(targets, adapted):
    assert list(glora_layers(inject(deep(), 2, targets=targets))) == adapted


@pytest.mark.parametrize(
    ("exclude", "left"),
    [
        ((), ("head.fc",)),
        (("head",), ("head.fc",)),
        (("fc",), ("head.fc",)),
        (("blocks.1", "head"), ("blocks.1", "head.fc")),
        (("overhead",), ("overhead", "head.fc")),
    ],
    ids=str,
)
def test_exclude(exclude, left):
    every = {name for name, module in deep().named_modules() if isinstance(module, nn.Linear)}
    model = inject(deep(), 2, exclude=exclude)
    assert set(glora_layers(model)) == every - set(left)
    assert {f"{name}.{p}" for name in left for p in ("weight", "bias")} <= trainable(model)


def test_exclude_wins_over_targets():
    assert list(glora_layers(inject(deep(), 2, targets=["blocks"], exclude=("blocks.4", "head")))) == [
        f"blocks.{i}" for i in range(11) if i != 4
    ]


# -- modules with several names, and modules that are no plain linear ---------------------------------


def test_a_shared_layer_becomes_one_layer_in_both_places():
    shared = linear()
    model = inject(named(one=shared, other=shared), 2)
    assert isinstance(model.one, GLoRALinear)
    assert model.one is model.other
    assert list(glora_layers(model)) == ["one"]


def test_any_name_of_a_shared_layer_selects_it():
    shared = linear()
    model = inject(named(one=shared, other=shared, third=linear()), 2, targets=["other"])
    assert model.one is model.other
    assert list(glora_layers(model)) == ["one"]


def test_any_name_of_a_shared_layer_excludes_it():
    shared = linear()
    model = inject(named(one=shared, other=shared, third=linear()), 2, exclude=["other"])
    assert model.one is model.other is shared
    assert trainable(model) >= {"one.weight", "one.bias"}


def test_a_weight_tied_to_the_head_stays_in_place():
    model = named(fc1=linear(), head=linear())
    model.head.weight = model.fc1.weight
    model.head.weight.requires_grad_(False)
    inject(model, 2)
    assert model.fc1.weight is model.head.weight


def test_attention_is_left_alone_where_it_does_not_call_its_linear():
    model = named(attention=nn.MultiheadAttention(4, 2), fc=linear())
    out_proj = model.attention.out_proj
    with pytest.warns(UserWarning, match=r"1 modules .* cannot be adapted .* 1 MultiheadAttention \('attention'\)"):
        inject(model, 2, heads=())
    assert list(glora_layers(model)) == ["fc"]
    assert model.attention.out_proj is out_proj


# -- errors: named, and before anything is changed ---------------------------------------------------


class OwnLinear(nn.Linear):
    pass


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, r"^rank: expected an integer from 1, got 0"),
        ({"rank": 2.5}, r"^rank: expected an integer from 1, got 2.5"),
        ({"product": "kronecker"}, r"^product: expected one of"),
        ({"targets": ["fc1", "fc1"]}, r"^targets: expected each name once, got \['fc1'\] more than once"),
        ({"targets": ["fc1", "fc3"]}, r"^targets: \['fc3'\] match no module; components .*'fc1', 'fc2'"),
        ({"targets": "fc1"}, r"^targets: expected a list of names, got the string 'fc1'"),
        ({"targets": [""]}, r"^targets: expected non-empty names, got ''"),
        ({"targets": [1]}, r"^targets: expected non-empty names, got 1"),
        ({"targets": ["act"]}, r"^targets: 'act' selects no nn.Linear, .* but 1 \w+ \('act'\)"),
        ({"targets": []}, r"^model: expected at least one nn.Linear to adapt among targets \[\], found none"),
        ({"targets": ["head"], "heads": ["head"]}, r"^targets: 'head' selects nothing but heads, which train in full"),
        ({"targets": ["fc1"], "exclude": ["fc1"]}, r"^targets: 'fc1' selects nothing but what exclude= leaves alone"),
        ({"heads": ["classifier"]}, r"^heads: \['classifier'\] match no module"),
        ({"heads": "head"}, r"^heads: expected a list of names, got the string 'head'"),
        ({"exclude": "head"}, r"^exclude: expected a list of names, got the string 'head'"),
        ({"exclude": ("classifier",)}, r"^exclude: \['classifier'\] match no module"),
        ({"exclude": ("head", "head")}, r"^exclude: expected each name once"),
        ({"exclude": ("fc1", "fc2", "head")}, r"^model: expected at least one nn.Linear to adapt, found none"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_refuses_bad_arguments(options, message):
    model = mlp()
    model.fc1.bias.requires_grad_(False)
    with unchanged(model), pytest.raises(ValueError, match=message):
        inject(model, **options)


def test_refuses_a_subclass_as_target():
    model = named(fc1=linear(), own=OwnLinear(4, 4))
    with unchanged(model), pytest.raises(TypeError, match=r"torch.nn.Linear at 'own', got its subclass .*OwnLinear"):
        inject(model, 2, targets=["fc1", "own"])


def test_passes_over_a_subclass_that_is_no_target_and_says_so():
    model = named(fc1=linear(), own=OwnLinear(4, 4))
    with pytest.warns(UserWarning, match=r"1 modules .* cannot be adapted and stay frozen: 1 OwnLinear \('own'\)"):
        inject(model, 2)
    assert type(model.own) is OwnLinear


def test_refuses_a_model_without_linear_layers():
    model = named(conv=nn.Conv2d(1, 1, 1), norm=nn.LayerNorm(2))
    with unchanged(model), pytest.raises(ValueError, match=r"at least one nn.Linear to adapt, found none"):
        inject(model)


def test_refuses_a_second_injection():
    model = inject(mlp(), 2)
    with unchanged(model), pytest.raises(ValueError, match="holds adapted layers already"):
        inject(model, 2, targets=["head"])


def test_refuses_a_bare_linear():
    model = linear()
    with unchanged(model), pytest.raises(ValueError, match=r"use GLoRALinear.from_linear for one layer"):
        inject(model)


def test_refuses_what_a_transformer_encoder_layer_reads_directly():
    """In eval mode its fast path takes linear1.weight, past the adapter."""
    model = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16), nn.Linear(8, 3))
    with unchanged(model), pytest.raises(TypeError, match=r"'0.linear1' belongs to an nn.TransformerEncoderLayer"):
        inject(model, 2)
    assert list(glora_layers(inject(model, 2, exclude=("0",)))) == ["1"]


@pytest.mark.parametrize(
    "change",
    [
        lambda linear: linear.register_forward_hook(lambda *_: None),
        lambda linear: nn.utils.prune.l1_unstructured(linear, "weight", 0.5),
        lambda linear: setattr(linear, "forward", lambda x: x),
    ],
    ids=["hook", "pruned", "patched"],
)
def test_refuses_a_linear_that_would_lose_something(change):
    import torch.nn.utils.prune  # noqa: F401

    model = nn.Sequential(nn.Linear(8, 3))
    change(model[0])
    with pytest.raises(TypeError, match="linear: expected one without hooks, pruning or weight norm"):
        inject(model, 2)
    assert type(model[0]) is nn.Linear


def test_a_target_that_selects_convolutions_alone_says_how_to_adapt_them():
    model = nn.ModuleDict({"patch": nn.Conv2d(3, 4, 2), "qkv": nn.Linear(4, 4)})
    with unchanged(model), pytest.raises(ValueError, match=r"targets: 'patch' selects convolutions.*convolutions=True"):
        inject(model, 2, targets=("patch", "qkv"))
    assert set(glora_layers(inject(model, 2, targets=("patch", "qkv"), convolutions=True))) == {"patch", "qkv"}
