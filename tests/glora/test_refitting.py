"""Refitting: the searched path trained further from the supernet's weights, as set_paths and train do it."""

import inspect
import math

import pytest
import torch
from torch.utils.data import ConcatDataset, DataLoader, TensorDataset

from glora import PathConfig, Recipe, SearchSpace, get_paths, refit, set_paths, train
from tests.glora.toys import IN_FEATURES, adapted_mlp, points, same_bits, state, trained_mlp, unchanged

RECIPE = Recipe(steps=12, batch_size=5, lr=0.05, weight_decay=0.1, warmup=0.25, seed=3, checkpoint_every=4)
PATHS = {"fc1": PathConfig(A="vector", B="lora_2"), "fc2": PathConfig(D="vector", E="constant")}
READ = {"fc1.Ad", "fc1.Bu", "fc1.Bd", "fc2.D", "fc2.E", "head.weight", "head.bias"}
BOTH = ConcatDataset([points(), points(7)])


class CutError(Exception):
    """The run ends here."""


def cut(step, loss):
    if step == 6:
        raise CutError


def refitted(**options):
    model = trained_mlp(dropout=0.3)
    return refit(model, PATHS, BOTH, RECIPE, progress=False, **options), model


@pytest.mark.parametrize("paths", [PATHS, PathConfig(B="lora_1", E="vector")], ids=["each", "one"])
@pytest.mark.parametrize("data", [points(), BOTH, DataLoader(points(), 4)], ids=["tensors", "joined", "loader"])
def test_it_is_set_paths_and_train(paths, data):
    by_hand, model = trained_mlp(dropout=0.3), trained_mlp(dropout=0.3)
    set_paths(by_hand, paths)
    expected = train(by_hand, data, RECIPE, validation=points(), progress=False)
    summary = refit(model, paths, data, RECIPE, validation=points(), progress=False)
    assert (summary.losses, summary.validations) == (expected.losses, expected.validations)
    assert same_bits(state(model), state(by_hand))
    assert get_paths(model) == get_paths(by_hand) and model.training


def test_only_what_the_paths_read_changes():
    model = trained_mlp()
    before = state(model)
    refit(model, PATHS, points(), RECIPE, progress=False)
    assert {name for name, tensor in state(model).items() if not torch.equal(tensor, before[name])} == READ


def test_it_begins_with_the_weights_of_the_supernet():
    model = adapted_mlp()
    train(model, points(), RECIPE, space=SearchSpace((2, 1)), progress=False)
    set_paths(model, PATHS)
    model.eval()
    x, y = points().tensors
    inherited = torch.nn.functional.cross_entropy(model(x), y).item()
    whole = Recipe(steps=1, batch_size=len(x))
    assert refit(model, PATHS, points(), whole, progress=False).losses[0] == pytest.approx(inherited)


def test_the_same_path_again():
    model = trained_mlp()
    paths = get_paths(model)
    assert math.isfinite(refit(model, paths, points(), RECIPE, progress=False).losses[-1])
    assert get_paths(model) == paths


def test_a_refit_that_was_cut_has_the_bits_of_one_that_was_not(tmp_path):
    file, log = tmp_path / "checkpoint.pt", tmp_path / "log.csv"
    expected, uncut = refitted()
    with pytest.raises(CutError):
        refitted(checkpoint=file, on_step=cut)
    torch.manual_seed(99)  # whatever happens in between
    summary, model = refitted(checkpoint=file, log=log)
    assert (summary.resumed_from, summary.losses) == (4, expected.losses)
    assert same_bits(state(model), state(uncut)) and len(log.read_text().splitlines()) == 13


def test_the_checkpoint_of_other_paths_or_of_the_supernet_is_refused(tmp_path):
    refitted(checkpoint=tmp_path / "refit.pt")
    model = trained_mlp(dropout=0.3)
    others = {**PATHS, "fc1": PathConfig(A="vector")}
    supernet, space = trained_mlp(dropout=0.3), SearchSpace((2, 1))
    train(supernet, BOTH, RECIPE, space=space, progress=False, checkpoint=tmp_path / "train.pt")
    for paths, file in ((others, "refit.pt"), (PATHS, "train.pt")):
        with unchanged(model), pytest.raises(ValueError, match="checkpoint of another run"):
            refit(model, paths, BOTH, RECIPE, progress=False, checkpoint=tmp_path / file)


EMPTY = TensorDataset(torch.empty(0, IN_FEATURES), torch.empty(0, dtype=torch.int64))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"paths": {"fc1": PathConfig()}}, ValueError, "paths: expected exactly the 2 adapted layers"),
        ({"paths": PathConfig(B="lora_3")}, ValueError, "lora_3"),
        ({"paths": "best"}, TypeError, "paths: expected a mapping of layer names"),
        ({"dataset": EMPTY}, ValueError, "dataset"),
        ({"dataset": [1, 2]}, TypeError, "dataset"),
        ({"recipe": {"steps": 3}}, TypeError, "recipe: expected a glora.Recipe"),
        ({"validation": EMPTY}, ValueError, "validation"),
        ({"outputs": 3}, TypeError, "outputs"),
        ({"on_step": 3}, TypeError, "on_step"),
        ({"workers": -1}, ValueError, "workers"),
        ({"checkpoint": "no/folder/file.pt"}, ValueError, "checkpoint"),
        ({"graphs": "whole"}, ValueError, "graphs: expected 'auto' or 'off'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_arguments_change_nothing(changes, error, message):
    model = trained_mlp()
    given = {"paths": PATHS, "dataset": points(), "recipe": RECIPE, "progress": False, **changes}
    with unchanged(model), pytest.raises(error, match=message):
        refit(model, **given)


def test_paths_that_read_nothing_of_a_model_without_a_head():
    model = trained_mlp()
    model.head.requires_grad_(False)
    with unchanged(model), pytest.raises(ValueError, match="expected paths that read a support tensor"):
        refit(model, PathConfig(), points(), RECIPE, progress=False)


def test_a_plain_model_is_refused():
    plain = torch.nn.Linear(IN_FEATURES, 3)
    with pytest.raises(ValueError, match="expected at least one adapted layer"):
        refit(plain, PathConfig(), points(), RECIPE, progress=False)


def test_the_paths_of_before_after_an_error_in_the_middle():
    model = trained_mlp(seed=1)
    before = get_paths(model)
    with pytest.raises(CutError):
        refit(model, PATHS, points(), RECIPE, progress=False, on_step=cut)
    assert get_paths(model) == before


def test_it_takes_all_options_of_train_but_the_space():
    taken, options = (dict(inspect.signature(function).parameters) for function in (refit, train))
    del taken["paths"], options["space"]
    assert taken == options


def test_layers_by_their_names_with_those_of_a_wrapper():
    model = trained_mlp()
    refit(model, {f"module.{name}": path for name, path in PATHS.items()}, points(), RECIPE, progress=False)
    assert get_paths(model) == PATHS
