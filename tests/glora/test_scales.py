"""Scales of kinds: what a layer computes under them, and that no file, copy or graph loses them."""

import copy
import itertools
import pickle

import pytest
import torch

import glora
from glora import PathConfig, Scales, SearchSpace
from glora.config import KINDS
from tests.glora.toys import (
    IN_FEATURES,
    adapted_mlp,
    every_path,
    generator,
    points,
    same_bits,
    seeded,
    state,
    trained_mlp,
    unchanged,
)

SPACE = SearchSpace((2, 1))
# every kind has another factor, none of them a power of two
FACTORS = {
    slot: {kind: 0.3 + 0.7 * i + 0.1 * j for j, kind in enumerate(kinds) if kind != "none"}
    for i, (slot, kinds) in enumerate(KINDS.items())
}
ALL = Scales(**FACTORS)
POWERS = Scales(
    A={"lora": 4.0, "vector": 0.5}, B={"vector": 2**-5, "constant": 2**-4}, C={"lora": 0.5}, E={"vector": 8.0}
)


def scaled(scales=ALL, **options):
    model = trained_mlp(**options)
    for layer in glora.glora_layers(model).values():
        layer.scales = scales
    return model


def inputs():
    return torch.randn(7, IN_FEATURES, generator=generator(3))


def formula(layer, path, x):
    """y in fp64, written out with the scales, for the hadamard and the matmul product."""
    W, b = layer.weight.double(), layer.bias.double()
    parts = {name: getattr(layer, name).detach().double() for name in ("Ad", "Au", "Bd", "Bu", "Cd", "Cu", "D", "E")}

    def read(slot, text, shape):
        kind, _, rank = text.partition("_")
        if kind == "none":
            return torch.zeros(shape, dtype=torch.float64)
        left = parts[slot if slot in "DE" else f"{slot}d"]
        if kind == "lora":
            value = left[:, : int(rank)] @ parts[f"{slot}u"][: int(rank)]
        elif kind == "vector":
            value = left[:, :1] if left.dim() == 2 else left[:, None]
        else:
            value = left.reshape(-1)[:1, None]
        return FACTORS[slot][kind] * value.expand(shape)

    rows, columns = W.shape
    B, C, D, E = (
        read(s, getattr(path, s), shape)
        for s, shape in {"B": (rows, columns), "C": (columns, 1), "D": (rows, 1), "E": (rows, 1)}.items()
    )
    if layer.product == "hadamard":
        weight = W + W * read("A", path.A, (rows, columns)) + B
    else:
        A = read("A", path.A, (columns, columns)) if path.A.startswith("lora") else None
        if A is None:
            A = torch.diag(read("A", path.A, (columns, 1))[:, 0])
        weight = W + W @ A + B
    bias = b + b * D[:, 0] + E[:, 0] + (W @ C)[:, 0]
    return x.double() @ weight.t() + bias


@pytest.mark.parametrize("product", ["hadamard", "matmul"])
def test_every_path_computes_the_formula(product):
    layer = scaled(product=product, dtype=torch.float64).fc1
    x = inputs().double()
    for path in every_path(2):
        layer.path = path
        expected = formula(layer, path, x)
        for y in (layer(x), layer(x), layer.merge()(x), layer.exact(x)):
            torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-9, msg=str(path))


def test_gradients_are_those_of_the_formula():
    layer = scaled(dtype=torch.float64).fc1
    x = inputs().double()
    for path in every_path(2)[::7]:
        layer.path = path
        names = [name for name, parameter in layer.named_parameters() if parameter.requires_grad]
        found = torch.autograd.grad(layer(x).square().sum(), [getattr(layer, n) for n in names], allow_unused=True)
        twin = copy.deepcopy(layer)
        folded = {}
        for slot, choice, (left, *_) in path.read:
            folded[left] = FACTORS[slot][choice.kind]
        glora.fold_scales(twin_model := torch.nn.Sequential(twin))
        plain = torch.autograd.grad(twin_model(x).square().sum(), [getattr(twin, n) for n in names], allow_unused=True)
        for name, one, other in zip(names, found, plain):
            assert (one is None) == (other is None), name
            if one is not None:
                torch.testing.assert_close(
                    one, other * folded.get(name, 1.0), rtol=1e-9, atol=1e-9, msg=f"{path} {name}"
                )


