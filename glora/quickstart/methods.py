"""The rows of the demonstration's table: each method adapts a copy of the backbone, trains it and tests it.

All share the backbone, a fresh head, the batches and the schedule. A method is a function of the conditions and of its
peak learning rate; it makes one row or more, of any domain. ``METHODS`` names them.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from statistics import fmean

import torch
from torch import nn
from torch.utils.data import ConcatDataset, Dataset, TensorDataset

from ..config import PathConfig, SearchSpace
from ..evaluation import evaluate, evaluate_merged
from ..evolution.loop import search
from ..evolution.result import SearchResult
from ..injection import inject
from ..merging import merge
from ..models.modules import glora_layers, module_types
from ..parameters import count_parameters
from ..paths import Paths, get_paths, sampler_for, set_paths
from ..presets import apply_preset
from ..refitting import refit
from ..training.loop import train
from ..training.recipe import Recipe
from .digits import DIGITS
from .domain import Domain, FewShot

SEARCHED = "GLoRA, searched"
BOTH = "(train+val)"  # how the names of rows end that were trained on the validation samples too
REFIT = f"GLoRA, searched and refit {BOTH}"
PAPER = "GLoRA as in the paper (unbalanced, uniform, no refit)"
ALWAYS = "glora"
BALANCE = 0.02
SEARCH, SPACE = DIGITS.search, DIGITS.space

Progress = Callable[[int], object]


@dataclass(frozen=True)
class Row:
    """One method on one few-shot draw; accuracies from 0 to 1, seconds of training and search."""

    method: str
    parameters: float
    test: float
    generalisation: float | None
    seconds: float
    details: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Conditions:
    """The conditions that are the same for every method.

    Args:
        backbone: the domain's, pre-trained.
        steps: optimiser steps of a training.
        progress: called with the units of work that are done (:func:`units_of_work`).
        also_validation: train on the validation samples too.
    """

    backbone: nn.Module
    data: FewShot
    seed: int
    steps: int
    progress: Progress
    domain: Domain = DIGITS
    also_validation: bool = False

    def with_validation(self) -> Conditions:
        """The same, but every training is on the validation samples too, and rows say so."""
        return replace(self, also_validation=True)

    def model(self) -> nn.Module:
        """A copy of the backbone with a fresh head."""
        model = copy.deepcopy(self.backbone)
        torch.manual_seed(self.seed)
        model.reset_classifier(self.domain.classes)  # type: ignore[operator]
        return model

    @property
    def training_set(self) -> TensorDataset:
        if not self.also_validation:
            return self.data.train
        parts = [self.data.train.tensors, self.data.validation.tensors]
        return TensorDataset(*(torch.cat(tensors) for tensors in zip(*parts)))

    def recipe(self, lr: float, steps: int | None = None, balance: float | None = None) -> Recipe:
        return Recipe(
            steps=steps or self.steps,
            batch_size=self.domain.batch_size,
            lr=lr,
            clip_norm=1.0,
            seed=self.seed,
            balance=balance,
        )

    def train(self, model: nn.Module, recipe: Recipe, space: SearchSpace | None = None) -> float:
        """Train; returns the seconds it took."""
        return train(model, self.training_set, recipe, space=space, progress=False, on_step=self.on_step).seconds

    def on_step(self, _step: int, _loss: float) -> None:
        self.progress(1)

    def trained(self, method: str, model: nn.Module, parameters: float, recipe: Recipe) -> Row:
        """The row of a method that trains once and is tested once."""
        seconds = self.train(model, recipe)
        return self.row(method + (f" {BOTH}" if self.also_validation else ""), model, parameters, seconds)

    def row(self, method: str, model: nn.Module, parameters: float, seconds: float, **details) -> Row:
        """Test ``model``, once."""
        test = evaluate(model, self.data.test).accuracy
        shifted = [evaluate(model, samples).accuracy for samples in self.data.shifted_tests.values()]
        return Row(method, parameters, test, fmean(shifted) if shifted else None, seconds, details)


def linear_probe(conditions: Conditions, lr: float) -> list[Row]:
    return [_trained_in_part(conditions, "linear probe", lr, lambda name: False)]


def bitfit(conditions: Conditions, lr: float) -> list[Row]:
    return [_trained_in_part(conditions, "BitFit", lr, lambda name: name.endswith("bias"))]


def full_fine_tuning(conditions: Conditions, lr: float) -> list[Row]:
    return [_trained_in_part(conditions, "full fine-tuning", lr, lambda name: True)]


def ssf(conditions: Conditions, lr: float) -> list[Row]:
    return [_preset(conditions, "SSF (A, D, E vectors)", "ssf", 1, lr)]


def lora(conditions: Conditions, lr: float) -> list[Row]:
    """LoRA on all linear layers."""
    rank = conditions.domain.lora_rank
    return [_preset(each, f"LoRA r{rank}", "lora", rank, lr) for each in (conditions, conditions.with_validation())]


def lora_attention(conditions: Conditions, lr: float) -> list[Row]:
    """LoRA on the layers of attention alone, as in its paper, with about as many parameters as on all layers."""
    domain = conditions.domain
    sizes = {name: layer.in_features + layer.out_features for name, layer in _linear_layers(conditions.model())}
    alone = sum(size for name, size in sizes.items() if name.rpartition(".")[2] in domain.attention)
    rank = round(domain.lora_rank * sum(sizes.values()) / alone)
    method = f"LoRA r{rank} on {' and '.join(domain.attention)} alone"
    both = (conditions, conditions.with_validation())
    return [_preset(each, method, "lora", rank, lr, domain.attention) for each in both]


def lora_longer(conditions: Conditions, lr: float) -> list[Row]:
    """LoRA with as much computing as GLoRA's last row takes."""
    domain, rank = conditions.domain, conditions.domain.lora_rank
    steps = longer_steps(domain, conditions.steps)
    method = f"LoRA r{rank}, equal compute: {steps} steps"
    return [_preset(conditions.with_validation(), method, "lora", rank, lr, steps=steps)]


