"""Names in files and paths are those of the model without torch.compile, data parallelism and other wrappers."""

import json
import warnings
from collections import OrderedDict

import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

import glora
from glora import PathConfig, Recipe
from glora.models.wrappers import name_in, named_buffers, named_modules, named_parameters, tensors_of
from glora.peft import export_peft, import_peft
from tests.glora.toys import IN_FEATURES, generator, points, randomize, same_bits, seeded


@pytest.fixture(scope="module", autouse=True)
def one_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def compiled(module):
    return torch.compile(module, backend="eager")


def within(wrap):
    """``wrap`` around a part of a model, not around all of it."""

    def wrapped(model):
        model.block = wrap(model.block)
        return model

    return wrapped


def in_compiled_ddp(model):
    return compiled(DistributedDataParallel(model))


WRAPS = {
    "compiled": compiled,
    "DDP": lambda model: DistributedDataParallel(model, find_unused_parameters=True),
    "DataParallel": nn.DataParallel,
    "averaged": AveragedModel,
    "compiled DDP": in_compiled_ddp,
    "averaged, compiled": lambda model: AveragedModel(compiled(model)),
    "checkpointed": checkpoint_wrapper,
    "compiled block": within(compiled),
    "checkpointed block": within(checkpoint_wrapper),
}
wraps = pytest.mark.parametrize("wrap", WRAPS.values(), ids=WRAPS)


class Plain(nn.Module):
    """With a child of the name that wrappers use, and with statistics."""

    def __init__(self):
        super().__init__()
        self.module = nn.Linear(IN_FEATURES, 6)
        self.norm = nn.BatchNorm1d(6)
        self.block = nn.Sequential(OrderedDict(fc=nn.Linear(6, 6), act=nn.ReLU()))
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.block(self.norm(self.module(x))))


LAYERS = ("module", "block.fc")
PATH = PathConfig("lora_2", "lora_2", "lora_2", "vector", "vector")


def plain():
    with seeded():
        return Plain().eval()


def trained(product="hadamard", seed=0):
    model = glora.inject(plain(), 2, product=product)
    randomize(model, seed)
    gen = generator(seed)
    model.norm.running_mean.copy_(torch.randn(6, generator=gen))
    glora.set_paths(model, dict.fromkeys(LAYERS, PATH))
    return model


def outputs(model):
    """Of the model within any wrapper at its top, which need not run here."""
    while (inner := getattr(model, "_orig_mod", None) or getattr(model, "_checkpoint_wrapped_module", None)) or (
        isinstance(model, DistributedDataParallel | nn.DataParallel | AveragedModel)
    ):
        model = inner or model.module
    with torch.no_grad():
        return model.eval()(torch.randn(5, IN_FEATURES, generator=generator(2)))


@wraps
def test_names_are_those_of_the_plain_model(wrap):
    for make in (plain, trained):
        bare, wrapped = make(), wrap(make())
        for of in (named_modules, named_parameters, named_buffers, tensors_of):
            assert [name for name, _ in dict(of(wrapped)).items()] == [name for name, _ in dict(of(bare)).items()]
    assert list(glora.glora_layers(wrapped)) == list(LAYERS)
    assert glora.get_paths(wrapped) == glora.get_paths(bare)


def test_a_shared_module_has_all_its_names():
    shared = nn.Linear(2, 2)
    model = nn.Sequential(compiled(nn.Sequential(shared)), shared)
    assert list(dict(named_parameters(model))) == ["0.0.weight", "0.0.bias"]
    assert list(tensors_of(model)) == ["0.0.weight", "0.0.bias", "1.weight", "1.bias"]


def test_buffers_out_of_the_state_dict_can_be_left_out():
    model = nn.Sequential(nn.BatchNorm1d(2))
    model.register_buffer("mask", torch.zeros(2), persistent=False)
    assert list(dict(named_buffers(compiled(model)))) == list(dict(model.named_buffers()))
    assert list(dict(named_buffers(compiled(model), persistent=True))) == list(model.state_dict())[2:]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("_orig_mod.block.fc", "block.fc"),
        ("module.block.fc", "block.fc"),
        ("module", "module"),
        ("module.module", "module"),
        ("_orig_mod.module.module", "module"),
        ("module._orig_mod.block._checkpoint_wrapped_module.fc", "block.fc"),
        ("block.module.fc", "block.fc"),
        ("_orig_mod.other", "other"),
        ("module.other", "module.other"),
    ],
)
def test_names_of_earlier_files(name, expected):
    assert name_in(("", "module", "block", "block.fc"), name) == expected


