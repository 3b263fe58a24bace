"""Loss and accuracy, plain and merged."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import Dataset, TensorDataset

from glora import GLoRALinear, PathConfig, SearchSpace, evaluate, evaluate_merged, inject, sample_paths, using_paths
from tests.glora.toys import IN_FEATURES, generator, mlp, points, randomize, tiny_vit, trained_mlp, unchanged


class Pairs(Dataset):
    """Single samples, which a loader has to collate."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        x, target = self.dataset[index]
        return x, int(target)


def sampled(model, seed=0):
    return sample_paths(model, SearchSpace((2,)), generator(seed))


def evaluate_sampled(model, dataset):
    return evaluate_merged(model, sampled(model), dataset)


both_functions = pytest.mark.parametrize("function", [evaluate, evaluate_sampled], ids=["plain", "merged"])


def empty():
    return TensorDataset(torch.zeros(0, IN_FEATURES), torch.zeros(0, dtype=torch.long))


@pytest.mark.parametrize("wrap", [lambda dataset: dataset, Pairs], ids=["tensors", "pairs"])
@pytest.mark.parametrize("batch_size", [1, 5, 12, 100])
def test_is_the_mean_over_all_samples(wrap, batch_size):
    model, dataset = mlp().eval(), points(12)
    x, target = dataset.tensors
    logits = model(x).detach()
    metrics = evaluate(model, wrap(dataset), batch_size)
    assert metrics.samples == 12
    assert metrics.loss == pytest.approx(float(F.cross_entropy(logits, target)), rel=1e-6)
    assert metrics.accuracy == float((logits.argmax(1) == target).double().mean())


def test_half_logits_are_scored_in_fp32():
    dataset = points()
    half = TensorDataset(dataset.tensors[0].bfloat16(), dataset.tensors[1])
    assert evaluate(mlp().bfloat16(), half).loss == pytest.approx(evaluate(mlp(), dataset).loss, rel=0.02)


def test_dropout_is_off_and_modes_are_restored():
    model = trained_mlp(dropout=0.9).train()
    model.fc2.eval()
    with unchanged(model):
        assert evaluate(model, points()) == evaluate(model, points())


@pytest.mark.parametrize(
    "function", [evaluate, lambda m, d: evaluate_merged(m, sampled(m), d)], ids=["plain", "merged"]
)
def test_modes_and_modules_are_restored_after_an_error(function):
    model = trained_mlp().train()
    wrong = TensorDataset(torch.zeros(3, IN_FEATURES + 1), torch.zeros(3, dtype=torch.long))
    with unchanged(model), pytest.raises((RuntimeError, ValueError)):
        function(model, wrong)


@pytest.mark.parametrize(
    "function", [evaluate, lambda m, d: evaluate_merged(m, sampled(m), d)], ids=["plain", "merged"]
)
def test_an_empty_data_set_is_refused(function):
    model = trained_mlp().train()
    with unchanged(model), pytest.raises(ValueError, match=r"^dataset: expected at least one sample, got none"):
        function(model, empty())


def test_draws_nothing_from_the_generator_that_dropout_uses():
    before = torch.get_rng_state()
    evaluate(mlp(), points())
    assert torch.equal(torch.get_rng_state(), before)


def test_makes_no_graph():
    model = trained_mlp()
    evaluate(model, points())
    assert all(p.grad is None for p in model.parameters())


# -- merged ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("product", ["hadamard", "matmul"])
@pytest.mark.parametrize("seed", range(10))
def test_merged_equals_unmerged(product, seed):
    model = trained_mlp(product=product)
    paths = sampled(model, seed)
    with using_paths(model, paths):
        expected = evaluate(model, points())
    with unchanged(model):
        assert evaluate_merged(model, paths, points()) == expected


def test_merged_equals_unmerged_for_a_vit():
    model = inject(tiny_vit(), 2)
    randomize(model)
    paths = sampled(model)
    dataset = TensorDataset(torch.randn(6, 1, 8, 8, generator=generator()), torch.arange(6) % 3)
    with using_paths(model, paths):
        expected = evaluate(model, dataset)
    assert evaluate_merged(model, paths, dataset) == expected


def test_a_model_that_is_one_layer_is_merged_too():
    model = GLoRALinear(IN_FEATURES, 3, rank=2)
    randomize(model)
    path = PathConfig("vector", E="vector")
    with using_paths(model, {"": path}):
        expected = evaluate(model, points())
    assert evaluate(model, points()) != expected
    with unchanged(model):
        assert evaluate_merged(model, {"": path}, points()) == expected


def test_each_layer_is_assembled_once(monkeypatch):
    calls = []
    merge = GLoRALinear.merge
    monkeypatch.setattr(GLoRALinear, "merge", lambda *args, **options: calls.append(1) or merge(*args, **options))
    model = trained_mlp()
    evaluate_merged(model, sampled(model), points(12), batch_size=2)
    assert len(calls) == 2


def test_what_is_not_finite_is_scored_not_refused():
    model = trained_mlp()
    model.fc1.E.data.fill_(torch.nan)
    paths = {name: PathConfig(E="vector") for name in ("fc1", "fc2")}
    assert math.isnan(evaluate_merged(model, paths, points()).loss)


@pytest.mark.parametrize("paths", [{}, {"fc1": PathConfig()}], ids=len)
def test_refuses_paths_of_another_model(paths):
    model = trained_mlp()
    with unchanged(model), pytest.raises(ValueError, match=r"^paths: expected exactly the 2 adapted layers"):
        evaluate_merged(model, paths, points())


def test_refuses_a_model_without_layers():
    with pytest.raises(ValueError, match="found none"):
        evaluate_merged(nn.Sequential(nn.Linear(2, 2)), {}, points())