def hira(conditions: Conditions, lr: float) -> list[Row]:
    rank = conditions.domain.lora_rank
    return [_preset(conditions.with_validation(), f"HiRA r{rank}", "hira", rank, lr)]


def fixed_path(conditions: Conditions, lr: float) -> list[Row]:
    """LoRA's parameters shared out between A and B, without a supernet or a search."""
    path = PathConfig(A="lora_1", B=f"lora_{max(1, conditions.domain.lora_rank - 1)}")
    return [_on_path(conditions.with_validation(), f"fixed path (A {path.A}, B {path.B})", path, conditions.recipe(lr))]


def largest_path(conditions: Conditions, lr: float) -> list[Row]:
    """Every tensor as large as it can be."""
    low_rank = f"lora_{conditions.domain.rank}"
    path = PathConfig(A=low_rank, B=low_rank, C=low_rank, D="vector", E="vector")
    recipe = conditions.recipe(lr, balance=BALANCE)
    return [_on_path(conditions.with_validation(), "largest path alone", path, recipe)]


def glora(conditions: Conditions, lr: float) -> list[Row]:
    """Rows of a supernet: random paths; the searched path, with the proof that merging changes nothing; and that
    path trained some steps longer alone, on the validation samples too."""
    model, seconds = train_supernet(conditions, lr)
    limit = lora_parameters(conditions, model)
    random_row = _random_paths(conditions, model, limit, seconds)
    result = search_supernet(conditions, model, limit)
    seconds += result.seconds
    tuned = copy.deepcopy(model)
    searched_row = _searched(conditions, SEARCHED, model, limit, result, seconds)
    seconds += refit_path(conditions, tuned, result.best.paths, lr)
    return [random_row, searched_row, conditions.row(REFIT, tuned, result.best.parameters, seconds)]


def glora_paper(conditions: Conditions, lr: float) -> list[Row]:
    """Supernet and search without what was added to the paper's."""
    model, seconds = train_supernet(conditions, lr, replace(conditions.domain.space, shares={}), balance=None)
    limit = lora_parameters(conditions, model)
    result = search_supernet(conditions, model, limit)
    return [_searched(conditions, PAPER, model, limit, result, seconds + result.seconds)]


