"""Drawing under a limit: always legal, in bounded time, uniform where that is possible."""

import hashlib
import itertools
import operator
import time
from collections import Counter

import pytest
import torch

from glora import LayerShape, PathConfig, SearchSettings, SearchSpace, glora_layers, inject
from glora.evolution.offspring import Offspring
from glora.paths import sampler_for
from glora.sampling import PathSampler
from tests.glora.toys import generator

# The 48 layers of a ViT-B: qkv, proj, fc1 and fc2 of 12 blocks, as (out, in).
SIDES = {"qkv": (2304, 768), "proj": (768, 768), "fc1": (3072, 768), "fc2": (768, 3072)}
VIT_B = {f"blocks.{i}.{name}": LayerShape(*sides) for i in range(12) for name, sides in SIDES.items()}
SMALL = {"fc1": LayerShape(8, 6), "fc2": LayerShape(5, 8, False), "fc3": LayerShape(7, 7, True, "matmul")}
PAPER = SearchSpace((2,))
# Without "none" nothing is free: the smallest path reads 1 + 1 + K + 1 + 1 a layer (K for C).
COSTLY = SearchSpace((2,), **dict.fromkeys("ABDE", ("vector", "constant")), C=("lora", "vector"))


def smallest_costly_count():
    return sum(2 + shape.in_features + shape.bias + 1 for shape in SMALL.values())


def draws(sampler, count, seed=0):
    gen = generator(seed)
    return [sampler.sample(gen) for _ in range(count)]


# -- limits ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ranks", "limit"),
    [((4,), 290_000), ((8,), 440_000), ((4, 2), 440_000), ((8, 4), 860_000), ((8, 4), 50_000), ((8,), 0)],
    ids=str,
)
def test_tight_limits_are_quick_and_always_hold(ranks, limit):
    started = time.process_time()
    sampler = PathSampler(VIT_B, SearchSpace(ranks), limit)
    counts = [sampler.count(paths) for paths in draws(sampler, 200)]
    assert max(counts) <= limit
    assert sum(counts) / len(counts) >= 0.75 * limit  # the budget is used
    assert time.process_time() - started < 10  # it takes 0.2; the official code never ends


@pytest.mark.parametrize("extra", [0, 1, 5, 50])
def test_limits_at_and_just_above_the_smallest_count(extra):
    sampler = PathSampler(SMALL, COSTLY, smallest_costly_count() + extra)
    assert all(sampler.fits(paths) for paths in draws(sampler, 50))


def test_at_the_smallest_count_every_tensor_is_the_cheapest():
    sampler = PathSampler(SMALL, COSTLY, smallest_costly_count())
    kinds = {(path.A, path.B, path.C, path.E) for paths in draws(sampler, 20) for path in paths.values()}
    assert kinds == {("constant", "constant", "vector", "constant")}


def test_refuses_a_limit_that_no_path_meets():
    smallest = smallest_costly_count()
    with pytest.raises(ValueError, match=rf"at least {smallest:,} parameters .*, got {smallest - 1:,}"):
        PathSampler(SMALL, COSTLY, smallest - 1)


def test_no_limit_fits_everything():
    sampler = PathSampler(SMALL, PAPER)
    assert all(sampler.fits(paths) for paths in draws(sampler, 20))


@pytest.fixture(scope="module")
def timm_vit_b():
    """The shapes of timm's ViT-B/16 as it is, without its weights."""
    import timm

    with torch.device("meta"):
        model = inject(timm.create_model("vit_base_patch16_224"), 8)
    return {name: layer.shape for name, layer in glora_layers(model).items()}


