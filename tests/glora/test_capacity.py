"""The claims of docs/capacity.md: sizes of spaces and models, and how many different functions paths are."""

import itertools
import math
import re
from pathlib import Path

import pytest
import torch

import glora
from glora import GLoRALinear, LayerShape, PathConfig, SearchSpace, glora_layers, preset_path
from glora.config import KINDS, count_choice
from glora.paths import sampler_for
from tests.glora.toys import every_path, generator, randomize

HERE = Path(__file__).resolve().parent
PAGE = (HERE.parents[1] / "docs" / "capacity.md").read_text()
RANK = 2
BIAS_KINDS = [(f"lora_{RANK}", "vector", "none"), KINDS["D"], KINDS["E"]]


# -- how many different functions paths are ---------------------------------------------------------


def make_layer(N, K, bias=True, product="hadamard"):
    layer = GLoRALinear(K, N, bias, rank=RANK, product=product, dtype=torch.float64)
    randomize(layer)
    return layer


def directions(layer, path, effective):
    """The matrix of derivatives of a merged parameter by all that a path reads, at random values."""
    layer.path = path
    eye = torch.eye(layer.in_features, dtype=torch.float64)
    zero = torch.zeros(1, layer.in_features, dtype=torch.float64)
    bias = layer(zero)
    output = bias if effective == "bias" else layer(eye) - bias
    read = list(layer.support_parameters(path))
    if not read:
        return torch.zeros(output.numel(), 1, dtype=torch.float64)
    rows = [torch.autograd.grad(value, read, retain_graph=True, allow_unused=True) for value in output.flatten()]
    flat = [[torch.zeros_like(p) if g is None else g for p, g in zip(read, row)] for row in rows]
    return torch.stack([torch.cat([g.flatten() for g in row]) for row in flat])


def projector(matrix):
    """Onto what the columns of ``matrix`` span, as a hashable."""
    left, sizes, _ = torch.linalg.svd(matrix, full_matrices=False)
    basis = left[:, sizes > 1e-9]
    return tuple((basis @ basis.T).round(decimals=6).add(0.0).flatten().tolist())


@pytest.mark.parametrize(
    ("N", "K", "bias", "different"),
    [(7, 3, True, 9), (5, 5, True, 5), (3, 7, True, 5), (7, 3, False, 5), (5, 5, False, 3), (3, 7, False, 3)],
)
def test_27_ways_to_adapt_the_bias_are_so_many_sets(N, K, bias, different):
    """The set of b_eff that a path reaches is b0 plus what its derivatives span: all parts but C are linear, and a low
    rank C reaches every vector."""
    layer = make_layer(N, K, bias)
    paths = [PathConfig("none", "none", *kinds) for kinds in itertools.product(*BIAS_KINDS)]
    assert len(paths) == 27
    assert len({projector(directions(layer, path, "bias")) for path in paths}) == different


@pytest.mark.parametrize("rank", [1, 2])
def test_a_low_rank_c_reaches_what_a_vector_does_and_costs_more(rank):
    layer, x = make_layer(4, 6), torch.randn(3, 6, generator=generator()).double()
    layer.path = PathConfig(C="vector")
    expected = layer(x)
    with torch.no_grad():
        layer.Cu[0] = 1
        layer.Cd[:, 1:] = 0
    layer.path = PathConfig(C=f"lora_{rank}")
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)
    tall = make_layer(7, 4)
    spans = [projector(directions(tall, PathConfig(C=c), "bias")) for c in (f"lora_{rank}", "vector")]
    assert spans[0] == spans[1]
    assert [PathConfig(C=c).count(LayerShape(7, 4)) for c in (f"lora_{rank}", "vector")] == [rank * 5, 4]


def test_a_low_rank_matmul_a_is_a_low_rank_b_where_outputs_are_not_more_than_inputs():
    """W0 Ad = Bd has a solution Ad for every Bd, and the other way round."""
    layer, x = make_layer(4, 6, product="matmul"), torch.randn(3, 6, generator=generator()).double()
    layer.path = PathConfig(B=f"lora_{RANK}")
    expected = layer(x)
    with torch.no_grad():
        layer.Ad.copy_(torch.linalg.pinv(layer.weight) @ layer.Bd)
        layer.Au.copy_(layer.Bu)
    layer.path = PathConfig(A=f"lora_{RANK}")
    torch.testing.assert_close(layer(x), expected, rtol=1e-11, atol=1e-11)


def free(layer, path):
    """In how many directions W_eff can move, at random values."""
    return int(torch.linalg.matrix_rank(directions(layer, path, "weight")))


@pytest.mark.parametrize(("N", "K"), [(9, 8), (8, 9)])
def test_free_directions_of_the_weight(N, K):
    """Those of A and of B add up in the hadamard product; a low rank has r * r fewer than parameters."""
    layer, r = make_layer(N, K), RANK
    expected = {f"lora_{r}": r * (N + K) - r * r, "vector": N, "constant": 1, "none": 0}
    for a, b in itertools.product(expected, expected):
        assert free(layer, PathConfig(a, b)) == expected[a] + expected[b], (a, b)