def test_scales_of_one_are_the_bits_of_before():
    x, model, other = inputs(), trained_mlp(), scaled(Scales(A={"lora": 1}, E={"vector": 1.0}))
    assert torch.equal(model(x), other(x)) and same_bits(state(model), state(other))
    assert other.fc1.scales == Scales() and repr(model) == repr(other)
    other.fc1.scales = ALL
    other.fc1.scales = Scales()
    assert torch.equal(model(x), other(x))


def test_a_compiled_graph_serves_every_path():
    model, graphs = scaled(), []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    x, compiled = inputs(), torch.compile(model, backend=backend)
    gen = generator(1)
    for _ in range(6):
        glora.set_paths(model, glora.sample_paths(model, SPACE, gen))
        torch.testing.assert_close(compiled(x), model(x))
    assert len(graphs) == 1


def test_copies_and_pickles_have_them():
    model, x = scaled(), inputs()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), copy.copy(model)):
        assert torch.equal(other(x), model(x)) and other.fc2.scales == ALL
    other = copy.deepcopy(model)
    other.fc1.scales = Scales()
    assert model.fc1.scales == ALL


@pytest.mark.parametrize("compact", [False, True])
def test_adapter_files(tmp_path, compact):
    model, x, file = scaled(), inputs(), tmp_path / "a.safetensors"
    glora.save_adapter(model, file, compact=compact)
    plain, before = adapted_mlp(), scaled(Scales(A={"lora": 7.0}), seed=5)
    for other in (plain, before):
        glora.load_adapter(other, file)
        torch.testing.assert_close(other(x), model(x), rtol=1e-5, atol=1e-6)
        assert other.fc1.scales == (Scales() if compact else ALL)
    if not compact:  # the whole supernet: other paths too
        for path in every_path(2)[::29]:
            for each in (model, plain):
                glora.set_paths(each, path)
            assert torch.equal(plain(x), model(x))


