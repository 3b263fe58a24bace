"""An accelerated model is PEFT's in every respect but its cost."""

import copy
import pickle

import peft
import pytest
import torch
from peft.tuners.glora.layer import GloraLinear
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from bench.counting import flops, saved_bytes
from glora.peft import accelerate
from tests.glora.peft.peft_toys import KINDS, TARGETS, adapted, glora_config, hira_config, randomize_adapters, tokens
from tests.glora.toys import mlp, same_bits, state

CONFIGS = {"glora": glora_config, "hira": hira_config}
NAMES = tuple(f"base_model.model.{name}" for name in TARGETS)
pytestmark = pytest.mark.filterwarnings("ignore:Adapter .* was active which is now deleted")


@pytest.fixture(params=CONFIGS)
def model(request):
    return adapted(CONFIGS[request.param]())


def two_adapters(config=glora_config):
    model = adapted(config())
    model.add_adapter("other", config(r=3))
    randomize_adapters(model)
    return model


def gradients(model, x):
    model.zero_grad(set_to_none=True)
    model(x).square().sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def step_flops(model, x):
    return flops(lambda: model(x).sum().backward())


# -- what it is for --------------------------------------------------------------------------------


def test_three_dense_products_instead_of_five_and_no_dense_tensor_kept():
    model = adapted(glora_config(target_modules=["0"]), nn.Sequential(nn.Linear(512, 256)))
    x = torch.randn(64, 512, requires_grad=True)
    unit = 2 * 64 * 512 * 256
    assert step_flops(model, x) / unit > 5
    weight_bytes = 512 * 256 * 4
    assert saved_bytes(lambda: model(x), (x,), "cpu") > weight_bytes
    accelerate(model)
    assert 3 < step_flops(model, x) / unit < 3.3
    assert saved_bytes(lambda: model(x), (x,), "cpu") <= x.nbytes


def test_hira_needs_three_dense_products():
    model = adapted(hira_config(target_modules=["0"]), nn.Sequential(nn.Linear(512, 256)))
    x = torch.randn(64, 512, requires_grad=True)
    before = step_flops(model, x)
    accelerate(model)
    assert step_flops(model, x) < 0.65 * before


# -- accelerating and undoing ------------------------------------------------------------------------


def test_outputs_and_gradients_stay(model):
    x = tokens()
    want, wanted = model(x), gradients(model, x)
    assert accelerate(model).served == NAMES
    torch.testing.assert_close(model(x), want)
    torch.testing.assert_close(gradients(model, x), wanted)


def test_only_classes_change_and_undo_restores_them(model):
    x = tokens()
    want, bits, parameters = model(x), state(model), list(model.named_parameters())
    classes, modes = [type(m) for m in model.modules()], [m.training for m in model.modules()]
    acceleration = accelerate(model)
    assert same_bits(state(model), bits)
    assert all(one[1] is other[1] for one, other in zip(model.named_parameters(), parameters, strict=True))
    assert [m.training for m in model.modules()] == modes
    acceleration.undo()
    acceleration.undo()
    assert [type(m) for m in model.modules()] == classes
    assert torch.equal(model(x), want)
    assert acceleration.served == ()
    assert acceleration.kept == dict.fromkeys(NAMES, "it is not accelerated")


def test_with_block(model):
    classes = [type(m) for m in model.modules()]
    with pytest.raises(KeyError), accelerate(model) as acceleration:
        assert acceleration.served == NAMES
        raise KeyError
    assert [type(m) for m in model.modules()] == classes


def test_with_block_within_an_accelerated_model(model):
    outer = accelerate(model)
    with accelerate(model) as inner:
        assert inner.served == NAMES
    assert outer.served == NAMES


def test_undo_in_a_copy(model):
    x, want = tokens(), model(tokens())
    original = accelerate(model)
    twin = copy.deepcopy(model)
    accelerate(twin).undo()
    assert torch.equal(twin(x), want)
    assert original.served == NAMES