@pytest.mark.parametrize(
    ("ranks", "limit", "used"),
    [((8, 4), 860_000, 0.9), ((4, 2), 440_000, 0.9), ((2,), 290_000, 0.9), ((4,), 290_000, 0.85)],
    ids=str,
)
def test_a_first_generation_of_the_papers_budgets_fills_at_once(timm_vit_b, ranks, limit, used):
    """The sizes of the paper's tables, and one at which the official code hangs: 50 different legal candidates, near
    to the limit (the mean of random paths is above it, at 500,000 for rank 4) and all over the space."""
    assert len(timm_vit_b) == 48
    started = time.process_time()
    sampler = PathSampler(timm_vit_b, SearchSpace(ranks), limit)
    drawn = Offspring(sampler, SearchSettings()).first()
    assert time.process_time() - started < 1  # it takes 0.03
    counts = [sampler.count(dict(zip(timm_vit_b, key))) for key in drawn]
    assert len(set(drawn)) == 50
    assert sampler.mean > limit
    assert max(counts) <= limit
    assert used * limit <= sum(counts) / 50
    differing = [sum(map(operator.ne, *pair)) / 48 for pair in itertools.combinations(drawn, 2)]
    assert min(differing) > 0.9
    assert min(len({key[layer] for key in drawn}) for layer in range(48)) >= 40


# -- the distribution ------------------------------------------------------------------------------


def test_draws_are_uniform_without_a_limit():
    counts = Counter(tuple(paths["fc1"].to_dict().items()) for paths in draws(PathSampler(SMALL, PAPER), 12_960))
    assert len(counts) == 432
    assert max(abs(count - 30) for count in counts.values()) < 5 * 30**0.5


def test_a_limit_above_every_path_changes_nothing():
    full = PathConfig("lora_2", "lora_2", "lora_2", "vector", "vector")
    free, limited = PathSampler(SMALL, PAPER), PathSampler(SMALL, PAPER, sum(map(full.count, SMALL.values())))
    assert draws(free, 20) == draws(limited, 20)


def test_a_limit_above_the_mean_keeps_the_uniform_draws_that_fit():
    free = PathSampler(SMALL, PAPER)
    limited = PathSampler(SMALL, PAPER, int(free.mean) + 1)
    kept = 0
    for seed in range(100):
        (uniform,), (drawn,) = draws(free, 1, seed), draws(limited, 1, seed)
        if limited.fits(uniform):
            assert drawn == uniform
            kept += 1
    assert kept > 30


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
def test_draws_of_one_layer_meet_the_limit_on_average(share):
    free = PathSampler(SMALL, PAPER)
    limited, gen = PathSampler(SMALL, PAPER, int(share * free.mean)), generator()
    means = [
        sum(limited.sample_layer(name, gen).count(shape) for _ in range(2_000)) / 2_000 for name, shape in SMALL.items()
    ]
    assert sum(means) == pytest.approx(share * free.mean, rel=0.08)


def test_same_seed_same_draws():
    sampler = PathSampler(SMALL, PAPER, 40)
    assert draws(sampler, 10, seed=3) == draws(sampler, 10, seed=3)
    assert draws(sampler, 10, seed=3) != draws(sampler, 10, seed=4)


# -- repair ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [0, 1, 17, 60, 200])
def test_repair_brings_any_paths_within_the_limit(limit):
    sampler, gen = PathSampler(SMALL, PAPER, limit), generator()
    for paths in draws(PathSampler(SMALL, PAPER), 50):
        assert sampler.count(sampler.repair(paths, gen)) <= limit


def test_repair_only_makes_cheaper():
    sampler = PathSampler(SMALL, PAPER, 60)
    (paths,) = draws(PathSampler(SMALL, PAPER), 1, seed=1)
    repaired = sampler.repair(paths, generator())
    assert sampler.count(paths) > 60
    for name, shape in SMALL.items():
        for slot, kind in repaired[name].to_dict().items():
            old = PathConfig(**{slot: getattr(paths[name], slot)})
            assert kind == getattr(old, slot) or PathConfig(**{slot: kind}).count(shape) < old.count(shape)


@pytest.mark.parametrize("limit", [None, 10_000])
def test_repair_leaves_alone_what_fits(limit):
    (paths,) = draws(PathSampler(SMALL, PAPER), 1)
    given = dict(paths)
    assert PathSampler(SMALL, PAPER, limit).repair(paths, generator()) == given
    assert paths == given


