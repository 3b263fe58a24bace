"""Whole architectures through train, search and merge: Swin-B with its reduction layers, and ConvNeXt-B."""

import pytest
import timm
import torch
from torch.utils.data import TensorDataset

import glora
from glora import Recipe, SearchSettings, SearchSpace
from tests.glora.toys import seeded

SPACE = SearchSpace((2,))
QUICK = SearchSettings(population=2, top=2, crossover=1, mutation=1, generations=1)
# name, arguments, image size, adapted linear layers
MODELS = [
    ("swin_base_patch4_window7_224", {"img_size": 64, "window_size": 2}, 64, 99),
    ("convnext_base", {"drop_path_rate": 0.1}, 32, 72),
]


def description(model):
    return {name: type(module) for name, module in model.named_modules()}


@pytest.mark.parametrize(
    ("name", "options", "size", "layers"), MODELS, ids=lambda value: value if isinstance(value, str) else ""
)
def test_train_search_merge(name, options, size, layers, tmp_path):
    with seeded():
        model = timm.create_model(name, num_classes=3, **options)
        images = TensorDataset(torch.randn(6, 3, size, size), torch.arange(6) % 3)
    before, shapes = description(model), {n: p.shape for n, p in model.named_parameters()}
    untouched = model.eval()(images.tensors[0][:1])
    glora.inject(model, 2)
    adapted = glora.glora_layers(model)
    assert len(adapted) == layers
    assert not any(name.startswith("head") for name in adapted)
    assert ("swin" not in name) or sum(name.endswith("reduction") for name in adapted) == 3
    trainable = {n for n, p in model.named_parameters() if p.requires_grad and n.startswith("head")}
    assert trainable >= {"head.fc.weight", "head.fc.bias"}
    assert torch.allclose(model(images.tensors[0][:1]), untouched, rtol=1e-3, atol=1e-4)

    summary = glora.train(model, images, Recipe(steps=3, batch_size=2, lr=1e-2), space=SPACE, progress=False)
    assert summary.steps == 3
    limit = round(0.8 * glora.sampling.PathSampler({n: a.shape for n, a in adapted.items()}, SPACE).mean)
    result = glora.search(model, SPACE, images, limit=limit, settings=QUICK, metric="loss", progress=False)
    assert result.best.parameters <= limit
    assert result.reused >= 0
    glora.set_paths(model, result.best.paths)
    assert -result.best.score == pytest.approx(glora.evaluate(model, images).loss, rel=1e-4)
    report = glora.merge(model, images.tensors[0][:2])
    assert report.model_difference < 1e-4
    assert description(model) == before
    biasless = {f"{layer.name}.bias" for layer in report.layers if layer.bias_created}
    assert {n: p.shape for n, p in model.named_parameters() if n not in biasless} == shapes
    assert not torch.equal(model(images.tensors[0][:1]), untouched)