@pytest.mark.parametrize("again", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_are_accelerated(model, again):
    accelerate(model)
    twin, x = again(model), tokens()
    assert accelerate(twin).served == NAMES
    assert torch.equal(twin(x), model(x))
    assert same_bits(state(twin), state(model))
    assert not {id(p) for p in twin.parameters()} & {id(p) for p in model.parameters()}


def test_wrong_models():
    with pytest.raises(TypeError, match=r"peft_model: expected a torch\.nn\.Module, got str"):
        accelerate("model")
    with pytest.raises(ValueError, match="peft_model: expected at least one GLoRA or HiRA layer of PEFT, found none"):
        accelerate(peft.get_peft_model(mlp(), peft.LoraConfig(target_modules=["fc1"])))


def test_printing_shows_what_a_layer_is(model):
    accelerate(model)
    assert "glora.AcceleratedGlora(" in repr(model) or "hira.AcceleratedHira(" in repr(model)


# -- PEFT's features ---------------------------------------------------------------------------------


def test_saving_writes_the_same_files(model, tmp_path):
    model.save_pretrained(tmp_path / "before")
    accelerate(model)
    model.save_pretrained(tmp_path / "after")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "before" / name).read_bytes() == (tmp_path / "after" / name).read_bytes()
    loaded = peft.PeftModel.from_pretrained(mlp(), tmp_path / "after")
    accelerate(loaded)
    assert torch.equal(loaded(tokens()), model(tokens()))


def test_loading_into_an_accelerated_model(model, tmp_path):
    model.save_pretrained(tmp_path)
    want = model(tokens())
    accelerate(model)
    randomize_adapters(model, seed=5)
    assert not torch.allclose(model(tokens()), want, atol=1e-2)
    model.load_adapter(tmp_path, "default")
    torch.testing.assert_close(model(tokens()), want)


def test_switching_adapters():
    model, x = two_adapters(), tokens()
    wanted = {}
    for name in ("default", "other"):
        model.set_adapter(name)
        wanted[name] = model(x)
    acceleration = accelerate(model)
    for name, want in wanted.items():
        model.set_adapter(name)
        assert acceleration.served == NAMES
        torch.testing.assert_close(model(x), want)
    assert not torch.allclose(wanted["default"], wanted["other"], atol=1e-2)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_several_active_adapters_are_left_to_peft(config):
    model, x = two_adapters(config), tokens()
    model.base_model.set_adapter(["default", "other"])
    want = model(x)
    acceleration = accelerate(model)
    assert acceleration.kept == dict.fromkeys(NAMES, "2 of its adapters are active, not one")
    assert torch.equal(model(x), want)


def test_mixed_batches_are_left_to_peft():
    model, x = two_adapters().eval(), tokens(4)
    names = ["default", "other", "__base__", "default"]
    want = model(x, adapter_names=names)
    with model.disable_adapter():
        assert torch.equal(want[2], model(x)[2])
    accelerate(model)
    assert torch.equal(model(x, adapter_names=names), want)


def test_disabled_adapters(model):
    x, base = tokens(), mlp()(tokens())
    acceleration = accelerate(model)
    adapted_output = model(x)
    with model.disable_adapter():
        assert acceleration.kept == dict.fromkeys(NAMES, "its adapters are disabled")
        assert torch.equal(model(x), base)
    assert torch.equal(model(x), adapted_output)


def test_merging_and_unmerging(model):
    x = tokens()
    acceleration = accelerate(model)
    want = model(x)
    model.merge_adapter()
    assert acceleration.kept == dict.fromkeys(NAMES, "its adapters are merged")
    torch.testing.assert_close(model(x), want)
    model.unmerge_adapter()
    torch.testing.assert_close(model(x), want)
    assert acceleration.served == NAMES


def test_merge_and_unload(model):
    x = tokens()
    acceleration = accelerate(model)
    want = model(x)
    merged = model.merge_and_unload()
    assert [type(m) for m in merged.modules()] == [type(m) for m in mlp().modules()]
    torch.testing.assert_close(merged(x), want)
    acceleration.undo()


