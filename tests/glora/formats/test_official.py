"""Files and search results of the official code: its names, its order, its formula, and what must be refused."""

import itertools
import os
import pickle
from collections import OrderedDict

import pytest
import torch
from torch import nn

import glora.files
from glora import PathConfig, get_paths, glora_layers, inject, load_official, official_paths, save_official, set_paths
from glora_kernels import Constant, LowRank, Terms, Vector, reference
from tests.glora.toys import generator, mlp, randomize, same_bits, seeded, state, tiny_vit, unchanged

SUPPORT = ("Ad", "Au", "Bd", "Bu", "Cd", "Cu", "D", "E")
LAYERS = [f"blocks.{i}.{name}" for i in (0, 1) for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")]
HEAD = ("head.weight", "head.bias")


@pytest.fixture
def file(tmp_path):
    return tmp_path / "caltech101.pt"


def official_tensors(rank=3, seed=0):
    """What the official ``save`` collects, of a tiny ViT, with random values."""
    gen, tensors = generator(seed), {}
    for name, module in tiny_vit().named_modules():
        if name in LAYERS:
            (rows, columns), r = module.weight.shape, rank
            shapes = [(rows, r), (r, columns), (rows, r), (r, columns), (columns, r), (r, 1), (rows,), (rows,)]
            tensors.update(
                {f"{name}.{s}": torch.randn(shape, generator=gen) * 0.3 for s, shape in zip(SUPPORT, shapes)}
            )
    tensors.update({name: torch.randn(tiny_vit().state_dict()[name].shape, generator=gen) for name in HEAD})
    return tensors


def official_configurations(rank=3):
    """Of eight layers, in which every kind of every tensor occurs."""
    weight = (f"LoRA_{rank}", "vector", "constant", "none")
    prompt, bias = (f"LoRA_{rank}", "vector", "none"), ("constant", "none", "vector")
    shifted = itertools.cycle(weight[1:] + weight[:1])
    rows = zip(itertools.cycle(weight), shifted, itertools.cycle(prompt), itertools.cycle(bias), itertools.cycle(bias))
    return tuple(dict(zip("ABCDE", row)) for row, _ in zip(rows, LAYERS))


def as_official(tensors, configurations):
    """A plain ViT in fp64 with the weights of the official formula, taken literally."""
    model = tiny_vit().double()
    with torch.no_grad():
        for name in HEAD:
            model.get_parameter(name).copy_(tensors[name])
        for name, configuration in zip(LAYERS, configurations):
            linear = model.get_submodule(name)
            terms = {slot: literal(slot, text, tensors, name) for slot, text in configuration.items() if text != "none"}
            weight, bias = reference.glora_merge(linear.weight, linear.bias, Terms(**terms))
            linear.weight.copy_(weight)
            linear.bias.copy_(bias)
    return model


def literal(slot, text, tensors, name):
    if slot in "DE":
        value = tensors[f"{name}.{slot}"].double()
        return Vector(value) if text == "vector" else Constant(value)
    down, up = tensors[f"{name}.{slot}d"].double(), tensors[f"{name}.{slot}u"].double()
    if text.startswith("LoRA_"):
        return LowRank(down, up, int(text.removeprefix("LoRA_")))
    return Vector(down) if text == "vector" else Constant(down)


def images():
    return torch.randn(2, 1, 8, 8, generator=generator(5))


def saved(file, rank=3, seed=0):
    tensors = official_tensors(rank, seed)
    torch.save(tensors, file)
    return tensors


def trained(rank=3):
    model = inject(tiny_vit(), rank)
    randomize(model)
    return model


def loaded_without_paths(file):
    """Into a plain model, which says that it was not told them."""
    with pytest.warns(UserWarning, match=r"holds no paths.*glora.set_paths"):
        return load_official(tiny_vit(), file)


models = pytest.mark.parametrize("make", [tiny_vit, trained], ids=["plain", "adapted"])


# -- what it means -------------------------------------------------------------------------------------


@models
@pytest.mark.parametrize("rank", [1, 3])
def test_computes_what_the_official_code_does(file, make, rank):
    tensors = saved(file, rank)
    model = make() if make is tiny_vit else make(rank)
    configurations = official_configurations(rank)
    assert load_official(model, file, configurations) is model
    expected = as_official(tensors, configurations)(images().double())
    assert not torch.allclose(expected, as_official(tensors, [{}] * 8)(images().double()), atol=1e-2)
    torch.testing.assert_close(model.double()(images().double()), expected, rtol=1e-10, atol=1e-10)


def test_a_smaller_rank_reads_a_part_of_the_storage(file):
    tensors, configurations = saved(file, 3), official_configurations(2)
    model = load_official(tiny_vit(), file, configurations).double()
    expected = as_official(tensors, configurations)(images().double())
    torch.testing.assert_close(model(images().double()), expected, rtol=1e-10, atol=1e-10)


def test_paths_are_in_the_models_order():
    configurations = official_configurations()
    paths = official_paths(trained(), configurations)
    assert list(paths) == LAYERS
    assert paths["blocks.0.attn.qkv"] == PathConfig("lora_3", "vector", "lora_3", "constant", "constant")
    assert paths["blocks.1.mlp.fc2"] == PathConfig("none", "lora_3", "vector", "none", "none")


def test_official_paths_leave_the_model_as_it_is():
    with unchanged(model := trained()):
        official_paths(model, official_configurations())


def test_the_best_of_a_search_checkpoint(tmp_path):
    """Its ``save_checkpoint`` writes tuples of dicts, which ``weights_only`` allows."""
    best = official_configurations()
    torch.save({"keep_top_k": {10: [best], 50: [best]}, "vis_dict": {str(best): {"acc": 0.5}}}, tmp_path / "c.pth.tar")
    candidates = torch.load(tmp_path / "c.pth.tar", weights_only=True)["keep_top_k"][50]
    assert official_paths(trained(), candidates[0]) == official_paths(trained(), best)


@models
def test_without_configurations_paths_stay(file, make):
    saved(file)
    model = make()
    if make is trained:
        set_paths(model, official_paths(model, official_configurations()))
    before = get_paths(inject(tiny_vit(), 3)) if make is tiny_vit else get_paths(model)
    loaded = loaded_without_paths(file) if make is tiny_vit else load_official(model, file)
    assert get_paths(loaded) == before


def test_loading_into_a_plain_model_trains_what_the_official_code_does(file):
    tensors = saved(file)
    model = loaded_without_paths(file)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == set(tensors)
    assert all(torch.equal(p, tensors[name]) for name, p in model.named_parameters() if name in tensors)


# -- writing -------------------------------------------------------------------------------------------


@models
def test_round_trip(file, make):
    original = trained()
    set_paths(original, official_paths(original, official_configurations()))
    save_official(original, file)
    model = load_official(make(), file, official_configurations())
    assert same_bits(state(model), state(original)) and get_paths(model) == get_paths(original)


def test_the_file_is_what_the_official_code_writes(file):
    save_official(trained(), file)
    tensors = torch.load(file, weights_only=True)
    expected = official_tensors()
    assert {name: tuple(t.shape) for name, t in tensors.items()} == {
        name: tuple(t.shape) for name, t in expected.items()
    }
    assert not any(tensor.requires_grad for tensor in tensors.values())


def test_a_frozen_head_is_in_the_file_too(file):
    """The official ``load`` asks for it."""
    model = trained()
    model.head.requires_grad_(False)
    save_official(model, file)
    assert torch.equal(torch.load(file, weights_only=True)["head.weight"], model.head.weight)


def test_whatever_else_was_trained_is_in_the_file(file):
    model = trained()
    model.norm.requires_grad_(True)
    randomize(model, seed=1)
    save_official(model, file)
    assert torch.equal(loaded_without_paths(file).norm.weight, model.norm.weight)


def test_no_more_is_written_than_a_parameter_holds(file):
    """``torch.save`` writes the whole storage behind a view."""
    model = trained()
    model.head.weight = nn.Parameter(torch.zeros(1_000_000)[: model.head.weight.numel()].view_as(model.head.weight))
    save_official(model, file)
    assert file.stat().st_size < 100_000


def test_a_failing_writer_leaves_the_old_file(file, monkeypatch):
    def fail(descriptor):
        raise OSError("disk full")

    saved(file)
    before = file.read_bytes()
    monkeypatch.setattr(glora.files.os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        save_official(trained(), file)
    assert file.read_bytes() == before and list(file.parent.iterdir()) == [file]


def two_ranks():
    model = tiny_vit()
    model.blocks[0].mlp.fc1 = glora.GLoRALinear.from_linear(model.blocks[0].mlp.fc1, 2)
    model.blocks[0].mlp.fc2 = glora.GLoRALinear.from_linear(model.blocks[0].mlp.fc2, 3)
    return model


def with_head_inside():
    """The official code adapts ``head.fc``, whose last name has no 'head' in it."""
    with seeded():
        return nn.Sequential(OrderedDict(fc=nn.Linear(6, 6), head=nn.Sequential(OrderedDict(fc=nn.Linear(6, 3)))))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (tiny_vit, "at least one adapted layer, found none"),
        (lambda: inject(tiny_vit(), 3, product="matmul"), r"expected the hadamard product, .* got matmul in \['blocks"),
        (two_ranks, r"expected one rank, as in the official code, got \[2, 3\]"),
        (lambda: inject(mlp(), 2, targets=["fc1"]), r"otherwise are \['fc2'\]"),
        (lambda: inject(mlp(), 2, heads=()), r"otherwise are \['head'\]"),
        (lambda: inject(with_head_inside(), 2), r"otherwise are \['head.fc'\]"),
    ],
    ids=["plain", "product", "ranks", "fewer", "head", "inside-head"],
)
def test_refuses_what_the_official_code_could_not_load(file, make, message):
    with unchanged(model := make()), pytest.raises(ValueError, match=message):
        save_official(model, file)
    assert not file.exists()


