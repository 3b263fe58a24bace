"""What we export PEFT loads, and computes the same; what PEFT cannot express is refused, and nothing is written."""

import itertools
import json
from collections import OrderedDict

import peft
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn

import glora
from glora import PathConfig
from glora.peft import export_peft, import_peft
from tests.glora.peft.peft_toys import KINDS, tokens
from tests.glora.toys import adapted_mlp, mlp, randomize, same_bits, unchanged

RANK = 3


def peft_path(kinds, rank):
    a, c, d = (f"lora_{rank}" if kind == "lora" else kind for kind in kinds)
    return PathConfig(a, a, c, d, d)


def on_path(path, *, rank=RANK, **options):
    """Everything trained is random, the head too, and tensors hold more than the path reads."""
    model = adapted_mlp(rank, **options)
    randomize(model)
    glora.set_paths(model, {"fc1": path, "fc2": path})
    return model


@pytest.mark.parametrize("rank", [RANK, 2], ids=["whole rank", "sliced rank"])
@pytest.mark.parametrize("kinds", KINDS, ids="-".join)
def test_peft_computes_the_same(tmp_path, kinds, rank):
    model = on_path(peft_path(kinds, rank))
    with unchanged(model):
        export_peft(model, tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(mlp(), tmp_path / "adapter")
    assert (loaded.peft_config["default"].r == rank) or "lora" not in kinds
    torch.testing.assert_close(loaded(tokens()), model(tokens()))
    assert not torch.allclose(loaded(tokens()), mlp()(tokens()), atol=1e-3)


@pytest.mark.parametrize("kinds", KINDS, ids="-".join)
def test_there_and_back(tmp_path, kinds):
    model = on_path(peft_path(kinds, RANK))
    export_peft(model, tmp_path / "adapter")
    again = import_peft(mlp(), tmp_path / "adapter")
    assert glora.get_paths(again) == glora.get_paths(model)
    assert torch.equal(again(tokens()), model(tokens()))
    assert [n for n, p in again.named_parameters() if p.requires_grad] == [
        n for n, p in model.named_parameters() if p.requires_grad
    ]


@pytest.mark.parametrize("kind", ["lora", "vector", "constant", "none"])
def test_layers_without_bias(tmp_path, kind):
    """D has nothing to scale there, so that it may be anything."""
    a = peft_path((kind, "none", "none"), RANK).A
    model = on_path(PathConfig(a, a, "none", "vector", "none"), bias=False)
    export_peft(model, tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(mlp(bias=False), tmp_path / "adapter")
    torch.testing.assert_close(loaded(tokens()), model(tokens()))
    assert torch.equal(import_peft(mlp(bias=False), tmp_path / "adapter")(tokens()), model(tokens()))


def mixed_biases():
    return nn.Sequential(OrderedDict(plain=nn.Linear(6, 5, bias=False), biased=nn.Linear(5, 4)))


def test_layers_with_and_without_bias(tmp_path):
    torch.manual_seed(0)
    base = mixed_biases()
    model = glora.inject(mixed_biases(), RANK)
    model.load_state_dict(base.state_dict(), strict=False)
    randomize(model)
    a = f"lora_{RANK}"
    glora.set_paths(model, {"plain": PathConfig(a, a), "biased": PathConfig(a, a, a, "vector", "vector")})
    export_peft(model, tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert loaded.peft_config["default"].config_C == "lora"
    torch.testing.assert_close(loaded(tokens()), model(tokens()))


def test_files_are_those_that_peft_would_write(tmp_path):
    model = on_path(peft_path(("lora", "vector", "constant"), RANK))
    export_peft(model, tmp_path / "ours")
    loaded = peft.PeftModel.from_pretrained(mlp(), tmp_path / "ours")
    loaded.save_pretrained(tmp_path / "theirs")
    ours, theirs = (load_file(tmp_path / who / "adapter_model.safetensors") for who in ("ours", "theirs"))
    assert list(ours) == list(theirs)
    assert same_bits(ours, theirs)
    ours, theirs = (json.loads((tmp_path / who / "adapter_config.json").read_text()) for who in ("ours", "theirs"))
    assert set(ours) <= set(theirs)
    assert ours == {**{name: theirs[name] for name in ours}, "target_modules": ["fc1", "fc2"]}
    assert sorted(theirs["target_modules"]) == ["fc1", "fc2"]


def test_a_frozen_head_is_not_written(tmp_path):
    model = on_path(peft_path(("lora", "none", "none"), RANK))
    model.head.requires_grad_(False)
    export_peft(model, tmp_path / "adapter")
    assert not any("head" in name for name in load_file(tmp_path / "adapter" / "adapter_model.safetensors"))


class Head(nn.Module):
    """Trained tensors of its own and of a child, and a buffer."""

    def __init__(self):
        super().__init__()
        self.scale, self.fc = nn.Parameter(torch.ones(5)), nn.Linear(5, 3)
        self.register_buffer("shift", torch.zeros(3))

    def forward(self, x):
        return self.fc(x * self.scale) + self.shift


def test_a_trained_module_is_written_whole(tmp_path):
    def make():
        torch.manual_seed(0)
        model = mlp()
        model.head = Head()
        return model

    model = glora.inject(make(), RANK)
    randomize(model)
    model.head.shift.fill_(2.0)
    glora.set_paths(model, dict.fromkeys(("fc1", "fc2"), peft_path(KINDS[0], RANK)))
    export_peft(model, tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(make(), tmp_path / "adapter")
    assert loaded.peft_config["default"].modules_to_save == ["head"]
    torch.testing.assert_close(loaded(tokens()), model(tokens()))
    assert torch.equal(import_peft(make(), tmp_path / "adapter")(tokens()), model(tokens()))


def normed(*names):
    """Linear layers with a batch norm of each of these names behind them."""
    torch.manual_seed(0)
    layers = OrderedDict(fc1=nn.Linear(6, 5))
    for name in names:
        layers[name] = nn.BatchNorm1d(5)
    return nn.Sequential(OrderedDict(**layers, fc2=nn.Linear(5, 5), head=nn.Linear(5, 3)))


def gathered(*names):
    """Statistics that differ from those of :func:`normed`, as after training."""
    model = glora.inject(normed(*names), RANK)
    randomize(model)
    glora.set_paths(model, dict.fromkeys(("fc1", "fc2"), SAME))
    model(tokens() * 3 + 1)
    return model.eval()


def test_norm_layers_with_statistics_are_saved_whole(tmp_path):
    model = gathered("norm", "other")
    export_peft(model, tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(normed("norm", "other"), tmp_path / "adapter").eval()
    assert loaded.peft_config["default"].modules_to_save == ["head", "norm", "other"]
    torch.testing.assert_close(loaded(tokens()), model(tokens()))
    again = import_peft(normed("norm", "other").eval(), tmp_path / "adapter")
    assert torch.equal(again(tokens()), model(tokens()))


def test_norm_layers_whose_names_end_alike_are_saved_together(tmp_path):
    """PEFT takes every module for one to be saved whose name ends in a saved one's."""
    names = ("norm", "prenorm")
    model = gathered(*names)
    export_peft(model, tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(normed(*names), tmp_path / "adapter").eval()
    torch.testing.assert_close(loaded(tokens()), model(tokens()))


def test_norm_layers_that_peft_cannot_save_are_named(tmp_path):
    """The name of fc1 ends in theirs: PEFT would take it for one of them."""
    model = gathered("norm", "c1", "1")
    with pytest.warns(UserWarning, match=r"cannot hold the statistics of norm layers .* as in 'c1', '1':"):
        export_peft(model, tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["modules_to_save"] == ["head", "norm"]


def test_a_name_that_ends_another(tmp_path):
    """PEFT compares ends of names: a list of fc1 would take block.fc1 in, which is not adapted."""
    torch.manual_seed(0)

    def make():
        return nn.Sequential(
            OrderedDict(block=nn.Sequential(OrderedDict(fc1=nn.Linear(6, 6))), fc1=nn.Linear(6, 6), fc2=nn.Linear(6, 4))
        )

    base = make()
    model = make()
    model.load_state_dict(base.state_dict())
    glora.inject(model, RANK, exclude=("block",))
    model.block.requires_grad_(False)
    randomize(model)
    glora.set_paths(model, dict.fromkeys(("fc1", "fc2"), peft_path(KINDS[0], RANK)))
    export_peft(model, tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert type(loaded.get_base_model().block.fc1) is nn.Linear
    torch.testing.assert_close(loaded(tokens()), model(tokens()))


def test_an_earlier_export_is_replaced(tmp_path):
    for kinds in (("lora", "none", "none"), ("vector", "vector", "vector")):
        model = on_path(peft_path(kinds, RANK))
        export_peft(model, tmp_path / "adapter")
        assert torch.equal(import_peft(mlp(), tmp_path / "adapter")(tokens()), model(tokens()))
    assert list(tmp_path.iterdir()) == [tmp_path / "adapter"]


# -- refused -----------------------------------------------------------------------------------------


def assert_refused(model, folder, message):
    with unchanged(model), pytest.raises(ValueError, match=message):
        export_peft(model, folder)
    assert not folder.exists()


SAME = PathConfig("lora_3", "lora_3", "lora_3", "vector", "vector")


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        (PathConfig("lora_3", "vector"), "A is lora_3, B is vector"),
        (PathConfig("lora_3", "lora_2"), "A is lora_3, B is lora_2"),
        (PathConfig(D="vector"), "D is vector, E is none"),
        (PathConfig("lora_3", "lora_3", "lora_2"), r"ranks \[2, 3\]"),
    ],
)
def test_paths_that_peft_has_not(tmp_path, path, reason):
    model = on_path(SAME)
    glora.set_paths(model, {"fc1": SAME, "fc2": path})
    message = f"model: expected paths that PEFT's GLoRA can express, not so in 1 layers: fc2: {reason}$"
    assert_refused(model, tmp_path / "adapter", message)
    glora.set_paths(model, {"fc1": path, "fc2": path})
    assert_refused(model, tmp_path / "adapter", f"in 2 layers: fc1: {reason}; fc2: {reason}$")


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        (PathConfig("vector", "vector", "lora_3", "vector", "vector"), "A is vector, that of fc1 is lora_3"),
        (PathConfig("lora_2", "lora_2", "lora_2", "vector", "vector"), "A is lora_2, that of fc1 is lora_3"),
        (PathConfig("lora_3", "lora_3", "vector", "vector", "vector"), "C is vector, that of fc1 is lora_3"),
        (PathConfig("lora_3", "lora_3", "lora_3"), "D is none, that of fc1 is vector"),
    ],
)
def test_paths_that_differ(tmp_path, path, reason):
    model = on_path(SAME)
    glora.set_paths(model, {"fc1": SAME, "fc2": path})
    assert_refused(model, tmp_path / "adapter", f"in 1 layers: fc2: {reason}$")


@pytest.mark.parametrize("path", [PathConfig(C="vector"), PathConfig(E="vector")], ids=["C", "E"])
def test_what_peft_drops_without_bias(tmp_path, path):
    assert_refused(
        on_path(path, bias=False), tmp_path / "adapter", "fc1: no bias, and C is .*; fc2: no bias, and C is "
    )


def test_matmul_product(tmp_path):
    model = on_path(SAME, product="matmul")
    assert_refused(model, tmp_path / "adapter", "in 2 layers: fc1: the matmul product; fc2: the matmul product$")
    glora.set_paths(model, dict.fromkeys(("fc1", "fc2"), PathConfig(C="vector")))
    export_peft(model, tmp_path / "adapter")  # without A there is no product
    loaded = peft.PeftModel.from_pretrained(mlp(), tmp_path / "adapter")
    torch.testing.assert_close(loaded(tokens()), model(tokens()))


def test_exactly_these_of_all_paths_of_a_layer_are_expressed(tmp_path):
    """36 of the 432: as many as PEFT has."""
    model, written = on_path(SAME), 0
    weight, prompt, bias = (
        ("lora_3", "vector", "constant", "none"),
        ("lora_3", "vector", "none"),
        ("vector", "constant", "none"),
    )
    for kinds in itertools.product(weight, weight, prompt, bias, bias):
        path = PathConfig(*kinds)
        glora.set_paths(model, {"fc1": path, "fc2": path})
        try:
            export_peft(model, tmp_path / "adapter")
        except ValueError:
            assert path.A != path.B or path.D != path.E
        else:
            written += 1
    assert written == len(KINDS) == 36


def test_wrong_models(tmp_path):
    with pytest.raises(ValueError, match="model: expected at least one adapted layer, found none"):
        export_peft(mlp(), tmp_path / "adapter")
    with pytest.raises(ValueError, match="model: expected a model that contains GLoRALinear layers, got a single one"):
        export_peft(glora.GLoRALinear(4, 3), tmp_path / "adapter")
    assert not list(tmp_path.iterdir())


@pytest.fixture
def one_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_sharded_models(tmp_path, one_process):
    from torch.distributed.fsdp import fully_shard

    export_peft(on_path(SAME), tmp_path / "adapter")
    model = on_path(SAME)
    fully_shard(model, mesh=dist.init_device_mesh("cpu", (1,)))
    for exchange in (export_peft, import_peft):
        with pytest.raises(ValueError, match="model: expected whole parameters, got those of fully_shard"):
            exchange(model, tmp_path / "adapter")


def with_parameter(model):
    model.register_parameter("scale", nn.Parameter(torch.ones(3)))
    return model


def with_overhead(model):
    model.add_module("overhead", nn.Linear(3, 3).requires_grad_(False))
    return model


def with_tied_heads(model):
    model.add_module("tail", nn.Linear(5, 3))
    model.tail.weight = model.head.weight
    return model


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (with_parameter, r"cannot save the trained module '': it holds the adapted \['fc1', 'fc2'\]; freeze it"),
        (with_overhead, r"the trained module 'head': PEFT would take \['base_model.model.overhead'\] for it"),
        (with_tied_heads, r"PEFT would part the shared \['head.weight', 'tail.weight'\]"),
    ],
)
def test_trained_tensors_that_peft_cannot_save(tmp_path, change, message):
    assert_refused(change(on_path(SAME)), tmp_path / "adapter", message)


def test_a_folder_of_others_is_left_alone(tmp_path):
    model = on_path(SAME)
    loaded = peft.get_peft_model(mlp(), peft.GloraConfig(target_modules=["fc1"]))
    loaded.save_pretrained(tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=r"folder: expected a new folder, or one with nothing but .*README\.md"):
        export_peft(model, tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