def train_supernet(
    conditions: Conditions,
    lr: float | None = None,
    space: SearchSpace | None = None,
    balance: float | None = BALANCE,
    steps: int | None = None,
) -> tuple[nn.Module, float]:
    """The supernet that is searched, and the seconds of its training.

    Args:
        lr, space: None for the domain's.
        balance: the target of balanced kinds, or None (:class:`glora.Recipe`).
    """
    domain = conditions.domain
    model = inject(conditions.model(), domain.rank)
    torch.manual_seed(conditions.seed)
    recipe = conditions.recipe(domain.rates[ALWAYS] if lr is None else lr, steps, balance)
    return model, conditions.train(model, recipe, space or domain.space)


def search_supernet(conditions: Conditions, model: nn.Module, limit: int) -> SearchResult:
    """The search of a supernet, on the validation samples, by their loss."""
    result = search(
        model,
        conditions.domain.space,
        conditions.data.validation,
        limit=limit,
        settings=conditions.domain.search,
        metric="loss",
        progress=False,
    )
    conditions.progress(len(result.history))
    return result


def refit_path(conditions: Conditions, model: nn.Module, paths: Paths, lr: float) -> float:
    """Train ``paths`` from the supernet's values on training and validation samples; returns the seconds."""
    both = conditions.with_validation()
    recipe = conditions.recipe(lr, refit_steps(conditions.domain, conditions.steps))
    return refit(model, paths, both.training_set, recipe, progress=False, on_step=conditions.on_step).seconds


def lora_parameters(conditions: Conditions, model: nn.Module) -> int:
    """What LoRA on all adapted layers trains: the limit of the search."""
    path = PathConfig(B=f"lora_{conditions.domain.lora_rank}")
    return count_parameters(model, dict.fromkeys(glora_layers(model), path))


def refit_steps(domain: Domain, steps: int) -> int:
    return max(1, steps * domain.refit_steps // domain.steps)


def longer_steps(domain: Domain, steps: int) -> int:
    """The steps of a supernet and a refit, and of the search: a candidate takes one forward pass over the validation
    samples; a step of LoRA is two, forward and back to the inputs, over a batch."""
    searched = domain.evaluations * domain.validation * domain.classes / (2 * domain.batch_size)
    return steps + refit_steps(domain, steps) + round(searched)


@dataclass(frozen=True)
class Method:
    """A method: its rows for conditions and a learning rate, and the units of work that it takes."""

    rows: Callable[[Conditions, float], list[Row]]
    units: Callable[[Domain, int], int] = lambda domain, steps: steps


METHODS: Mapping[str, Method] = {
    "linear": Method(linear_probe),
    "bitfit": Method(bitfit),
    "ssf": Method(ssf),
    "lora": Method(lora, lambda domain, steps: 2 * steps),
    "lora-attention": Method(lora_attention, lambda domain, steps: 2 * steps),
    "lora-longer": Method(lora_longer, longer_steps),
    "hira": Method(hira),
    "fixed": Method(fixed_path),
    "largest": Method(largest_path),
    "full": Method(full_fine_tuning),
    "glora-paper": Method(glora_paper, lambda domain, steps: steps + domain.evaluations),
    ALWAYS: Method(glora, lambda domain, steps: steps + refit_steps(domain, steps) + domain.evaluations),
}


def compared_with(method: str) -> str:
    """The row of GLoRA that a row is compared with: that which was trained on the same samples."""
    return REFIT if method.endswith(BOTH) else SEARCHED


def chosen(names: Iterable[str]) -> list[str]:
    """The methods of those names in the order of the table, and GLoRA's, which is always among them."""
    return [name for name in METHODS if name in {*names, ALWAYS}]


def units_of_work(domain: Domain, steps: int, methods: Iterable[str]) -> int:
    """The total of ``progress`` for one draw: optimiser steps and candidates of the search."""
    return sum(METHODS[name].units(domain, steps) for name in methods)


def run_methods(conditions: Conditions, methods: Iterable[str]) -> list[Row]:
    """The rows of the methods for one few-shot draw, at the domain's learning rates."""
    rates = conditions.domain.rates
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "lr: expected steps that move")  # the rates are tried out
        return [row for name in methods for row in METHODS[name].rows(conditions, rates[name])]