# -- refused before anything is changed ------------------------------------------------------------------


def assert_refused(model, file, message, error=ValueError, configurations=None):
    with unchanged(model), pytest.raises(error, match=message):
        load_official(model, file, configurations)


def changed(index, **kinds):
    configurations = [dict(configuration) for configuration in official_configurations()]
    configurations[index].update(kinds)
    return configurations


@pytest.mark.parametrize(
    ("configurations", "error", "message"),
    [
        (official_configurations()[:7], ValueError, "expected one for each of the 8 adapted layers, got 7"),
        ("LoRA_3", TypeError, "configurations: expected a sequence of dicts, got str"),
        ({"A": "LoRA_3"}, TypeError, "configurations: expected a sequence of dicts, got dict"),
        (["LoRA_3"] * 8, TypeError, r"configurations\[0\]: expected a dict, got str"),
        (changed(3, C="constant"), ValueError, r"configurations\[3\]: C: expected one of lora.*got 'constant'"),
        (changed(7, A=4), TypeError, r"configurations\[7\]: A: expected a string such as 'lora_8', got int"),
        (changed(2, F="none"), ValueError, r"configurations\[2\]: path: expected exactly the keys"),
    ],
)
@models
def test_refuses_other_configurations(file, make, configurations, error, message):
    saved(file)
    assert_refused(make(), file, message, error, configurations)
    with pytest.raises(error, match=message):
        official_paths(trained(), configurations)