SAVERS = {
    "own": (glora.save_adapter, glora.load_adapter, "hadamard", "a.safetensors"),
    "official": (glora.save_official, glora.load_official, "hadamard", "a.pt"),
    "peft": (export_peft, import_peft, "hadamard", "folder"),
    "lycoris": (
        lambda model, file: glora.save_lycoris(model, file, adapters_only=True),
        glora.load_lycoris,
        "matmul",
        "a.safetensors",
    ),
}


def saved_and_loaded(kind, file, save_wrap, load_wrap, model=None):
    """Outputs of the saved and of the loaded model, whose base is the same but for what no file of others can hold."""
    save, load, product, _ = SAVERS[kind]
    one, other = trained(product), model or trained(product, seed=1)
    if kind == "lycoris":
        for each in (one, other):
            if glora.glora_layers(each):
                glora.set_paths(each, dict.fromkeys(LAYERS, PathConfig("lora_2", "lora_2")))
        other.head.load_state_dict(one.head.state_dict())
    if kind in ("lycoris", "official"):
        other.norm.load_state_dict(one.norm.state_dict())
    wrapped = load_wrap(other)
    save(save_wrap(one), file)
    load(wrapped, file)
    return outputs(one), outputs(wrapped)


def bare(model):
    return model


@wraps
@pytest.mark.parametrize("kind", SAVERS)
@pytest.mark.filterwarnings("ignore:the file cannot hold the statistics", "ignore:.* holds nothing for the buffers")
def test_files_go_from_wrapped_to_plain_and_back(tmp_path, kind, wrap):
    for number, pair in enumerate([(wrap, bare), (bare, wrap)]):
        one, other = saved_and_loaded(kind, tmp_path / f"{number}-{SAVERS[kind][3]}", *pair)
        torch.testing.assert_close(other, one)


@pytest.mark.parametrize("wrap", [compiled, within(checkpoint_wrapper)], ids=["compiled", "checkpointed block"])
@pytest.mark.parametrize("kind", SAVERS)
@pytest.mark.filterwarnings(
    "ignore:the file cannot hold the statistics", "ignore:.* holds nothing for the buffers", "ignore:.* holds no paths"
)
def test_a_wrapped_model_without_glora_gets_it(tmp_path, kind, wrap):
    one, other = saved_and_loaded(kind, tmp_path / SAVERS[kind][3], bare, wrap, plain())
    torch.testing.assert_close(other, one)


def renamed(tensors, prefix):
    return {prefix + name: tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "_orig_mod.module.", "module.module."])