def test_an_adapter_file_without_scales_is_as_before(tmp_path):
    glora.save_adapter(trained_mlp(), tmp_path / "a")
    glora.save_adapter(scaled(Scales()), tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    other = glora.load_adapter(scaled(), tmp_path / "a")
    assert other.fc1.scales == Scales()


def test_an_adapter_file_with_damaged_scales_is_refused(tmp_path):
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    glora.save_adapter(scaled(), file := tmp_path / "a")
    with safe_open(file, "pt") as opened:
        text = opened.metadata()["glora"]
    for good, bad in (('"lora": 0.3', '"lora": 0'), ('"vector"', '"wrong"'), ('"scales": {"fc1"', '"scales": {"fc9"')):
        assert good in text
        save_file(load_file(file), tmp_path / "b", {"glora": text.replace(good, bad, 1)})
        model = adapted_mlp()
        with unchanged(model), pytest.raises(ValueError, match="its description is damaged"):
            glora.load_adapter(model, tmp_path / "b")


def test_state_dicts_carry_them():
    model, other = scaled(), scaled(Scales(), seed=4)
    other.load_state_dict(model.state_dict())
    assert other.fc2.scales == ALL and torch.equal(other(inputs()), model(inputs()))
    other.load_state_dict(trained_mlp().state_dict())
    assert other.fc2.scales == Scales()


@pytest.mark.parametrize("scales", [ALL, POWERS], ids=["any", "powers of two"])
def test_folding(scales):
    model, x = scaled(scales), inputs()
    y = model(x)
    for path in (None, *every_path(2)[::13]):
        if path is not None:
            glora.set_paths(model, path)
            y = model(x)
        folded = glora.fold_scales(copy.deepcopy(model))
        assert folded.fc1.scales == Scales()
        if scales is POWERS:
            assert torch.equal(folded(x), y)
        torch.testing.assert_close(folded(x), y, rtol=1e-5, atol=1e-6)


def test_the_official_file_has_them_folded(tmp_path):
    model, x, file = scaled(), inputs(), tmp_path / "official.pt"
    glora.save_official(model, file)
    other = glora.load_official(adapted_mlp(), file, [path.to_dict() for path in glora.get_paths(model).values()])
    torch.testing.assert_close(other(x), model(x), rtol=1e-5, atol=1e-6)
    assert model.fc1.scales == ALL


def test_lycoris_files_have_them_folded(tmp_path):
    model = scaled(product="matmul")
    glora.set_paths(model, PathConfig(A="lora_2", B="lora_1"))
    glora.save_lycoris(model, tmp_path / "l.safetensors", adapters_only=True)
    other = glora.load_lycoris(scaled(product="matmul", seed=3), tmp_path / "l.safetensors")
    other.head.load_state_dict(model.head.state_dict())
    torch.testing.assert_close(other(inputs()), model(inputs()), rtol=1e-5, atol=1e-6)


def test_peft_adapters_have_them_folded(tmp_path):
    model = scaled()
    glora.set_paths(model, PathConfig("lora_2", "lora_2", "vector", "constant", "constant"))
    glora.peft.export_peft(model, tmp_path)
    other = glora.peft.import_peft(scaled(POWERS, seed=3), tmp_path)
    torch.testing.assert_close(other(inputs()), model(inputs()), rtol=1e-5, atol=1e-6)


def test_lora_exports_have_them_folded(tmp_path):
    model = scaled()
    glora.set_paths(model, PathConfig(B="lora_2"))
    one = glora.export_lora(model, tmp_path / "scaled")
    other = glora.export_lora(glora.fold_scales(model), tmp_path / "folded")
    assert one.to_dict() == other.to_dict()


def test_presets_start_without_them():
    model = scaled()
    glora.apply_preset(model, "lora", 2)
    assert model.fc1.scales == Scales()


def test_data_parallel_replicas_have_them():
    layer = scaled().fc1
    replica = layer._replicate_for_data_parallel()
    assert replica.scales == ALL


def test_a_search_tells_them_apart(tmp_path):
    options = {"settings": glora.SearchSettings(4, 2, 2, 2, generations=1), "progress": False, "metric": "loss"}
    glora.search(scaled(), SPACE, points(), journal=tmp_path / "j", **options)
    shares = SearchSpace((2, 1), shares={"lora": 0.5})  # which a search does not read
    assert glora.search(scaled(), shares, points(), journal=tmp_path / "j", **options).evaluated == 0
    swapped = scaled(Scales())
    swapped.fc1.scales, other = ALL, scaled(Scales())
    other.fc2.scales = ALL
    glora.search(swapped, SPACE, points(), journal=tmp_path / "k", **options)
    for file, model in (("j", scaled(POWERS)), ("k", other)):
        with pytest.raises(ValueError, match="journal of another search"):
            glora.search(model, SPACE, points(), journal=tmp_path / file, **options)


def test_the_repr_shows_those_of_the_path():
    layer = scaled(Scales(A={"lora": 8}, B={"vector": 1 / 16})).fc1
    layer.path = PathConfig(A="lora_2", B="vector", E="vector")
    assert "A=lora_2 * 8, B=vector * 0.0625, E=vector)" in repr(layer)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"A": {"none": 2}}, "A: expected factors by kinds out of"),
        ({"D": {"lora": 2}}, "D: expected factors by kinds out of"),
        ({"A": 2}, "A: expected factors by kinds out of"),
        ({"B": {"lora": 0}}, "B: expected a finite factor other than 0 for 'lora', got 0"),
        ({"B": {"lora": float("inf")}}, "B: expected a finite factor"),
        ({"B": {"lora": True}}, "B: expected a finite factor"),
        ({"B": {"lora": "2"}}, "B: expected a finite factor"),
        ({"B": {"lora": 10**400}}, "B: expected a finite factor"),
    ],
)
def test_bad_scales(arguments, message):
    with pytest.raises(ValueError, match=message):
        Scales(**arguments)
    layer = adapted_mlp().fc1
    with pytest.raises(TypeError, match=r"scales: expected glora\.Scales, got dict"):
        layer.scales = arguments


def test_as_data():
    assert Scales.from_dict(ALL.to_dict()) == ALL and hash(Scales.from_dict(ALL.to_dict())) == hash(ALL)
    assert Scales().to_dict() == {}
    with pytest.raises(ValueError, match="scales: expected factors by tensors"):
        Scales.from_dict({"F": {}})


def test_shares_say_how_often_a_kind_is_drawn():
    model, gen = adapted_mlp(), generator()
    space = SearchSpace((2, 1), shares={"lora": 0.5})
    drawn = [path for _ in range(2000) for path in glora.sample_paths(model, space, gen).values()]
    for slot, others in {"A": 3, "B": 3, "C": 2}.items():
        texts = [getattr(path, slot) for path in drawn]
        for text in space.options[slot]:
            expected = 0.25 if text.startswith("lora") else 0.5 / others
            assert abs(texts.count(text) / len(texts) - expected) < 0.03, (slot, text)
    for slot in "DE":
        texts = [getattr(path, slot) for path in drawn]
        assert all(abs(texts.count(text) / len(texts) - 1 / 3) < 0.03 for text in space.options[slot])


