"""What the tensors of a file are is looked at before anything of a model is changed, and a model's before writing."""

import json
import math
import re
from collections import OrderedDict

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import glora
from glora import PathConfig
from glora.models.contents import Slot, require_fit, statistics
from glora.peft import export_peft, import_peft
from tests.glora.toys import mlp, points, randomize, trained_mlp, unchanged

HEAD = "head.weight"
PATH = PathConfig("lora_2", "lora_2", "lora_2", "vector", "vector")
LOW = PathConfig("lora_2", "lora_2")


def trained(path=PATH, product="hadamard"):
    model = trained_mlp(product=product)
    glora.set_paths(model, dict.fromkeys(("fc1", "fc2"), path))
    return model


def write_official(tensors, file):
    torch.save(tensors, file)


def write_safetensors(tensors, file):
    metadata = None
    if file.exists():
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata()
    save_file(tensors, file, metadata)


def read_official(file):
    return torch.load(file, weights_only=True)


def save_lycoris(model, file):
    glora.save_lycoris(model, file, adapters_only=True)


def train_to(model, file):
    glora.train(model, points(), glora.Recipe(steps=1, batch_size=4), checkpoint=file, progress=False)


def read_checkpoint(file):
    return torch.load(file, weights_only=True)["tensors"]


def write_checkpoint(tensors, file):
    torch.save({**torch.load(file, weights_only=True), "tensors": tensors}, file)


class Format:
    """One format: where its tensors are, and which of them is an adapter's."""

    def __init__(self, save, load, read, write, name, support, product="hadamard", path=PATH):
        self.save, self.load, self.read, self.write = save, load, read, write
        self.name, self.support, self.product, self.path = name, support, product, path

    def make(self):
        return trained(self.path, self.product)

    def tensors(self, folder):
        return folder / "adapter_model.safetensors" if self.name == "folder" else folder

    def edit(self, folder, name, change):
        file = self.tensors(folder)
        tensors = self.read(file)
        tensors[name] = change(tensors[name])
        self.write(tensors, file)


FORMATS = {
    "own": Format(glora.save_adapter, glora.load_adapter, load_file, write_safetensors, "a.safetensors", "fc2.Bd"),
    "official": Format(glora.save_official, glora.load_official, read_official, write_official, "a.pt", "fc2.Bd"),
    "lycoris": Format(
        save_lycoris,
        glora.load_lycoris,
        load_file,
        write_safetensors,
        "a.safetensors",
        "lycoris_fc2.b1.weight",
        "matmul",
        LOW,
    ),
    "peft": Format(export_peft, import_peft, load_file, write_safetensors, "folder", "base_model.model.fc2.glora_B.Xd"),
    "checkpoint": Format(train_to, train_to, read_checkpoint, write_checkpoint, "run.pt", "fc2.Bd"),
}
formats = pytest.mark.parametrize("kind", FORMATS)


def first_is(value):
    def change(tensor):
        tensor = tensor.double()
        tensor.view(-1)[0] = value
        return tensor

    return change


CHANGES = {
    "int32": lambda tensor: tensor.int(),
    "bool": lambda tensor: tensor.bool(),
    "complex": lambda tensor: tensor.to(torch.complex64),
    "float8": lambda tensor: tensor.to(torch.float8_e4m3fn),
    "float4": lambda tensor: torch.zeros(tensor.shape, dtype=torch.uint8).view(torch.float4_e2m1fn_x2),
    "nan": first_is(math.nan),
    "inf": first_is(-math.inf),
    "1e300": first_is(1e300),
}


@pytest.mark.parametrize("place", ["support", "head"])
@pytest.mark.parametrize("change", CHANGES)
@formats
@pytest.mark.parametrize("plain", [False, True], ids=["injected", "plain"])
def test_one_bad_tensor_changes_nothing(tmp_path, kind, change, place, plain):
    form, file = FORMATS[kind], tmp_path / FORMATS[kind].name
    form.save(form.make(), file)
    name = form.support
    if place == "head":
        name = {"peft": f"base_model.model.{HEAD}", "lycoris": "lycoris_fc1.a2.weight"}.get(kind, HEAD)
    form.edit(file, name, CHANGES[change])
    model = mlp() if plain and kind != "checkpoint" else form.make()
    expected = "layer|fc[12]" if kind == "lycoris" and change in ("nan", "inf", "1e300") else re.escape(name[-6:])
    with unchanged(model), pytest.raises(ValueError, match=expected) as raised:
        form.load(model, file)
    assert str(file) in str(raised.value)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@formats