@pytest.mark.parametrize("make", [lambda: trained(seed=1), plain], ids=["injected", "plain"])
def test_files_of_earlier_versions_with_wrappers_names(tmp_path, prefix, make):
    model, own, official = trained(), tmp_path / "a.safetensors", tmp_path / "a.pt"
    glora.save_adapter(model, own)
    with safe_open(own, "pt") as opened:
        description = json.loads(opened.metadata()["glora"])
    description["layers"] = renamed(description["layers"], prefix)
    save_file(renamed(load_file(own), prefix), own, {"glora": json.dumps(description)})
    loaded = glora.load_adapter(make(), own)
    assert torch.equal(outputs(loaded), outputs(model))
    tensors = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    torch.save(renamed(tensors, prefix), official)
    other = make()
    other.norm.load_state_dict(model.norm.state_dict())
    with pytest.warns(UserWarning, match="holds nothing for the buffers"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*holds no paths")  # the plain one
        glora.load_official(other, official)
    glora.set_paths(other, glora.get_paths(model))
    assert torch.equal(outputs(other), outputs(model))


@pytest.mark.parametrize("prefix", ["_orig_mod_", "module_", "_orig_mod_module_"])
def test_lycoris_files_of_wrapped_models(tmp_path, prefix):
    model, file = trained("matmul"), tmp_path / "a.safetensors"
    glora.set_paths(model, dict.fromkeys(LAYERS, PathConfig("lora_2", "lora_2")))
    with pytest.warns(UserWarning, match="cannot hold the statistics"):
        glora.save_lycoris(model, file, adapters_only=True)
    save_file({name.replace("lycoris_", f"lycoris_{prefix}", 1): t for name, t in load_file(file).items()}, file)
    assert list(glora.glora_layers(glora.load_lycoris(plain(), file))) == list(LAYERS)


def test_a_tensor_with_two_names_is_refused(tmp_path):
    file = tmp_path / "a.pt"
    tensors = {name: p.detach() for name, p in trained().named_parameters() if p.requires_grad}
    torch.save({**tensors, "_orig_mod.head.weight": tensors["head.weight"]}, file)
    with pytest.raises(ValueError, match="expected each tensor once, got some with and without the name of a wrapper"):
        glora.load_official(trained(), file)


@wraps
def test_paths_by_either_name(wrap):
    model = wrap(trained())
    for paths in (dict.fromkeys(LAYERS, PathConfig()), {f"_orig_mod.module.{n}": PathConfig() for n in LAYERS}):
        glora.set_paths(model, dict.fromkeys(LAYERS, PATH))
        glora.set_paths(model, paths)
        assert glora.get_paths(model) == dict.fromkeys(LAYERS, PathConfig())
        assert glora.count_parameters(model, paths) == 0
        with glora.using_paths(model, paths):
            pass
    twice = {**dict.fromkeys(LAYERS, PATH), "_orig_mod.module": PathConfig()}
    with pytest.raises(ValueError, match="paths: expected exactly the 2 adapted layers of the model, each once"):
        glora.set_paths(model, twice)


@pytest.mark.parametrize("wrap", [compiled, within(checkpoint_wrapper)], ids=["compiled", "checkpointed block"])
def test_merge_and_unmerge(wrap):
    model = wrap(trained())
    before = outputs(model)
    report = glora.merge(model, keep=True)
    assert [layer.name for layer in report.layers] == list(LAYERS)
    torch.testing.assert_close(outputs(model), before)
    glora.unmerge(model, report)
    assert torch.equal(outputs(model), before)


RECIPE = Recipe(steps=4, batch_size=6, lr=0.01, checkpoint_every=2)


def run(model, file, **options):
    torch.manual_seed(0)
    glora.train(model, points(), RECIPE, checkpoint=file, progress=False, **options)
    return {name: tensor.detach().clone() for name, tensor in tensors_of(model).items()}


def stop(step, loss):
    if step == 3:
        raise KeyboardInterrupt


@pytest.mark.parametrize("name", ["compiled", "DDP", "DataParallel", "checkpointed block"])
def test_checkpoints_go_from_wrapped_to_plain_and_back(tmp_path, name):
    """Of finished runs, which are only loaded: to compile changes the last bits of a step."""
    for number, (first, second) in enumerate([(WRAPS[name], bare), (bare, WRAPS[name])]):
        bits = run(first(trained()), tmp_path / f"{number}.pt")
        assert same_bits(run(second(trained()), tmp_path / f"{number}.pt"), bits)


def test_a_checkpoint_of_an_earlier_version_with_a_wrappers_names(tmp_path):
    expected, file = run(trained(), tmp_path / "uncut.pt"), tmp_path / "cut.pt"
    with pytest.raises(KeyboardInterrupt):
        run(trained(), file, on_step=stop)
    state = torch.load(file, weights_only=True)
    state["format"], state["tensors"] = 2, renamed(state["tensors"], "_orig_mod.")
    identity = {key: value for key, value in state["identity"].items() if key not in ("products", "data")}
    state["identity"] = {**identity, "paths": renamed(identity["paths"], "_orig_mod.")}
    torch.save(state, file)
    assert same_bits(run(trained(), file), expected)


@pytest.mark.filterwarnings("ignore:.*NO_SHARD:UserWarning", "ignore:.*FSDP:FutureWarning")
def test_fsdp1_is_refused_by_name(tmp_path):
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = FullyShardedDataParallel(trained(), use_orig_params=True, device_id=torch.device("cpu"))
    message = r"^model: expected one without FullyShardedDataParallel, .*fully_shard"
    for call in (glora.save_adapter, glora.save_official, export_peft, run):
        with pytest.raises(ValueError, match=message):
            call(model, tmp_path / "file")
    with pytest.raises(ValueError, match=message):
        glora.merge(model)
    assert not list(tmp_path.iterdir())
