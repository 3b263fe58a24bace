"""Paths and spaces: spelling, JSON, counts, uniform draws."""

import dataclasses
import json
import math
import pickle
from collections import Counter

import pytest
import torch

from glora import GLoRALinear, LayerShape, PathConfig, SearchSpace
from glora.config import SLOTS, make_path
from tests.glora.toys import every_path, generator

SHAPES = [
    LayerShape(out_features, in_features, bias, product)
    for out_features, in_features in ((7, 5), (4, 9))
    for bias in (True, False)
    for product in ("hadamard", "matmul")
]
SHAPE_IDS = ["-".join(map(str, shape)) for shape in SHAPES]


# -- PathConfig ------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["lora_8", "LoRA_8", "LORA_8", "lora_08"])
def test_spellings_of_a_rank_are_one(text):
    path = PathConfig(A=text)
    assert path.A == "lora_8"
    assert path == PathConfig(A="lora_8")
    assert hash(path) == hash(PathConfig(A="lora_8"))


def test_default_is_none_throughout():
    assert PathConfig().to_dict() == dict.fromkeys("ABCDE", "none")


def test_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        PathConfig().A = "vector"


@pytest.mark.parametrize(
    ("kinds", "rank"),
    [({}, 0), ({"A": "lora_3"}, 3), ({"A": "lora_3", "B": "lora_5", "C": "lora_4"}, 5), ({"D": "vector"}, 0)],
)
def test_rank_is_the_largest(kinds, rank):
    assert PathConfig(**kinds).rank == rank


@pytest.mark.parametrize(
    ("slot", "text"),
    [
        ("A", "dense"),
        ("B", ""),
        ("A", "lora"),
        ("A", "lora_0"),
        ("B", "lora_-1"),
        ("B", "lora_1.5"),
        ("C", "lora_0"),
        ("C", "constant"),
        ("D", "lora_4"),
        ("E", "lora_4"),
        ("E", " vector"),
    ],
)
def test_refuses_a_kind_it_does_not_have(slot, text):
    with pytest.raises(ValueError, match=rf"^{slot}: expected one of .*; got {text!r}$"):
        PathConfig(**{slot: text})


@pytest.mark.parametrize("value", [None, 8, ("lora", 8), b"vector"])
def test_refuses_what_is_no_string(value):
    with pytest.raises(TypeError, match=f"^B: expected a string .* got {type(value).__name__}$"):
        PathConfig(B=value)


def through_json(path):
    return PathConfig.from_json(path.to_json())


def through_pickle(path):
    return pickle.loads(pickle.dumps(path))


@pytest.mark.parametrize("copy", [through_json, through_pickle])
def test_survives_a_round_trip(copy):
    assert all(copy(path) == path for path in every_path(4))


def test_json_is_plain():
    path = PathConfig(A="LoRA_4", C="vector")
    assert json.loads(path.to_json()) == {"A": "lora_4", "B": "none", "C": "vector", "D": "none", "E": "none"}


@pytest.mark.parametrize(
    "text",
    ['{"A": "none"}', '{"A":"none","B":"none","C":"none","D":"none","E":"none","F":"none"}', "[]", '"lora_8"', "{"],
    ids=["missing", "unknown", "list", "string", "cut"],
)
def test_refuses_other_json(text):
    with pytest.raises(ValueError):
        PathConfig.from_json(text)


# -- how many parameters a path reads --------------------------------------------------------------


def literal_count(path: PathConfig, shape: LayerShape) -> int:
    """As the official code counts, from the shapes of the storages."""
    n, k, r = shape.out_features, shape.in_features, 3
    rows = n if shape.product == "hadamard" else k
    return (
        {"lora_3": rows * r + r * k, "vector": rows, "constant": 1, "none": 0}[path.A]
        + {"lora_3": n * r + r * k, "vector": n, "constant": 1, "none": 0}[path.B]
        + {"lora_3": k * r + r, "vector": k, "none": 0}[path.C]
        + {"vector": n, "constant": 1, "none": 0}[path.D] * shape.bias
        + {"vector": n, "constant": 1, "none": 0}[path.E]
    )


