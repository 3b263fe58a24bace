"""Arguments of another type than expected: refused by name, before any work, with what to pass instead."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import Dataset, IterableDataset, TensorDataset

import glora
from glora import PathConfig, Recipe, SearchSettings, SearchSpace
from glora.evolution.loop import check_search
from tests.glora.toys import IN_FEATURES, adapted_mlp, generator, points, same_bits, state, trained_mlp, unchanged

RECIPE = Recipe(steps=3, batch_size=4, lr=0.05)
SPACE = SearchSpace(ranks=(2,))
NONE = SearchSpace((2,), *[("none",)] * 5)
SHORT = SearchSettings(population=2, top=1, crossover=0, mutation=0, generations=0)
WRONG = {"none": None, "number": 3, "text": "x", "path": PathConfig(), "class": nn.Linear}


class Samples(Dataset):
    """Twelve times the same sample."""

    def __init__(self, sample):
        self.sample = sample

    def __len__(self):
        return 12

    def __getitem__(self, index):
        return self.sample


class Endless(IterableDataset):
    def __iter__(self):
        yield from points()


class Unsized(Dataset):
    def __getitem__(self, index):
        return torch.zeros(IN_FEATURES), 0


def train(model, dataset, recipe=RECIPE, **options):
    return glora.train(model, dataset, recipe, progress=False, **options)


def search(model, validation, space=SPACE, **options):
    return glora.search(model, space, validation, progress=False, **{"settings": SHORT, **options})


TAKE_DATA = {
    "train": ("dataset", train),
    "evaluate": ("dataset", glora.evaluate),
    "evaluate_merged": ("dataset", lambda model, data: glora.evaluate_merged(model, glora.get_paths(model), data)),
    "search": ("validation", search),
}
x = torch.zeros(IN_FEATURES)
NO_DATA = {
    "unsized": (Unsized(), "with a length and an index, got Unsized"),
    "number": (3, "got int"),
    "tensors": (points().tensors, r"got tensors; pass torch.utils.data.TensorDataset\(inputs, targets\)"),
    "tensor": (torch.zeros(4, IN_FEATURES), "got tensors; pass"),
    "dictionary": ({"train": points()}, r"got a dictionary with the keys \['train'\]; pass one of its values"),
    "one-tensor": (TensorDataset(torch.zeros(4, IN_FEATURES)), r"got \(Tensor\)"),
}
DATA = {
    "dictionaries": (Samples({"text": "a", "labels": 0}), r"got str under 'text'; remove such a column .*'text'"),
    "inputs": (Samples(x), r"samples \(input, target\) or dictionaries, of tensors, arrays or numbers, got Tensor"),
    "triples": (Samples((x, 0, 1)), r"got \(Tensor, int, int\); wrap it in a data set whose __getitem__ returns such"),
    "texts": (Samples(("text", 0)), r"got \(str, int\)"),
    "objects": (Samples((object(), 0)), r"got \(object, int\)"),
}


@pytest.mark.parametrize("data", [*NO_DATA, *DATA])
@pytest.mark.parametrize("function", TAKE_DATA)
def test_other_data(function, data):
    argument, call = TAKE_DATA[function]
    dataset, message = {**NO_DATA, **DATA}[data]
    with unchanged(model := adapted_mlp()), pytest.raises(TypeError, match=rf"^{argument}: expected .*{message}"):
        call(model, dataset)


@pytest.mark.parametrize("data", NO_DATA)
def test_other_data_for_a_search_that_is_to_put_another_aside(data):
    dataset, message = NO_DATA[data]
    with pytest.raises(TypeError, match=f"^validation: expected .*{message}"):
        check_search(adapted_mlp(), SPACE, dataset)


def test_an_iterable_data_set_is_evaluated_but_not_trained_on():
    model = trained_mlp()
    assert glora.evaluate(model, Endless()) == glora.evaluate(model, points())
    for argument, call in (TAKE_DATA["train"], TAKE_DATA["search"]):
        with pytest.raises(TypeError, match=f"^{argument}: expected a map-style data set .*, got Endless"):
            call(model, Endless())


@pytest.mark.parametrize("data", [list(points()), Samples((np.zeros(IN_FEATURES, np.float32), np.int64(1)))])
@pytest.mark.parametrize("function", TAKE_DATA)
def test_data_that_collate_to_pairs(function, data):
    TAKE_DATA[function][1](trained_mlp(), data)


@pytest.mark.parametrize("data", ["dictionaries", "triples", "objects"])
def test_samples_that_a_search_knows_its_data_by(tmp_path, data):
    dataset, message = DATA[data]
    for options in ({"journal": tmp_path / "journal"}, {"settings": SearchSettings(halving=(0.5, 1))}):
        with pytest.raises(TypeError, match=f"^validation: expected .*{message}"):
            search(adapted_mlp(), dataset, **options)
    assert not list(tmp_path.iterdir())


def test_samples_that_other_processes_read():
    dataset, message = DATA["objects"]
    with pytest.raises(TypeError, match=f"^dataset: expected .*{message}"):
        train(adapted_mlp(), dataset, workers=1)


def using(model, paths):
    with glora.using_paths(model, paths):
        return glora.get_paths(model)


TAKE_A_MODEL = {
    "train": lambda model: train(model, points()),
    "search": lambda model: search(model, points()),
    "evaluate": lambda model: glora.evaluate(model, points()),
    "evaluate_merged": lambda model: glora.evaluate_merged(model, {}, points()),
    "sample_paths": lambda model: glora.sample_paths(model, SPACE, generator()),
    "set_paths": lambda model: glora.set_paths(model, {}),
    "get_paths": glora.get_paths,
    "using_paths": lambda model: using(model, {}),
    "merge": glora.merge,
    "inject": glora.inject,
    "apply_preset": lambda model: glora.apply_preset(model, "lora", 2),
    "count_parameters": glora.count_parameters,
    "trainable_parameters": glora.trainable_parameters,
    "save_adapter": lambda model: glora.save_adapter(model, "never.safetensors"),
}


@pytest.mark.parametrize("got", ["none", "number", "class"])
@pytest.mark.parametrize("function", TAKE_A_MODEL)
def test_no_model(function, got):
    with pytest.raises(
        TypeError, match=r"^model: expected a torch.nn.Module, got (NoneType|int|the class Linear itself)"
    ):
        TAKE_A_MODEL[function](WRONG[got])


@pytest.mark.parametrize(
    ("argument", "call"),
    [
        ("recipe", lambda wrong: train(adapted_mlp(), points(), wrong)),
        ("settings", lambda wrong: search(adapted_mlp(), points(), settings=wrong)),
        ("settings", lambda wrong: check_search(adapted_mlp(), SPACE, points(), settings=wrong)),
        ("space", lambda wrong: search(adapted_mlp(), points(), wrong)),
        ("space", lambda wrong: glora.sample_paths(adapted_mlp(), wrong, generator())),
        ("paths", lambda wrong: glora.set_paths(adapted_mlp(), wrong)),
        ("paths", lambda wrong: using(adapted_mlp(), wrong)),
        ("paths", lambda wrong: glora.evaluate_merged(adapted_mlp(), wrong, points())),
        ("report", lambda wrong: glora.unmerge(adapted_mlp(), wrong)),
        ("evaluate", lambda wrong: glora.evolve({}, SPACE, wrong)),
    ],
)
@pytest.mark.parametrize("got", ["none", "number", "class"])
def test_other_arguments(argument, call, got):
    with pytest.raises(TypeError, match=f"^{argument}: expected .*, got (NoneType|int|the class Linear itself)"):
        call(WRONG[got])


@pytest.mark.parametrize(
    ("argument", "call"),
    [
        ("space", lambda wrong: train(adapted_mlp(), points(), space=wrong)),
        ("on_step", lambda wrong: train(adapted_mlp(), points(), on_step=wrong)),
        ("checkpoint", lambda wrong: train(adapted_mlp(), points(), checkpoint=wrong)),
        ("log", lambda wrong: train(adapted_mlp(), points(), log=wrong)),
        ("journal", lambda wrong: search(adapted_mlp(), points(), journal=wrong)),
        ("generator", lambda wrong: glora.sample_paths(adapted_mlp(), SPACE, wrong)),
        ("paths", lambda wrong: glora.count_parameters(adapted_mlp(), wrong)),
        ("paths", lambda wrong: glora.trainable_parameters(adapted_mlp(), wrong)),
        ("paths", lambda wrong: glora.drop_unread_gradients(adapted_mlp(), wrong)),
    ],
)
@pytest.mark.parametrize("got", ["number", "class"])
def test_other_optional_arguments(argument, call, got):
    with pytest.raises(TypeError, match=f"^{argument}: expected .*, got (int|the class Linear itself)"):
        call(WRONG[got])


@pytest.mark.parametrize("wrong", [0, 2.0, None, True])
@pytest.mark.parametrize("argument", ["batch_size", "workers"])
def test_counts_of_evaluate(argument, wrong):
    if (argument, wrong) != ("workers", 0):
        with pytest.raises(ValueError, match=f"^{argument}: expected an integer from [01], got {wrong}"):
            glora.evaluate(adapted_mlp(), points(), **{argument: wrong})


# -- paths -------------------------------------------------------------------------------------------


def test_one_path_is_that_of_every_layer():
    path, model = PathConfig("lora_1", "vector"), trained_mlp()
    each, others = dict.fromkeys(("fc1", "fc2"), path), glora.get_paths(model)
    assert using(model, path) == each and glora.get_paths(model) == others
    assert glora.count_parameters(model, path) == glora.count_parameters(model, each)
    one, all_ = (glora.trainable_parameters(model, paths) for paths in (path, each))
    assert [id(p) for p in one] == [id(p) for p in all_]
    assert glora.evaluate_merged(model, path, points()) == glora.evaluate_merged(model, each, points())
    glora.set_paths(model, path)
    assert glora.get_paths(model) == each


def test_one_path_above_a_layers_rank_changes_none():
    with unchanged(model := adapted_mlp(rank=2)), pytest.raises(ValueError, match=r"ranks up to 2 .*layer 'fc1'"):
        glora.set_paths(model, PathConfig(B="lora_3"))


def test_some_paths_say_what_to_type():
    with unchanged(model := adapted_mlp()), pytest.raises(ValueError) as refused:
        glora.set_paths(model, {"fc2": PathConfig(B="vector")})
    assert str(refused.value) == (
        "paths: expected exactly the 2 adapted layers of the model, each once; missing ['fc1'], unknown []; to change "
        "some of them: glora.set_paths(model, paths, partial=True)"
    )
    paths = glora.get_paths(model) | {"fc2": PathConfig(B="vector")}
    glora.set_paths(model, {"fc2": PathConfig(B="vector")}, partial=True)
    assert glora.get_paths(model) == paths


# -- nothing to train, and what a model and a loss return ---------------------------------------------


def frozen_head(model):
    model.head.requires_grad_(False)
    return model


def test_paths_that_read_nothing_are_refused_before_training():
    glora.set_paths(model := frozen_head(adapted_mlp()), PathConfig())
    read = []
    with (
        unchanged(model),
        pytest.raises(ValueError, match=r"^model: expected paths that read .*PathConfig\(B='lora_8'"),
    ):
        train(model, points(), on_step=lambda *_: read.append(0))
    assert not read


def test_paths_that_read_nothing_train_the_head():
    glora.set_paths(model := adapted_mlp(), PathConfig())
    before = state(model)
    train(model, points())
    assert {name for name, tensor in state(model).items() if not torch.equal(tensor, before[name])} == {
        "head.weight",
        "head.bias",
    }


def test_random_paths_may_read_nothing():
    before = state(model := frozen_head(adapted_mlp()))
    assert train(model, points(), space=NONE).steps == 3
    assert same_bits(state(model), before)
    train(model := adapted_mlp(), points(), space=NONE)
    assert not torch.equal(model.head.weight, before["head.weight"])


class Output(dict):
    """As the models of transformers return it."""

    def __init__(self, logits):
        super().__init__(logits=logits)
        self.logits = logits


class Wrapped(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = adapted_mlp()

    def forward(self, x):
        return Output(self.inner(x))


def test_a_model_whose_output_is_no_tensor():
    """It is given to a loss of the caller's as it is."""
    summary = train(Wrapped(), points(), loss_fn=lambda output, target: F.cross_entropy(output.logits, target))
    assert summary.losses == train(adapted_mlp(), points()).losses


@pytest.mark.parametrize(
    ("loss_fn", "error", "message"),
    [
        (lambda y, t: float(y.detach().sum()), TypeError, "^loss_fn: expected it to return a scalar tensor, got float"),
        (lambda y, t: y.sum(0), TypeError, r"^loss_fn: .* got a tensor of shape \(3,\)"),
        (lambda y, t: y.detach().sum(), ValueError, "^loss: expected one that depends on what is trained"),
    ],
)
def test_what_a_loss_returns(loss_fn, error, message):
    with pytest.raises(error, match=message):
        train(adapted_mlp(), points(), loss_fn=loss_fn)