def prove_merge(conditions: Conditions, model: nn.Module) -> dict:
    """Merge ``model`` in place and compare it with the backbone and with itself unmerged."""
    samples = conditions.data.test.tensors[0]
    before = _predict(model, samples)
    report = merge(model, samples)
    after = _predict(model, samples)
    original = conditions.model()
    return {
        "same_parameters": _parameters(model) == _parameters(original),
        "same_modules": module_types(model) == module_types(original),
        "parameter_count": sum(p.numel() for p in model.parameters()),
        "largest_layer_error": report.largest_error,
        "largest_output_difference": report.model_difference,
        "agreement": float((before == after).float().mean()),
    }


def _searched(
    conditions: Conditions, method: str, model: nn.Module, limit: int, result: SearchResult, seconds: float
) -> Row:
    """The row of a searched path with the weights of the supernet; ``model`` is merged."""
    set_paths(model, result.best.paths)
    details = {
        "limit": limit,
        "evaluations": len(result.history),
        "search_seconds": result.seconds,
        "validation_loss": -result.best.score,
        "paths": {name: path.to_dict() for name, path in get_paths(model).items()},
        "merge": prove_merge(conditions, model),
    }
    return conditions.row(method, model, result.best.parameters, seconds, **details)


def _trained_in_part(conditions: Conditions, method: str, lr: float, chosen: Callable[[str], bool]) -> Row:
    """Train the head and the parameters of the chosen names."""
    model = conditions.model()
    trained = 0
    for name, parameter in model.named_parameters():
        head = name.startswith("head.")
        parameter.requires_grad_(head or chosen(name))
        trained += parameter.numel() if parameter.requires_grad and not head else 0
    return conditions.trained(method, model, trained, conditions.recipe(lr))


def _preset(
    conditions: Conditions,
    method: str,
    preset: str,
    rank: int,
    lr: float,
    targets: tuple[str, ...] | None = None,
    steps: int | None = None,
) -> Row:
    model = apply_preset(inject(conditions.model(), rank, targets=targets), preset, rank)
    return conditions.trained(method, model, count_parameters(model), conditions.recipe(lr, steps))


def _on_path(conditions: Conditions, method: str, path: PathConfig, recipe: Recipe) -> Row:
    model = inject(conditions.model(), path.rank)
    set_paths(model, path)
    return conditions.trained(method, model, count_parameters(model), recipe)


def _random_paths(conditions: Conditions, model: nn.Module, limit: int, seconds: float) -> Row:
    """Random paths of the trained supernet within the limit: the search has to beat these."""
    sampler = sampler_for(model, conditions.domain.space, limit)
    generator = torch.Generator().manual_seed(conditions.seed)
    drawn = [sampler.sample(generator) for _ in range(conditions.domain.random_paths)]

    def mean_accuracy(samples: Dataset) -> float:
        return fmean(evaluate_merged(model, paths, samples).accuracy for paths in drawn)

    shifted = list(conditions.data.shifted_tests.values())  # equal sizes: the mean over shifts
    general = mean_accuracy(ConcatDataset(shifted)) if shifted else None
    mean_count = fmean(sampler.count(paths) for paths in drawn)
    return Row("random path of the supernet", mean_count, mean_accuracy(conditions.data.test), general, seconds)


def _linear_layers(model: nn.Module) -> list[tuple[str, nn.Linear]]:
    """The linear layers but the head."""
    return [(name, layer) for name, layer in model.named_modules() if isinstance(layer, nn.Linear) and name != "head"]


@torch.no_grad()
def _predict(model: nn.Module, samples: torch.Tensor) -> torch.Tensor:
    return model.eval()(samples).argmax(-1)


def _parameters(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for name, p in model.named_parameters()}
