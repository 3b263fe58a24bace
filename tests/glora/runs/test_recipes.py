"""Recipes as data: the paper's settings, changes, and what is refused."""

import math

import pytest

from glora import SearchSettings, SearchSpace
from glora.protocols import protocol
from glora.runs import change_recipe, known_recipes, load_recipe, plan_runs, recipe_from_dict
from glora.runs.recipes import RunRecipe
from glora.runs.spec import spec_from_dict

SMALL = """
protocol = "vtab1k"
[model]
name = "vit_tiny_patch16_224"
[images]
size = 32
[training]
epochs = 2
batch_size = 4
lr = 1e-3
[training.lr_of]
dtd = 5e-4
[sizes.tiny]
ranks = [2]
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "small.toml"
    path.write_text(SMALL)
    return path


def test_there_is_one_for_each_protocol():
    assert {name: load_recipe(name).protocol for name in known_recipes()} == {
        "vtab1k": "vtab1k",
        "fewshot": "fewshot",
        "imagenet": "imagenet",
    }


@pytest.mark.parametrize("name", ["vtab1k", "fewshot", "imagenet"])
def test_the_papers_settings(name):
    recipe = load_recipe(name)
    assert [(size.ranks, size.limit) for size in recipe.sizes.values()] == [
        ((8, 4), 860_000),
        ((4, 2), 440_000),
        ((2,), 290_000),
    ]
    assert recipe.search == SearchSettings()  # whose defaults are the paper's
    assert (recipe.training.epochs, recipe.training.batch_size, recipe.training.warmup_epochs) == (500, 64, 10)
    assert (recipe.training.weight_decay, recipe.model.drop_path, recipe.metric) == (1e-4, 0.1, "accuracy")


def test_a_recipe_can_ask_for_paths_that_create_no_bias(file):
    recipe = load_recipe(str(file), ["model.bias_free=true"])
    assert recipe_from_dict(recipe.to_dict()) == recipe
    (run,) = plan_runs(recipe, ".", datasets=["dtd"])
    assert run.space == SearchSpace((2,), bias_free=True)
    assert spec_from_dict(run.to_dict()).space == run.space
    assert plan_runs(load_recipe(str(file)), ".", datasets=["dtd"])[0].space == SearchSpace((2,))
    with pytest.raises(ValueError, match="bias_free: expected true or false, got 'no'"):
        load_recipe(str(file), ["model.bias_free=no"])


def test_few_shot_runs_and_augmentation():
    fewshot, imagenet, vtab = (load_recipe(name) for name in ("fewshot", "imagenet", "vtab1k"))
    assert (fewshot.shots, fewshot.seeds) == ((1, 2, 4, 8, 16), (0, 1, 2))
    assert (imagenet.shots, imagenet.seeds) == ((16,), (0,))
    assert vtab.shots == ()
    assert [recipe.images.augment for recipe in (fewshot, imagenet, vtab)] == [True, True, False]


def test_epochs_become_steps():
    steps = load_recipe("vtab1k").training.recipe("cifar", samples=800, seed=3)
    assert steps.steps == pytest.approx(500 * 800 / 64, rel=0.05)
    assert steps.warmup * steps.steps == pytest.approx(10 * 800 / 64, rel=0.05)
    assert (steps.batch_size, steps.seed, steps.lr) == (64, 3, 1e-4)


def test_a_learning_rate_of_one_data_set(file):
    training = load_recipe(str(file)).training
    assert [training.recipe(name, 8, 0).lr for name in ("dtd", "svhn", None)] == [5e-4, 1e-3, 1e-3]


@pytest.mark.parametrize("name", ["vtab1k", "fewshot", "imagenet"])
def test_there_and_back(name):
    dataset = protocol(name).datasets[-1]
    recipe = load_recipe(name, ["training.amp=bfloat16", f"training.lr_of.{dataset}=5e-4"])
    assert recipe_from_dict(recipe.to_dict()) == recipe
    assert isinstance(recipe, RunRecipe)


def test_changes(file):
    recipe = load_recipe(
        str(file),
        [
            "training.epochs=7",
            "model.name=vit_small_patch16_224",
            "model.options.depth = 3",
            'sizes."1.5M".ranks=[16]',
            "metric = 'loss'",
        ],
    )
    assert (recipe.training.epochs, recipe.model.name, recipe.metric) == (7, "vit_small_patch16_224", "loss")
    assert recipe.model.options == {"depth": 3}
    assert list(recipe.sizes) == ["tiny", "1.5M"]
    assert recipe.sizes["1.5M"].ranks == (16,)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("training.epoch=7", r"training: missing \[\], unknown \['epoch'\]"),
        ("training.epochs=many", "epochs"),
        ("training.lr=-1", "lr > 0"),
        ("training.lr_of=3", "lr_of: expected learning rates by data set"),
        ("training.amp=float8", "amp"),
        ("training.workers=-1", "workers: expected an integer from 0"),
        ("sizes.tiny.ranks=[0]", "sizes.tiny: ranks: expected distinct integers"),
        ("sizes.tiny.limit=-2", "sizes.tiny: limit: expected a number of parameters"),
        ("search.population=0", "search: population: expected an integer from 1"),
        ("search.seed=abc", "search: seed: expected an integer from 0, got 'abc'"),
        ("metric=f1", "metric: expected 'accuracy' or 'loss'"),
        ("protocol=cifar10", "vtab1k.*got 'cifar10'"),
        ("model=vit", "model: expected a table"),
        ("model.name.x=1", "set: expected a table at 'name'"),
        ("training.epochs", "set: expected KEY=VALUE"),
        ("=3", "set: expected KEY=VALUE"),
    ],
)
def test_refused_changes(file, change, message):
    with pytest.raises(ValueError, match=message):
        load_recipe(str(file), [change])


@pytest.mark.parametrize(("content", "message"), [("a = ", "not TOML"), ("", "missing .*'protocol', 'model'")])
def test_refused_files(tmp_path, content, message):
    path = tmp_path / "bad.toml"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        load_recipe(str(path))


def test_an_unknown_recipe():
    with pytest.raises(ValueError, match=r"recipe: expected one of .*'vtab1k'.* or a TOML file, got 'vtab2k'"):
        load_recipe("vtab2k")


def test_a_size_that_is_not_there(file):
    recipe = load_recipe(str(file))
    assert recipe.size(None) == "tiny"
    with pytest.raises(ValueError, match=r"size: expected one of \['tiny'\], got '0.86M'"):
        recipe.size("0.86M")


def test_changes_of_some_tables_alone(file):
    recipe = load_recipe(str(file))
    changed = change_recipe(recipe, ["search.generations=3", "metric=loss"], only=("search", "metric"))
    assert (changed.search.generations, changed.metric) == (3, "loss")
    with pytest.raises(ValueError, match=r"expected changes of search or metric alone, got one of \['training'\]"):
        change_recipe(recipe, ["training.epochs=3"], only=("search", "metric"))


def test_the_spaces_are_those_of_the_paper():
    counts = [SearchSpace(size.ranks).count(48) for size in load_recipe("vtab1k").sizes.values()]
    assert counts == [900**48, 900**48, 432**48]
    assert math.log10(counts[2]) == pytest.approx(126.5, abs=0.05)