def test_deleting_an_adapter():
    model, x = two_adapters(), tokens()
    model.set_adapter("other")
    want = model(x)
    model.set_adapter("default")
    acceleration = accelerate(model)
    model.delete_adapter("default")
    assert acceleration.served == NAMES
    torch.testing.assert_close(model(x), want)


def test_an_adapter_added_later():
    """PEFT reuses the layers it has, and makes new ones, which it keeps until accelerated again."""
    model, x = adapted(glora_config(target_modules=["fc1"])), tokens()
    accelerate(model)
    model.add_adapter("both", glora_config())
    randomize_adapters(model)
    model.set_adapter("both")
    want = copy.deepcopy(model)
    accelerate(want).undo()
    acceleration = accelerate(model)
    assert acceleration.served == NAMES
    torch.testing.assert_close(model(x), want(x))


def test_an_adapter_that_lacks_a_layer():
    model, x = adapted(glora_config()), tokens()
    model.add_adapter("first", glora_config(target_modules=["fc1"]))
    randomize_adapters(model)
    model.set_adapter("first")
    want = model(x)
    acceleration = accelerate(model)
    assert acceleration.served == NAMES[:1]
    assert acceleration.kept == {NAMES[1]: "0 of its adapters are active, not one"}
    torch.testing.assert_close(model(x), want)


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_gradient_checkpointing(model, reentrant):
    x = tokens().requires_grad_()
    accelerate(model)
    want = gradients(model, x)
    model.zero_grad(set_to_none=True)
    checkpoint(model, x, use_reentrant=reentrant).square().sum().backward()
    got = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("kinds", [KINDS[0], ("vector", "vector", "constant"), ("none", "none", "none"), None], ids=str)
def test_compiled_in_one_graph(kinds):
    torch.compiler.reset()
    model, x = adapted(hira_config() if kinds is None else glora_config(kinds)), tokens()
    want, wanted = model(x), (gradients(model, x) if kinds != ("none",) * 3 else None)
    accelerate(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), want)
    if wanted is not None:
        model.zero_grad(set_to_none=True)
        compiled(x).square().sum().backward()
        got = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        torch.testing.assert_close(got, wanted)