@pytest.mark.parametrize(("N", "K"), [(9, 8), (8, 9)])
def test_two_low_ranks_of_the_matmul_product_are_no_more_than_one_of_twice_the_rank(N, K):
    layer, r = make_layer(N, K, product="matmul"), RANK
    assert free(layer, PathConfig(f"lora_{r}", f"lora_{r}")) == 2 * r * (N + K) - 4 * r * r
    assert free(layer, PathConfig(B=f"lora_{r}")) == r * (N + K) - r * r


def test_sets_behind_all_paths_of_a_vit_base():
    """At most: 16 ways for the weight, and 9 or 5 for the bias, in two layers each of a block's four."""
    shapes = [(2304, 768), (768, 768), (3072, 768), (768, 3072)]
    sets = math.prod(16 * (9 if N > K else 5) for N, K in shapes) ** 12
    assert sets == (144 * 80) ** 24
    assert (f"{math.log10(sets):.1f}", f"{math.log10(SearchSpace((8,)).count(48)):.1f}") == ("97.5", "126.5")


def test_a_vector_is_the_first_column_of_the_low_rank():
    """And a constant its first element: training one moves the others (weight entanglement)."""
    low_rank = PathConfig(A="lora_2", B="lora_2", C="lora_2")
    vector = PathConfig(A="vector", B="vector", C="vector")
    constant = PathConfig(A="constant", B="constant")
    others = {low_rank: slice(2, None), vector: slice(1, None), constant: slice(1, None)}
    for path, unread in others.items():
        layer, x = make_layer(5, 4), torch.randn(3, 4, generator=generator()).double()
        layer.path = path
        before = layer(x)
        with torch.no_grad():
            for storage in (layer.Ad, layer.Bd, layer.Cd):
                storage[:, unread] += 1
        assert torch.equal(layer(x), before)
        with torch.no_grad():
            layer.Ad[0, 0] += 1
        assert not torch.allclose(layer(x), before)


# -- the paper's arithmetic -------------------------------------------------------------------------


def test_the_papers_numbers_of_paths():
    """Sums where products are meant: 432 * 48; and 82,944 / 48 is no number of paths of two ranks."""
    assert len(every_path(8)) == SearchSpace((8,)).count() == 432
    assert 432 * 48 == 20_736
    assert 82_944 == 4 * 20_736 == 48 * 1_728
    assert SearchSpace((8, 4)).count() == 5 * 5 * 4 * 3 * 3 == 900
    assert f"{48 * math.log10(900):.1f}" == "141.8"


# -- sizes of models --------------------------------------------------------------------------------

SIZES = [row for row in (line.strip("| ").split(" | ") for line in PAGE.splitlines()) if row[0].startswith("`timm:")]


def injected(name, rank):
    import timm

    with torch.device("meta"):
        return glora.inject(timm.create_model(name.strip("`").removeprefix("timm:")), rank)


def millions(count):
    return f"{count / 1e6:.3f}"


@pytest.mark.parametrize("row", SIZES, ids=lambda row: f"{row[0]}-{row[2]}")
def test_sizes_of_models(row):
    """Every figure of the page's table, from the shapes of the models; quantiles from 1,000 draws of seed 0."""
    name, linears, ranks, supernet, mean, quantiles, lora, size = row
    space = SearchSpace(tuple(map(int, ranks.split(", "))))
    model = injected(name, max(space.ranks))
    layers = glora_layers(model)
    sampler, draw = sampler_for(model, space), generator()
    drawn = sorted(sampler.count(sampler.sample(draw)) for _ in range(1000))
    support = sum(p.numel() for layer in layers.values() for p in layer.support_parameters())
    as_lora = dict.fromkeys(layers, preset_path("lora", max(space.ranks)))
    assert len(layers) == int(linears)
    assert (millions(support), millions(sampler.mean)) == (supernet, mean)
    assert f"{millions(drawn[50])} .. {millions(drawn[950])}" == quantiles
    assert millions(glora.count_parameters(model, as_lora)) == lora
    if size != "-":
        limit, share = re.fullmatch(r"([\d.]+): (\d+)%", size).groups()
        assert round(sum(count <= float(limit) * 1e6 for count in drawn) / 10) == int(share)


def test_mean_of_a_vit_base_by_hand():
    """The official formula, averaged over the 432 paths."""
    r, shapes = 8, [(2304, 768), (768, 768), (3072, 768), (768, 3072)]
    mean = sum(2 * (r * (n + k) + n + 1) / 4 + (r * (k + 1) + k) / 3 + 2 * (n + 1) / 3 for n, k in shapes)
    assert sampler_for(injected("vit_base_patch16_224", r), SearchSpace((r,))).mean == pytest.approx(12 * mean)


def test_share_of_low_ranks_of_c_in_a_mean_path():
    """What a limit pays for functions that a vector has too."""
    layers = glora_layers(injected("vit_base_patch16_224", 8)).values()
    of_c = {text: sum(count_choice("C", text, layer.shape) for layer in layers) / 3 for text in ("lora_8", "vector")}
    assert {text: millions(count) for text, count in of_c.items()} == {"lora_8": "0.172", "vector": "0.022"}


def test_the_page_names_tests_that_exist():
    tests = "".join((HERE / file).read_text() for file in ("test_capacity.py", "test_config.py", "test_sampling.py"))
    named = set(re.findall(r"`(test_\w+)`", PAGE))
    assert len(named) > 8
    assert len(SIZES) == 7
    assert named <= set(re.findall(r"^def (test_\w+)", tests, re.M))