def test_every_real_dtype_is_taken(tmp_path, kind, dtype):
    form, file = FORMATS[kind], tmp_path / FORMATS[kind].name
    form.save(form.make(), file)
    form.edit(file, form.support, lambda tensor: tensor.to(dtype))
    form.load(form.make(), file)


def test_what_overflows_in_the_models_own_dtype_is_refused(tmp_path):
    file = tmp_path / "a.safetensors"
    model = trained()
    model.head.weight.data.view(-1)[0] = 1e6
    glora.save_adapter(model, file)
    glora.load_adapter(mlp(), file)
    half = mlp().half()
    with unchanged(half), pytest.raises(ValueError, match=r"head.weight \(infinite in torch.float16\)"):
        glora.load_adapter(half, file)


@pytest.mark.parametrize("change", [lambda t: t.to("meta"), lambda t: t.to_sparse()], ids=["meta", "sparse"])
@pytest.mark.parametrize("kind", ["official", "checkpoint"])
@pytest.mark.filterwarnings("ignore:Validating sparse tensor invariants")
def test_tensors_without_values_of_their_own_are_refused(tmp_path, kind, change):
    form, file = FORMATS[kind], tmp_path / FORMATS[kind].name
    form.save(form.make(), file)
    form.edit(file, HEAD, change)
    model = form.make()
    with unchanged(model), pytest.raises(ValueError, match=r"head\.weight \("):
        form.load(model, file)


def test_other_than_floating_tensors_keep_their_dtype():
    slots = {"count": Slot((), torch.int64), "mask": Slot((2,), torch.float32, infinite=True)}
    good = {"count": torch.tensor(3), "mask": torch.tensor([0, -math.inf])}
    require_fit("f", good, slots)
    require_fit("f", {**good, "mask": torch.full((2,), -1e300, dtype=torch.float64)}, slots)  # -inf there too
    for name, tensor in (("count", torch.tensor(3.0)), ("count", torch.tensor(3).int()), ("mask", torch.ones(2).int())):
        with pytest.raises(ValueError, match=rf"^f: expected finite tensors of a floating dtype, got '{name} "):
            require_fit("f", {**good, name: tensor}, slots)


def test_a_message_lists_a_few(tmp_path):
    file = tmp_path / "a.safetensors"
    glora.save_adapter(trained(), file)
    write_safetensors({name: tensor.int() for name, tensor in load_file(file).items()}, file)
    with pytest.raises(ValueError, match=r"' and 10 more$"):
        glora.load_adapter(mlp(), file)


@pytest.mark.parametrize(
    "damage",
    [
        lambda state: state.pop("optimizer"),
        lambda state: state.pop("torch_generator"),
        lambda state: state.update(torch_generator=torch.zeros(3, dtype=torch.uint8)),
        lambda state: state.update(path_generator=torch.zeros(3)),
        lambda state: state["optimizer"]["param_groups"].clear(),
        lambda state: state["optimizer"]["state"][0].update(exp_avg=torch.zeros(3)),
        lambda state: state["optimizer"]["state"][0].update(exp_avg=torch.zeros(8, 2).int()),
        lambda state: state.update(records=[(1,)]),
    ],
)
def test_a_damaged_checkpoint_changes_nothing(tmp_path, damage):
    file = tmp_path / "run.pt"
    train_to(trained(), file)
    state = torch.load(file, weights_only=True)
    damage(state)
    torch.save(state, file)
    model = trained()
    before = torch.get_rng_state()
    with unchanged(model), pytest.raises(ValueError, match="expected a training checkpoint, it is damaged"):
        train_to(model, file)
    assert torch.equal(torch.get_rng_state(), before)


# -- before anything is written ----------------------------------------------------------------------