def test_compiled_model_follows_its_adapter():
    torch.compiler.reset()
    model, x = two_adapters(), tokens()
    accelerate(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for name in ("default", "other", "default"):
        model.set_adapter(name)
        torch.testing.assert_close(compiled(x), model(x))
    with model.disable_adapter():
        torch.testing.assert_close(compiled(x), mlp()(x))


# -- what is left to PEFT ----------------------------------------------------------------------------


class Quantised(nn.Linear):
    """A subclass, which may compute something else."""

    def forward(self, x):
        return super().forward(x).mul(8).round().div(8)


def assert_kept(model, x, reasons):
    """Exactly these are listed, and the model computes what it did."""
    want = model(x)
    acceleration = accelerate(model)
    assert acceleration.kept == {f"base_model.model.{name}": reason for name, reason in reasons.items()}
    torch.testing.assert_close(model(x), want)


def test_other_bases_of_hira():
    base = nn.Sequential(nn.Embedding(9, 6), Quantised(6, 5), Conv1D(4, 5), nn.Linear(4, 3))
    with pytest.warns(UserWarning, match="fan_in_fan_out is set to False but the target module is `Conv1D`"):
        model = adapted(hira_config(target_modules=["0", "1", "2", "3"]), base)
    reasons = {
        "0": "no operator for peft.tuners.hira.layer.Embedding",
        "1": f"its base layer is {__name__}.Quantised, not torch.nn.Linear",
        "2": "its base layer is transformers.pytorch_utils.Conv1D, not torch.nn.Linear",
    }
    assert_kept(model, torch.arange(9), reasons)
    assert accelerate(model).served == ("base_model.model.3",)


def test_dropout_of_hira_while_it_trains():
    model, x = adapted(hira_config(hira_dropout=0.5)), tokens()
    acceleration = accelerate(model.train())
    assert acceleration.kept == dict.fromkeys(NAMES, "its dropout is active")
    torch.manual_seed(0)
    got = model(x)
    acceleration.undo()
    torch.manual_seed(0)
    assert torch.equal(model(x), got)
    model.eval()
    want = model(x)
    assert accelerate(model).served == NAMES
    torch.testing.assert_close(model(x), want)


def test_a_trained_base():
    model, x = adapted(glora_config()), tokens()
    model.base_model.model.fc1.base_layer.bias.requires_grad_()
    wanted = gradients(model, x)
    acceleration = accelerate(model)
    assert acceleration.kept == {NAMES[0]: "its base layer is trained"}
    torch.testing.assert_close(gradients(model, x), wanted)


class Packed(torch.Tensor):
    """As quantised weights come in a plain nn.Linear."""


@pytest.mark.parametrize(
    ("weight", "reason"),
    [
        (torch.ones(8, 6, dtype=torch.int8), "its weight is torch.nn.Parameter of torch.int8"),
        (torch.ones(8, 6).as_subclass(Packed), f"its weight is {__name__}.Packed of torch.float32"),
        (torch.ones(8, 6, device="meta"), "its adapter is not on the device of its weight"),
    ],
    ids=["dtype", "subclass", "device"],
)
def test_weights_that_the_operator_cannot_read(weight, reason):
    model = adapted(glora_config())
    model.base_model.model.fc1.base_layer.weight = nn.Parameter(weight, requires_grad=False)
    assert accelerate(model).kept == {NAMES[0]: reason}


def test_hooks_of_the_base_run():
    model, x = adapted(hira_config()), tokens()
    model.base_model.model.fc1.base_layer.register_forward_hook(lambda _module, _inputs, y: 2 * y)
    assert_kept(model, x, {"fc1": "its base layer has hooks, pruning or weight norm"})


def test_a_changed_path():
    """A parametrised tensor is read through its parametrisation."""

    class Halved(nn.Module):
        def forward(self, tensor):
            return tensor / 2

    model, x = adapted(glora_config()), tokens()
    layer = model.base_model.model.fc1
    torch.nn.utils.parametrize.register_parametrization(layer.glora_D["default"], "X", Halved())
    (reason,) = accelerate(copy.deepcopy(model)).kept.values()
    assert reason.startswith("its D is a changed ")
    assert_kept(model, x, {"fc1": reason})


def test_hooks_of_a_path_run():
    model, x = adapted(glora_config()), tokens()
    model.base_model.model.fc1.glora_B["default"].register_forward_hook(lambda _module, _inputs, matrix: 2 * matrix)
    assert_kept(model, x, {"fc1": "its B is a changed peft.tuners.glora.layer.GloraLoraPath"})


def test_a_replaced_forward():
    """As Hugging Face's accelerate replaces it, to move weights."""
    model, x = adapted(glora_config()), tokens()
    layer = model.base_model.model.fc1
    own = layer.forward
    layer.forward = lambda x: 2 * own(x)
    assert_kept(model, x, {"fc1": "its forward was replaced"})


def test_a_subclass_of_peft_layer():
    class Own(GloraLinear):
        pass

    model, x = adapted(glora_config()), tokens()
    model.base_model.model.fc2.__class__ = Own
    assert_kept(model, x, {"fc2": f"no operator for {__name__}.{Own.__qualname__}"})


def test_other_methods_are_listed():
    models = {"lora": adapted(peft.LoraConfig(target_modules=["fc1"])), "glora": adapted(glora_config())}
    acceleration = accelerate(nn.ModuleDict(models))
    assert acceleration.kept == {f"lora.{NAMES[0]}": "no operator for peft.tuners.lora.layer.Linear"}
    assert acceleration.served == tuple(f"glora.{name}" for name in NAMES)
