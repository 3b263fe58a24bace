"""The model of a run: the frozen backbone, and the model with GLoRA before training."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..backbones import load_backbone
from ..injection import inject
from ..models.contents import BATCH_NORMS
from ..presets import apply_preset
from .spec import RunSpec


def make_backbone(spec: RunSpec) -> nn.Module:
    """The frozen model with a fresh classifier for the run's classes, drawn from the run's seed alone.

    It is fresh even if the weights have one with as many classes, which was trained on something else.

    Raises:
        ValueError: weights that do not fit, or a model with batch norm, whose running statistics no adapter holds.
    """
    settings = spec.recipe.model
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(spec.seed)
        classes = spec.protocol.classes(spec.dataset)
        model: Any = load_backbone(
            settings.name, classes, weights=spec.weights, drop_path=settings.drop_path, options=settings.options
        )
        model.reset_classifier(classes)
    if any(isinstance(module, BATCH_NORMS) for module in model.modules()):
        raise ValueError(f"model: expected one without batch norm, got {settings.name!r}")
    return model


def make_model(spec: RunSpec) -> nn.Module:
    """The backbone with GLoRA in it; the path is set if the run has a preset; the classifier stays trainable."""
    model, settings = make_backbone(spec), spec.recipe.model
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(spec.seed)
        inject(model, spec.rank, exclude=settings.exclude, product=spec.product)
        if spec.preset is not None:
            apply_preset(model, spec.preset, spec.rank, bias_free=settings.bias_free)
    return model