@models
def test_refuses_a_rank_above_the_files(file, make):
    saved(file)
    message = r"configurations\[5\]: expected ranks up to 3 \(of .*\), got PathConfig\(A='lora_4'"
    assert_refused(make(), file, message, configurations=changed(5, A="LoRA_4"))


def test_official_paths_want_an_adapted_model():
    with pytest.raises(ValueError, match="at least one adapted layer, found none"):
        official_paths(tiny_vit(), official_configurations())


@models
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("blocks.0.attn.qkv.Bu"), r"missing tensors \['blocks.0.attn.qkv.Bu'\]"),
        (lambda t: t.update({"blocks.0.attn.qkv.F": torch.ones(3)}), r"unknown tensors \['blocks.0.attn.qkv.F'\]"),
        (lambda t: t.update({"head.bias": torch.ones(5)}), r"head.bias: \(3,\) in the model, \(5,\) in the file"),
        (lambda t: t.update({"blocks.1.mlp.fc1.Au": torch.ones(3, 9)}), r"blocks.1.mlp.fc1.Au: \(3, 16\) in the model"),
        (
            lambda t: t.update({"blocks.1.mlp.fc1.Ad": torch.ones(9)}),
            "expected an official GLoRA file, with .*; got 66",
        ),
        (lambda t: t.clear(), "expected an official GLoRA file, with .*; got 0 tensors"),
    ],
    ids=["missing", "unknown", "classes", "inputs", "dimensions", "empty"],
)
def test_refuses_other_tensors(file, make, change, message):
    tensors = official_tensors()
    change(tensors)
    torch.save(tensors, file)
    assert_refused(make(), file, message)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: trained(2), r"differing \['blocks.0.attn.qkv: rank 2 hadamard in the model, 3 hadamard in the file'"),
        (lambda: inject(tiny_vit(), 3, product="matmul"), r"rank 3 matmul in the model, 3 hadamard in the file"),
        (lambda: inject(tiny_vit(), 3, targets=["qkv"]), r"missing \[\], unknown \['blocks.0.attn.proj'"),
        (mlp, r"made for another model: expected layers that GLoRA adapts at \['blocks.0.attn.proj'"),
    ],
    ids=["rank", "product", "fewer-layers", "other-names"],
)
@pytest.mark.parametrize("configurations", [None, official_configurations()], ids=["file", "configurations"])
def test_refuses_other_models(file, make, message, configurations):
    saved(file)
    assert_refused(make(), file, message, configurations=configurations)