def emptied(model):
    """As ZeRO-3 leaves a model: the tensors are there, their values are elsewhere."""
    for parameter in model.parameters():
        parameter.data = torch.empty(0)
    return model


def headless(model):
    model.head.weight.data = torch.empty(0)
    return model


def flattened(model):
    """As FSDP1 leaves the views of its one parameter."""
    model.fc1.Ad.data = model.fc1.Ad.data.flatten()
    return model


@pytest.mark.parametrize(
    ("change", "names"),
    [(emptied, r"'fc1.Ad', .* and \d+ more"), (headless, r"'head.weight';"), (flattened, r"'fc1.Ad';")],
)
@formats
def test_parameters_that_are_not_here_are_named(tmp_path, kind, change, names):
    form = FORMATS[kind]
    model = change(form.make())
    with (
        unchanged(model),
        pytest.raises(ValueError, match=rf"^model: expected whole parameters, .* no values of {names}"),
    ):
        form.save(model, tmp_path / form.name)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["own", "official", "lycoris", "peft"])
def test_a_model_on_meta_is_not_written(tmp_path, kind):
    form = FORMATS[kind]
    with pytest.raises(ValueError, match=r"^model: expected whole parameters, .* or load what is on meta"):
        form.save(form.make().to("meta"), tmp_path / form.name)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["own", "official", "lycoris", "peft"])
def test_a_diverged_model_is_written_with_a_warning(tmp_path, kind):
    """Its other tensors may be all that is left."""
    form = FORMATS[kind]
    model = form.make()
    model.fc2.Bd.data[0, 0] = math.nan
    with pytest.warns(UserWarning, match=r"training has diverged: not finite are '.*fc2.*'; they are written"):
        form.save(model, tmp_path / form.name)
    with pytest.raises(ValueError, match="finite"):
        form.load(form.make(), tmp_path / form.name)


@pytest.mark.parametrize("kind", ["own", "official", "lycoris", "peft"])
def test_a_missing_folder_is_named_before_anything_else(tmp_path, kind):
    form = FORMATS[kind]
    with pytest.raises(
        ValueError, match=r"^(file|folder): expected an existing folder, got .*missing; make it first: mkdir"
    ):
        form.save(form.make(), tmp_path / "missing" / form.name)


@pytest.mark.parametrize("kind", ["own", "official", "lycoris", "checkpoint"])
def test_a_folder_in_place_of_a_file_is_named(tmp_path, kind):
    form = FORMATS[kind]
    (tmp_path / form.name).mkdir()
    with pytest.raises(ValueError, match=r"^(file|checkpoint): expected a file, got the folder "):
        form.save(form.make(), tmp_path / form.name)


# -- statistics --------------------------------------------------------------------------------------


def normed():
    torch.manual_seed(0)
    layers = OrderedDict(fc1=nn.Linear(6, 8), norm=nn.BatchNorm1d(8), act=nn.ReLU(), fc2=nn.Linear(8, 3))
    return nn.Sequential(layers)


def gathered():
    """Statistics that differ from those of :func:`normed`, as after training."""
    model = glora.inject(normed(), 2)
    randomize(model)
    model(torch.randn(9, 6) * 3 + 1)
    return model.eval()


def test_what_gathers_statistics():
    model = nn.Sequential(
        nn.BatchNorm1d(2),
        nn.BatchNorm1d(2, track_running_stats=False),
        nn.InstanceNorm1d(2),
        nn.InstanceNorm1d(2, track_running_stats=True),
        nn.LayerNorm(2),
    )
    assert sorted(set(statistics(model).values())) == ["0", "3"]
    assert list(statistics(model))[:3] == ["0.running_mean", "0.running_var", "0.num_batches_tracked"]
    assert next(iter(statistics(model[0]))) == "running_mean"


@pytest.mark.parametrize("make", [normed, lambda: glora.inject(normed(), 2)], ids=["plain", "injected"])
def test_statistics_are_in_the_file(tmp_path, make):
    """Logits were off by 1.24 without them."""
    model, x = gathered(), torch.randn(5, 6)
    glora.save_adapter(model, tmp_path / "a.safetensors")
    loaded = glora.load_adapter(make().eval(), tmp_path / "a.safetensors")
    assert torch.equal(loaded(x), model(x))
    assert loaded.norm.num_batches_tracked == 1


