"""The model of a run: the frozen backbone, and the model with GLoRA before training."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..backbones import load_backbone
from ..config import SLOTS, LayerShape, PathConfig, SearchSpace, count_choice
from ..injection import inject
from ..models.contents import BATCH_NORMS
from ..models.modules import glora_layers
from ..paths import Paths
from ..presets import apply_preset
from .spec import RunSpec
from .text_models import load_text_classifier


def make_backbone(spec: RunSpec) -> nn.Module:
    """The frozen model with a classifier for the run's classes, of which whatever is fresh depends on the seed alone.

    Of a model for images the classifier is fresh even if the weights have one with as many classes, which was trained
    on something else. A model for texts keeps such a one, as ``from_pretrained`` does.

    Raises:
        ValueError: weights that do not fit, or a model with batch norm, whose running statistics no adapter holds.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(spec.seed)
        model = _text_classifier(spec) if spec.recipe.texts else _image_classifier(spec)
    if any(isinstance(module, BATCH_NORMS) for module in model.modules()):
        raise ValueError(f"model: expected one without batch norm, got {spec.recipe.model.name!r}")
    return model


def _image_classifier(spec: RunSpec) -> nn.Module:
    settings, classes = spec.recipe.model, spec.protocol.classes(spec.dataset)
    model: Any = load_backbone(
        settings.name, classes, weights=spec.weights, drop_path=settings.drop_path, options=settings.options
    )
    model.reset_classifier(classes)
    return model


def _text_classifier(spec: RunSpec) -> nn.Module:
    settings = spec.recipe.model
    assert spec.own is not None  # no protocol has texts
    pretrained = spec.weights is not None
    return load_text_classifier(settings.name, spec.own.classes, pretrained=pretrained, options=settings.options)


def make_model(spec: RunSpec) -> nn.Module:
    """The backbone with GLoRA in it; the path is set if the run has a preset; the classifier stays trainable."""
    model, settings = make_backbone(spec), spec.recipe.model
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(spec.seed)
        inject(model, spec.rank, exclude=settings.exclude, product=spec.product)
        if spec.preset is not None:
            apply_preset(model, spec.preset, spec.rank, bias_free=settings.bias_free)
    return model


def largest_paths(model: nn.Module, space: SearchSpace) -> Paths:
    """The path of every layer that reads most parameters of ``space``."""

    def largest(shape: LayerShape) -> PathConfig:
        options = space.options_for(shape.bias)
        return PathConfig(*(max(options[slot], key=lambda text: count_choice(slot, text, shape)) for slot in SLOTS))

    return {name: largest(layer.shape) for name, layer in glora_layers(model).items()}
