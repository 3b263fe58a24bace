"""Swin-B and ConvNeXt-B, as timm makes them, through training, search and merging, on images of a few pixels."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import glora
from glora.files import checksum
from glora_kernels import reference
from tests.glora.toys import CLASSES, generator, seeded
from tests.helpers import assert_contract

SPACE, LIMIT = glora.SearchSpace(ranks=(2, 1)), 400_000


class Architecture(NamedTuple):
    """``layers`` are its linear layers but for the head; ``reductions`` those without a bias."""

    name: str
    size: int
    options: dict
    layers: int
    reductions: tuple[str, ...]


# 14 x 14 patches: windows of 7 x 7 as at 224 x 224 in the first two stages, in one of them shifted
SWIN = Architecture(
    "swin_base_patch4_window7_224",
    56,
    {"img_size": 56},
    99,
    tuple(f"layers.{i}.downsample.reduction" for i in (1, 2, 3)),
)
# a layer scale as trained weights have it; its first value, 1e-6, would hide what the adapted layers do
CONVNEXT = Architecture("convnext_base", 32, {"ls_init_value": 0.1}, 72, ())


class Run(NamedTuple):
    """What was seen on the way; ``model`` is the merged one, and ``x`` what its outputs were compared on."""

    architecture: Architecture
    adapted: set[str]
    linear: set[str]
    plain: tuple[dict, dict]
    losses: tuple[float, ...]
    moved: set[str]
    base: tuple[int, int]
    head: tuple[Tensor, Tensor]
    found: glora.SearchResult
    data: TensorDataset
    unmerged: Tensor
    report: glora.MergeReport
    model: nn.Module


@pytest.fixture(scope="module", params=[SWIN, CONVNEXT], ids=lambda architecture: architecture.name)
def run(request) -> Run:
    architecture = request.param
    with seeded():
        return through_everything(architecture)


def through_everything(architecture: Architecture) -> Run:
    model = glora.load_backbone(architecture.name, CLASSES, options=architecture.options)
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    plain = layout(model)
    layers = glora.glora_layers(glora.inject(model, rank=2))
    x = torch.randn(4, 3, architecture.size, architecture.size, generator=generator())
    data = TensorDataset(x, torch.arange(4) % CLASSES)

    base, head, support = frozen(model), model.get_classifier().weight.detach().clone(), supports(layers)
    recipe = glora.Recipe(steps=2, batch_size=2, lr=1e-2)
    losses = glora.train(model, data, recipe, space=SPACE, progress=False).losses
    moved = {name for name, value in supports(layers).items() if value != support[name]}

    settings = glora.SearchSettings(population=2, top=2, crossover=1, mutation=1, generations=1)
    found = glora.search(model, SPACE, data, limit=LIMIT, settings=settings, metric="loss", progress=False)
    glora.set_paths(model, found.best.paths)
    bases, heads = (base, frozen(model)), (head, model.get_classifier().weight.detach().clone())
    with torch.no_grad():
        unmerged = model.eval()(x)
    report = glora.merge(model, x, keep=True)
    return Run(
        architecture, set(layers), linear, plain, losses, moved, bases, heads, found, data, unmerged, report, model
    )


def layout(model):
    modules = {name: type(module) for name, module in model.named_modules()}
    return modules, {name: (tuple(p.shape), p.dtype) for name, p in model.named_parameters()}


def frozen(model):
    return checksum(p for p in model.parameters() if not p.requires_grad)


def supports(layers):
    return {name: checksum(layer.support_parameters()) for name, layer in layers.items()}


def test_every_linear_layer_is_adapted_but_the_head(run):
    """The head is ``head.fc`` in both: excluded as a component of the name, not as all of it."""
    assert run.adapted == run.linear - {"head.fc"}
    assert len(run.adapted) == run.architecture.layers
    assert {name for name, layer in run.report.originals.items() if layer.bias is None} == {
        *run.architecture.reductions
    }


def test_training_moves_every_layer_and_the_head_and_nothing_frozen(run):
    assert len(run.losses) == 2
    assert run.moved == run.adapted
    assert not torch.equal(*run.head)
    assert run.base[0] == run.base[1]


def test_the_search_scores_what_the_merged_model_computes(run):
    assert len(run.found.history) == 4
    assert set(run.found.best.paths) == run.adapted
    counted = sum(path.count(run.report.originals[name].shape) for name, path in run.found.best.paths.items())
    assert run.found.best.parameters == counted <= LIMIT
    assert -glora.evaluate(run.model, run.data).loss == run.found.best.score


def test_the_merged_model_has_the_modules_that_it_had(run):
    modules, parameters = layout(run.model)
    assert modules == run.plain[0]
    created = {f"{name}.bias" for name in run.architecture.reductions if run.found.best.paths[name].makes_bias}
    assert created == {f"{layer.name}.bias" for layer in run.report.layers if layer.bias_created}
    assert set(parameters) - set(run.plain[1]) == created
    assert {name: kind for name, kind in parameters.items() if name not in created} == run.plain[1]


def test_the_merged_model_computes_the_same(run):
    assert run.report.model_difference == 0
    with torch.no_grad():
        assert torch.equal(run.model(run.data.tensors[0]), run.unmerged)


@torch.no_grad()
def test_every_merged_layer_keeps_the_contract_where_it_stands(run):
    """On what reaches it from the layers before, and against the formula in fp64 on the layer it was merged from."""
    checked = set()

    def check(name, layer, x, y):
        values = (x, layer.weight, layer.bias)
        want, scale = (
            reference.glora_linear(*(None if t is None else wide(t) for t in values), layer.terms().map(wide))
            for wide in (lambda t: t.double(), lambda t: t.double().abs())
        )
        assert_contract({"y": y}, {"y": want}, {"y": scale}, torch.float32)
        checked.add(name)

    hooks = [
        run.model.get_submodule(name).register_forward_hook(
            lambda module, inputs, y, name=name, layer=layer: check(name, layer, inputs[0], y)
        )
        for name, layer in run.report.originals.items()
    ]
    run.model(run.data.tensors[0][:1])
    for hook in hooks:
        hook.remove()
    assert checked == run.adapted