def test_any_persistent_buffer_is_in_the_file(tmp_path):
    def with_buffers(value):
        model = glora.inject(mlp(), 2)
        model.register_buffer("codes", torch.full((2, 3), value).T)
        model.register_buffer("codes again", model.codes)
        model.register_buffer("mask", torch.full((2,), -math.inf))
        model.register_buffer("cache", torch.full((2,), value), persistent=False)
        return model

    glora.save_adapter(with_buffers(1.0), tmp_path / "a.safetensors")
    model = glora.load_adapter(with_buffers(2.0), tmp_path / "a.safetensors")
    assert model.codes.unique().tolist() == [1] and model.cache.unique().tolist() == [2]


def test_buffers_that_the_file_cannot_hold_are_named(tmp_path):
    model = trained()
    model.register_buffer("graph", torch.eye(3).to_sparse())
    with pytest.warns(UserWarning, match=r"left out: 'graph'$"):
        glora.save_adapter(model, tmp_path / "a.safetensors")
    with pytest.warns(UserWarning, match=r"holds nothing for the buffers 'graph':"):
        glora.load_adapter(model, tmp_path / "a.safetensors")


def without_buffers(file, version):
    """The same file as an earlier version of us wrote it, or with the statistics left out."""
    with safe_open(file, "pt") as opened:
        description = json.loads(opened.metadata()["glora"])
    tensors = {name: tensor for name, tensor in load_file(file).items() if not name.startswith("norm.")}
    save_file(tensors, file, {"glora": json.dumps({**description, "format": version})})


def test_a_file_of_format_1_loads_with_a_warning(tmp_path):
    file = tmp_path / "a.safetensors"
    glora.save_adapter(gathered(), file)
    without_buffers(file, 1)
    with pytest.warns(UserWarning, match=r"holds nothing for the buffers 'norm.running_mean', .*: they stay as"):
        model = glora.load_adapter(normed(), file)
    assert torch.equal(model.norm.running_mean, torch.zeros(8))
    assert torch.equal(model.fc1.Ad, gathered().fc1.Ad)


def test_a_file_of_format_2_has_to_hold_them(tmp_path):
    file = tmp_path / "a.safetensors"
    glora.save_adapter(gathered(), file)
    without_buffers(file, 2)
    with pytest.raises(ValueError, match=r"missing tensors \['norm.num_batches_tracked', 'norm.running_mean'"):
        glora.load_adapter(normed(), file)


def test_statistics_that_are_not_finite_are_refused(tmp_path):
    file = tmp_path / "a.safetensors"
    glora.save_adapter(gathered(), file)
    FORMATS["own"].edit(file, "norm.running_var", first_is(math.nan))
    with pytest.raises(ValueError, match=r"norm.running_var \(NaN or infinite\)"):
        glora.load_adapter(normed(), file)


def test_formats_without_a_place_for_statistics_say_so(tmp_path):
    model = gathered()
    model.fc2.requires_grad_(False)
    model = glora.inject(nn.Sequential(OrderedDict(body=normed(), head=nn.Linear(3, 3))), 2, product="hadamard")
    with pytest.warns(UserWarning, match=r"cannot hold the statistics of norm layers .* as in 'body.norm':"):
        glora.save_official(model, tmp_path / "a.pt")
    glora.set_paths(model, {name: PathConfig() for name in glora.get_paths(model)})
    with pytest.warns(UserWarning, match=r"cannot hold the statistics of norm layers .* as in 'body.norm':"):
        save_lycoris(model, tmp_path / "a.safetensors")


def test_layers_of_both_products_are_refused(tmp_path):
    model = nn.Sequential(glora.GLoRALinear(4, 4, rank=2), glora.GLoRALinear(4, 4, rank=2, product="matmul"))
    with pytest.raises(ValueError, match=r"expected layers of one product, .* got \['hadamard', 'matmul'\]"):
        glora.save_adapter(model, tmp_path / "a.safetensors")