def test_the_search_does_not_read_shares():
    model, count = adapted_mlp(), 60
    one, other = (
        glora.sample_paths(model, SearchSpace((2, 1), shares=shares), generator(2), limit=count)
        for shares in ({}, {"lora": 0.9})
    )
    assert one == other


def test_without_shares_the_draw_is_as_before():
    model = adapted_mlp()
    ordinary = [glora.sample_paths(model, SPACE, generator(s)) for s in range(5)]
    assert ordinary == [glora.sample_paths(model, SearchSpace((2, 1), shares={}), generator(s)) for s in range(5)]


def test_a_share_of_all_there_is():
    gen, space = generator(), SearchSpace((1,), A=("lora",), B=("lora", "vector"), shares={"lora": 0.75, "vector": 0.2})
    drawn = [glora.sample_paths(adapted_mlp(rank=1), space, gen)["fc1"] for _ in range(400)]
    assert {path.A for path in drawn} == {"lora_1"}
    assert abs(sum(path.B == "vector" for path in drawn) / 400 - 0.2 / 0.95) < 0.06


@pytest.mark.parametrize(
    "shares", [{"other": 0.5}, {"lora": 1.0}, {"lora": 0}, {"lora": 0.5, "none": 0.5}, {"lora": "0.5"}, 0.5]
)
def test_bad_shares(shares):
    with pytest.raises(ValueError, match="shares: expected numbers"):
        SearchSpace(shares=shares)


def test_a_space_with_shares_as_data():
    space = SearchSpace((2,), shares={"lora": 0.5})
    assert SearchSpace.from_dict(space.to_dict()) == space and hash(space) != hash(SearchSpace((2,)))
    assert "shares" not in SearchSpace((2,)).to_dict()


def test_graphs_read_them_as_data():
    with seeded():
        model = adapted_mlp()
    balanced = copy.deepcopy(model)
    for layer in glora.glora_layers(balanced).values():
        layer.scales = POWERS
    x, y = points().tensors
    optimizer = torch.optim.AdamW(glora.trainable_parameters(balanced), lr=0.05)
    plain = copy.deepcopy(balanced)
    other = torch.optim.AdamW(glora.trainable_parameters(plain), lr=0.05)
    for mode in ("piecewise", "whole"):
        step = glora.GraphedStep(balanced, optimizer, torch.nn.functional.cross_entropy, SPACE, mode=mode)
        gen = generator(1)
        for _ in range(8):
            paths = glora.sample_paths(balanced, SPACE, gen)
            loss = step(x, y, paths)
            glora.set_paths(plain, paths)
            other.zero_grad()
            expected = torch.nn.functional.cross_entropy(plain(x), y)
            expected.backward()
            glora.drop_unread_gradients(plain)
            other.step()
            torch.testing.assert_close(loss, expected.detach(), rtol=1e-5, atol=1e-6)
    unscaled = copy.deepcopy(model)
    step = glora.GraphedStep(
        unscaled, torch.optim.AdamW(glora.trainable_parameters(unscaled)), torch.nn.functional.cross_entropy, SPACE
    )
    unscaled.fc1.scales = POWERS
    with pytest.raises(RuntimeError, match="expected scales of 1, as when this step was made"):
        step(x, y, glora.sample_paths(unscaled, SPACE, generator()))


def test_kinds_are_complete():
    assert set(itertools.chain.from_iterable(KINDS.values())) == {"lora", "vector", "constant", "none"}


def test_copies_do_not_carry_what_is_kept_for_paths():
    model, before = scaled(), len(pickle.dumps(scaled()))
    for path in every_path(2):
        glora.set_paths(model, path)
    glora.set_paths(model, glora.get_paths(scaled()))
    assert len(pickle.dumps(model)) < before + 200


def test_factors_are_on_the_cpu_whatever_the_defaults():
    model = adapted_mlp()
    with torch.device("meta"):
        model.fc1.scales = ALL
    assert model.fc1._factors.device.type == "cpu" and model.fc1._factors.dtype == torch.float64