@pytest.mark.parametrize("shape", SHAPES, ids=SHAPE_IDS)
def test_counts_every_path(shape):
    wrong = [path for path in every_path(3) if path.count(shape) != literal_count(path, shape)]
    assert not wrong


@pytest.mark.parametrize("d", ["vector", "constant"])
def test_d_of_a_layer_without_bias_counts_nothing(d):
    """It has nothing to scale; C and E count as ever, though they make a bias."""
    shape = LayerShape(7, 5, bias=False)
    assert PathConfig(D=d).count(shape) == 0
    assert PathConfig(C="vector", D=d, E="vector").count(shape) == 5 + 7


@pytest.mark.parametrize("product", ["hadamard", "matmul"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_counts_the_elements_that_are_read(bias, product):
    """On all 432 paths: every one counted moves the output, and NaN in all others changes no bit of it."""
    layer, gen = GLoRALinear(5, 7, bias, rank=3, product=product, dtype=torch.float64), generator()
    support = list(layer.support_parameters())
    x, dy, values = torch.randn(4, 5, generator=gen).double(), torch.randn(4, 7, generator=gen).double(), {}
    for storage in support:
        values[storage] = torch.randn(storage.shape, generator=gen).double()
    wrong = []
    for path in every_path(2):
        layer.path = path
        for storage in support:
            storage.data = values[storage].clone()
        y = layer(x)
        moves = [torch.zeros_like(storage, dtype=torch.bool) for storage in support]
        if y.requires_grad:
            gradients = torch.autograd.grad(y, support, dy, allow_unused=True)
            moves = [move if g is None else g != 0 for move, g in zip(moves, gradients)]
        for storage, move in zip(support, moves):
            storage.data[~move] = torch.nan
        if sum(int(move.sum()) for move in moves) != path.count(layer.shape) or not torch.equal(layer(x), y):
            wrong.append(path)
    assert not wrong


# -- SearchSpace -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("ranks", "count"), [((8,), 432), ((8, 4), 900), ((8, 4, 2), 1620)])
def test_size_of_the_papers_space(ranks, count):
    assert SearchSpace(ranks).count() == count
    assert SearchSpace(ranks).count(layers=3) == count**3


def test_size_for_a_vit_base_is_exact():
    """48 layers, in Python's integers: a number of 127 digits, and one of 142 for two ranks."""
    assert SearchSpace((8,)).count(48) == 432**48 == (2**4 * 3**3) ** 48
    assert SearchSpace((8, 4)).count(48) == 900**48 == 30**96
    assert [len(str(SearchSpace(ranks).count(48))) for ranks in ((8,), (8, 4))] == [127, 142]


@pytest.mark.parametrize("ranks", [(8,), (8, 4)])
def test_size_is_the_number_of_different_paths(ranks):
    space = SearchSpace(ranks)
    paths = {make_path(*options) for options in _product(space)}
    assert len(paths) == space.count()


def test_options_are_the_432_paths():
    space = SearchSpace((2,))
    assert [make_path(a, b, c, d, e) for a, b, c, d, e in _product(space)] == every_path(2)


def _product(space):
    rows = [()]
    for slot in SLOTS:
        rows = [(*row, option) for row in rows for option in space.options[slot]]
    return rows


def test_spells_every_rank_out():
    assert SearchSpace((8, 4), A=("LoRA", "none")).options["A"] == ("lora_8", "lora_4", "none")


def test_takes_lists():
    assert SearchSpace([8, 4], A=["vector"]) == SearchSpace((8, 4), A=("vector",))


@pytest.mark.parametrize("ranks", [(), (0,), (-2,), (8, 8), (4.0,), (True,), ("8",)], ids=str)
def test_refuses_ranks(ranks):
    with pytest.raises(ValueError, match=r"^ranks: expected distinct integers from 1"):
        SearchSpace(ranks)


@pytest.mark.parametrize(
    "kinds",
    [
        {"A": ()},
        {"A": ("lora", "lora")},
        {"A": ("lora", "LoRA")},
        {"B": ("dense",)},
        {"C": ("constant",)},
        {"D": ("lora",)},
        {"E": "vector"},
        {"A": (1,)},
    ],
    ids=str,
)
def test_refuses_kinds(kinds):
    (slot,) = kinds
    with pytest.raises(ValueError, match=rf"^{slot}: expected distinct kinds out of"):
        SearchSpace(**kinds)


def test_space_survives_json():
    space = SearchSpace((8, 2), A=("lora", "none"), E=("constant",))
    assert SearchSpace.from_dict(json.loads(json.dumps(space.to_dict()))) == space


# -- a space whose paths create no bias --------------------------------------------------------------


def test_a_bias_free_space_differs_in_layers_without_a_bias_alone():
    space = SearchSpace((8,), bias_free=True)
    assert space.options_for(bias=True) == SearchSpace((8,)).options
    assert {slot: space.options_for(bias=False)[slot] for slot in "CDE"} == dict.fromkeys("CDE", ("none",))
    assert (space.count(2), space.count(2, bias=False), SearchSpace((8,)).count(2, bias=False)) == (432**2, 256, 432**2)
    assert not any(path.makes_bias for path in space.sample_many(100, generator(), bias=False))
    assert any(path.makes_bias for path in space.sample_many(100, generator()))


def test_a_bias_free_space_draws_its_paths_uniformly():
    draws = 8_000
    counts = Counter(SearchSpace((8,), bias_free=True).sample_many(draws, generator(), bias=False))
    assert len(counts) == 16
    assert abs(chi_square_in_sigmas(counts.values(), 16, draws)) < 4


def test_a_bias_free_space_need_not_allow_none_elsewhere():
    space = SearchSpace((2,), C=("vector",), E=("vector",), bias_free=True)
    assert space.sample(generator(), bias=False).without_bias() == space.sample(generator(), bias=False)
    assert space.sample(generator()).E == "vector"


def test_a_bias_free_space_survives_json_and_others_are_written_as_ever():
    space = SearchSpace((8, 2), bias_free=True)
    assert SearchSpace.from_dict(json.loads(json.dumps(space.to_dict()))) == space
    assert list(SearchSpace().to_dict()) == ["ranks", "A", "B", "C", "D", "E"]


@pytest.mark.parametrize("value", [1, "yes", None])
def test_refuses_a_bias_free_that_is_no_bool(value):
    with pytest.raises(TypeError, match="bias_free: expected True or False, got"):
        SearchSpace(bias_free=value)


# -- drawing ---------------------------------------------------------------------------------------


def chi_square_in_sigmas(counts, cells, draws):
    """How far Pearson's statistic of a uniform draw lies from its mean, in standard deviations."""
    expected = draws / cells
    statistic = sum((count - expected) ** 2 for count in counts) / expected + (cells - len(counts)) * expected
    return (statistic - (cells - 1)) / math.sqrt(2 * (cells - 1))


def test_draws_all_paths_uniformly():
    draws = 43_200
    counts = Counter(SearchSpace((8,)).sample_many(draws, generator()))
    assert abs(chi_square_in_sigmas(counts.values(), 432, draws)) < 4


@pytest.mark.parametrize("slot", SLOTS)
def test_draws_the_options_of_a_tensor_uniformly(slot):
    space, draws = SearchSpace((8, 4)), 20_000
    counts = Counter(getattr(path, slot) for path in space.sample_many(draws, generator()))
    assert set(counts) == set(space.options[slot])
    assert chi_square_in_sigmas(counts.values(), len(space.options[slot]), draws) < 4


def test_same_seed_same_draws():
    space = SearchSpace()
    assert space.sample_many(20, generator(3)) == space.sample_many(20, generator(3))
    assert space.sample_many(20, generator(3)) != space.sample_many(20, generator(4))


def test_one_draw_after_another_equals_many_at_once():
    space, gen = SearchSpace(), generator()
    assert [space.sample(gen) for _ in range(5)] == space.sample_many(5, generator())
