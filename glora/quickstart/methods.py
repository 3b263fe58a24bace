"""The rows of the demonstration's table: each function of ``METHODS`` adapts, trains and tests for one row or more.

All rows share the backbone, a fresh head, the steps, the batches and the schedule; each has the
learning rate that suits it. Except for GLoRA's search, each trains once and is tested once.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import fmean

import torch
from torch import nn
from torch.utils.data import ConcatDataset, Dataset, TensorDataset

from ..config import SearchSpace
from ..evaluation import evaluate, evaluate_merged
from ..evolution.loop import SearchSettings, search
from ..injection import inject
from ..merging import merge
from ..models.modules import module_types
from ..parameters import count_parameters
from ..paths import get_paths, sampler_for, set_paths
from ..presets import apply_preset
from ..training.loop import train
from ..training.recipe import Recipe
from .digits import CLASSES, FewShot

RANK = 4
SPACE = SearchSpace(ranks=(RANK,))
SEARCH = SearchSettings(population=20, top=10, crossover=10, mutation=10, generations=8)
RANDOM_PATHS = 10
SEARCHED = "GLoRA, searched"
TUNED = "GLoRA, searched and tuned (train+val)"
LORA_RANK = 3

Progress = Callable[[int], object]


@dataclass(frozen=True)
class Row:
    """One method on one few-shot draw; accuracies from 0 to 1, seconds of training and search."""

    method: str
    parameters: float
    test: float
    generalisation: float
    seconds: float
    details: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Conditions:
    """The conditions that are the same for every method."""

    backbone: nn.Module
    data: FewShot
    seed: int
    steps: int
    progress: Progress

    def model(self) -> nn.Module:
        """A copy of the backbone with a fresh head."""
        model = copy.deepcopy(self.backbone)
        torch.manual_seed(self.seed)
        model.reset_classifier(CLASSES)  # type: ignore[operator]
        return model

    def train(
        self,
        model: nn.Module,
        lr: float,
        space: SearchSpace | None = None,
        data: Dataset | None = None,
        steps: int | None = None,
    ) -> float:
        """Train on ``data`` (default: the training split); returns the seconds it took."""
        recipe = Recipe(steps=steps or self.steps, batch_size=32, lr=lr, clip_norm=1.0, seed=self.seed)
        dataset = self.data.train if data is None else data
        return train(model, dataset, recipe, space=space, progress=False, on_step=lambda *_: self.progress(1)).seconds

    def train_and_validation(self) -> TensorDataset:
        parts = [self.data.train.tensors, self.data.validation.tensors]
        return TensorDataset(*(torch.cat(tensors) for tensors in zip(*parts)))

    def row(self, method: str, model: nn.Module, parameters: float, seconds: float, **details) -> Row:
        """Test ``model``, once."""
        test = evaluate(model, self.data.test).accuracy
        general = fmean(evaluate(model, shifted).accuracy for shifted in self.data.shifted_tests.values())
        return Row(method, parameters, test, general, seconds, details)


def linear_probe(conditions: Conditions) -> list[Row]:
    model = conditions.model()
    _train_only(model, lambda name: name.startswith("head."))
    return [conditions.row("linear probe", model, 0, conditions.train(model, 2e-2))]


def bitfit(conditions: Conditions) -> list[Row]:
    model = conditions.model()
    _train_only(model, lambda name: name.startswith("head.") or name.endswith("bias"))
    trained = sum(p.numel() for name, p in model.named_parameters() if p.requires_grad and not name.startswith("head."))
    return [conditions.row("BitFit", model, trained, conditions.train(model, 2e-2))]


def full_fine_tuning(conditions: Conditions) -> list[Row]:
    model = conditions.model()
    trained = sum(p.numel() for name, p in model.named_parameters() if not name.startswith("head."))
    return [conditions.row("full fine-tuning", model, trained, conditions.train(model, 2e-3))]


def ssf(conditions: Conditions) -> list[Row]:
    return [_preset(conditions, "SSF (A, D, E vectors)", "ssf", 1, conditions.data.train)]


def lora(conditions: Conditions) -> list[Row]:
    both = conditions.train_and_validation()
    return [
        _preset(conditions, f"LoRA r{LORA_RANK}", "lora", LORA_RANK, conditions.data.train),
        _preset(conditions, f"LoRA r{LORA_RANK} (train+val)", "lora", LORA_RANK, both),
    ]


def glora(conditions: Conditions) -> list[Row]:
    """Rows of a supernet: random paths; the searched path, with the proof that merging changes nothing; and that
    path trained a little longer alone, on the validation images too."""
    model, train_seconds = train_supernet(conditions)
    limit = round(sampler_for(model, SPACE).mean)
    random_row = _random_paths(conditions, model, limit, train_seconds)

    result = search(
        model, SPACE, conditions.data.validation, limit=limit, settings=SEARCH, metric="loss", progress=False
    )
    conditions.progress(len(result.history))
    set_paths(model, result.best.paths)
    tuned = copy.deepcopy(model)
    details = {
        "limit": limit,
        "evaluations": len(result.history),
        "search_seconds": result.seconds,
        "validation_loss": -result.best.score,
        "paths": {name: path.to_dict() for name, path in get_paths(model).items()},
        "merge": prove_merge(conditions, model),
    }
    seconds = train_seconds + result.seconds
    parameters = result.best.parameters
    searched_row = conditions.row(SEARCHED, model, parameters, seconds, **details)

    seconds += conditions.train(
        tuned, 5e-3, data=conditions.train_and_validation(), steps=tuning_steps(conditions.steps)
    )
    return [random_row, searched_row, conditions.row(TUNED, tuned, parameters, seconds)]


def train_supernet(conditions: Conditions) -> tuple[nn.Module, float]:
    """The supernet that is searched, and the seconds of its training."""
    model = inject(conditions.model(), RANK)
    torch.manual_seed(conditions.seed)
    return model, conditions.train(model, 1e-2, SPACE)


def tuning_steps(steps: int) -> int:
    return max(1, 2 * steps // 5)


METHODS = (linear_probe, bitfit, ssf, lora, full_fine_tuning, glora)
_TRAININGS = 7  # LoRA trains twice


def units_of_work(steps: int) -> int:
    """The total of ``progress`` for one draw: optimiser steps and candidates of the search."""
    trainings = _TRAININGS * steps + tuning_steps(steps)
    return trainings + SEARCH.population + SEARCH.generations * (SEARCH.crossover + SEARCH.mutation)


def prove_merge(conditions: Conditions, model: nn.Module) -> dict:
    """Merge ``model`` in place and compare it with the backbone and with itself unmerged."""
    images = conditions.data.test.tensors[0]
    before = _predict(model, images)
    report = merge(model, images)
    after = _predict(model, images)
    original = conditions.model()
    return {
        "same_parameters": _parameters(model) == _parameters(original),
        "same_modules": module_types(model) == module_types(original),
        "parameter_count": sum(p.numel() for p in model.parameters()),
        "largest_layer_error": report.largest_error,
        "largest_output_difference": report.model_difference,
        "agreement": float((before == after).float().mean()),
    }


def _preset(conditions: Conditions, method: str, preset: str, rank: int, data: Dataset) -> Row:
    model = apply_preset(inject(conditions.model(), rank), preset, rank)
    return conditions.row(method, model, count_parameters(model), conditions.train(model, 2e-2, data=data))


def _random_paths(conditions: Conditions, model: nn.Module, limit: int, seconds: float) -> Row:
    """Random paths of the trained supernet within the limit: the search has to beat these."""
    sampler = sampler_for(model, SPACE, limit)
    generator = torch.Generator().manual_seed(conditions.seed)
    drawn = [sampler.sample(generator) for _ in range(RANDOM_PATHS)]
    test = fmean(evaluate_merged(model, paths, conditions.data.test).accuracy for paths in drawn)
    shifted: Dataset = ConcatDataset(list(conditions.data.shifted_tests.values()))  # equal sizes: the mean over shifts
    general = fmean(evaluate_merged(model, paths, shifted).accuracy for paths in drawn)
    mean_count = fmean(sampler.count(paths) for paths in drawn)
    return Row("random path of the supernet", mean_count, test, general, seconds)


def _train_only(model: nn.Module, chosen: Callable[[str], bool]) -> None:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(chosen(name))


@torch.no_grad()
def _predict(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    return model.eval()(images).argmax(-1)


def _parameters(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for name, p in model.named_parameters()}


def run_methods(conditions: Conditions) -> list[Row]:
    """All rows for one few-shot draw."""
    return [row for method in METHODS for row in method(conditions)]