def test_repair_leaves_its_argument_alone():
    (paths,) = draws(PathSampler(SMALL, PAPER), 1)
    given = dict(paths)
    PathSampler(SMALL, PAPER, 0).repair(paths, generator())
    assert paths == given


# -- the means of a study that is not in this repository, drawn there at random ----------------------


def exact_mean(layers, ranks):
    """The mean count of uniform paths, by hand."""

    def mean(costs):
        return sum(costs) / len(costs)

    total = 0.0
    for n, k, bias, _ in layers.values():
        weight = mean([*(r * (n + k) for r in ranks), n, 1, 0])
        prompt = mean([*(r * (k + 1) for r in ranks), k, 0])
        total += 2 * weight + prompt + (1 + bias) * mean([n, 1, 0])
    return total


@pytest.mark.parametrize(
    ("ranks", "millions"), [((2,), 0.310), ((4,), 0.500), ((8,), 0.882), ((4, 2), 0.557), ((8, 4), 1.009)], ids=str
)
def test_mean_path_of_a_vit_b(ranks, millions):
    mean = PathSampler(VIT_B, SearchSpace(ranks)).mean
    assert mean == pytest.approx(exact_mean(VIT_B, ranks))
    assert mean / 1e6 == pytest.approx(millions, rel=0.005)


@pytest.mark.parametrize(
    ("name", "ranks", "millions"),
    [("vit_base_patch16_224", (8,), 0.882), ("swin_base_patch4_window7_224", (8,), 1.188)],
)
def test_mean_path_of_a_model_on_meta(name, ranks, millions):
    import timm

    with torch.device("meta"):
        model = inject(timm.create_model(name), max(ranks))
    mean = sampler_for(model, SearchSpace(ranks)).mean
    assert mean == pytest.approx(exact_mean({n: layer.shape for n, layer in glora_layers(model).items()}, ranks))
    assert mean / 1e6 == pytest.approx(millions, rel=0.005)


# -- without creating biases -----------------------------------------------------------------------


@pytest.mark.parametrize("limit", [None, 60])
def test_a_bias_free_space_stays_so_in_every_draw_and_every_offspring(limit):
    space = SearchSpace((2,), C=("lora", "vector"), bias_free=True)
    sampler = PathSampler(SMALL, space, limit)
    biasless = [name for name, shape in SMALL.items() if not shape.bias]
    offspring = Offspring(sampler, SearchSettings(population=20, crossover=20, mutation=20, mutation_probability=0.9))
    first = offspring.first()
    candidates = [dict(zip(SMALL, key)) for key in first + offspring.next(first[:5])]
    gen = generator()
    candidates += draws(sampler, 50) + [sampler.repair(paths, gen) for paths in draws(PathSampler(SMALL, space), 50)]
    assert len(candidates) > 100
    for paths in candidates:
        assert all(paths[name] == paths[name].without_bias() for name in biasless)
        assert all(path.makes_bias for name, path in paths.items() if name not in biasless)
    assert not sampler.sample_layer("fc2", gen).makes_bias


def test_a_bias_free_space_counts_what_its_paths_can_read():
    counted = PathSampler({"fc2": SMALL["fc2"]}, SearchSpace((2,), bias_free=True))
    one = [path.count(SMALL["fc2"]) for a in PAPER.options["A"] for path in [PathConfig(a), PathConfig("none", a)]]
    assert (counted.smallest, counted.mean) == (0, pytest.approx(sum(one) / 4))


# -- repetition ------------------------------------------------------------------------------------


def test_the_draws_of_a_seed_stay_what_they_were():
    """Checkpoints and journals hold the state of a generator, and go on with another version of this package."""
    digest, gen = hashlib.sha256(), generator(7)
    for space in (PAPER, COSTLY, SearchSpace((8, 2, 4), A=("none", "lora"), bias_free=True)):
        for limit in (None, 200, 60):
            sampler = PathSampler(SMALL, space, limit)
            digest.update(repr([*draws(sampler, 20), sampler.sample_layer("fc2", gen)]).encode())
        digest.update(repr(space.sample_many(20, gen, bias=False)).encode())
    assert digest.hexdigest()[:16] == "394c3bde0c40c6a4"