def test_a_model_without_the_files_head_is_refused(file):
    saved(file)
    model = tiny_vit()
    model.head = nn.Identity()
    assert_refused(model, file, r"unknown tensors \['head.bias', 'head.weight'\]")


def test_a_plain_model_gets_the_rank_of_each_layer(file):
    tensors = official_tensors(3)
    tensors.update({name: t for name, t in official_tensors(2).items() if name.startswith("blocks.1.")})
    torch.save(tensors, file)
    model = loaded_without_paths(file)
    assert {name[:8]: layer.rank for name, layer in glora_layers(model).items()} == {"blocks.0": 3, "blocks.1": 2}


@models
@pytest.mark.parametrize(
    "content",
    [b"", b"no pickle at all", pickle.dumps(print), pickle.dumps({"Ad": eval})],
    ids=["empty", "text", "function", "dict-of-code"],
)
def test_refuses_damaged_and_foreign_pickles(file, make, content):
    file.write_bytes(content)
    assert_refused(make(), file, "expected an official GLoRA file, it is damaged or something else")


class _Code:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def test_code_in_a_file_is_not_run(file, tmp_path):
    torch.save({"Ad": torch.ones(2, 2), "code": _Code(tmp_path / "ran")}, file)
    assert_refused(trained(), file, "expected an official GLoRA file, it is damaged or something else")
    assert not (tmp_path / "ran").exists()


@models
@pytest.mark.parametrize("share", [0.02, 0.5, 0.99])
def test_refuses_a_truncated_file(file, make, share):
    saved(file)
    content = file.read_bytes()
    file.write_bytes(content[: int(share * len(content))])
    assert_refused(make(), file, "expected an official GLoRA file, it is damaged or something else")


@models
@pytest.mark.parametrize("content", [torch.ones(3), {"Ad": 3}, {3: torch.ones(3)}, [torch.ones(3)]], ids=str)
def test_refuses_other_contents(file, make, content):
    torch.save(content, file)
    assert_refused(make(), file, "a dict of tensors by name, got something else")


@models
def test_refuses_a_missing_file(file, make):
    assert_refused(make(), file, "expected an official GLoRA file, found none at", FileNotFoundError)


def test_refuses_a_model_on_meta(file):
    saved(file)
    with pytest.raises(ValueError, match="model: expected real tensors, got parameters on meta"):
        load_official(tiny_vit().to("meta"), file)


def test_loading_after_a_refusal_works(file):
    model, tensors = trained(), saved(file)
    assert_refused(model, file, "got 7", configurations=official_configurations()[:7])
    load_official(model, file, official_configurations())
    assert all(torch.equal(p, tensors[name]) for name, p in model.named_parameters() if name in tensors)
    assert len(glora_layers(model)) == 8
