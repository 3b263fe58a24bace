"""Loss and accuracy of a classifier, and of a candidate path at merged speed."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from .config import PathConfig
from .distributed import require_whole
from .modules import evaluating, replaced_modules, require_layers
from .paths import check_names, using_paths


class Metrics(NamedTuple):
    """Mean cross-entropy and accuracy (0 to 1) over ``samples``."""

    loss: float
    accuracy: float
    samples: int


@torch.no_grad()
def evaluate(model: nn.Module, dataset: Dataset, batch_size: int = 256) -> Metrics:
    """Mean cross-entropy and accuracy of ``model`` on ``(input, class)`` pairs, in eval mode.

    Raises:
        ValueError: an empty data set.
    """
    device = next(model.parameters()).device
    loss, right, samples = 0.0, 0, 0
    with evaluating(model):
        # a generator of its own: without it the loader draws from torch's, which dropout uses
        for x, target in DataLoader(dataset, batch_size, generator=torch.Generator()):
            logits = model(x.to(device))
            target = target.to(device)
            loss += float(F.cross_entropy(logits.float(), target, reduction="sum"))
            right += int((logits.argmax(-1) == target).sum())
            samples += len(target)
    if not samples:
        raise ValueError("dataset: expected at least one sample, got none")
    return Metrics(loss / samples, right / samples, samples)


def evaluate_merged(
    model: nn.Module, paths: Mapping[str, PathConfig], dataset: Dataset, batch_size: int = 256
) -> Metrics:
    """As :func:`evaluate`, with every layer merged under ``paths`` for the time of the call.

    Each W_eff is assembled once, not once a batch; layers with a quantised base are used unmerged. The
    model and its paths are left as they are.

    Raises:
        ValueError: an empty data set, paths of another model, or sharded parameters.
    """
    require_whole(model)
    layers = require_layers(model)
    check_names("paths", paths, layers)
    exact = {name: layer for name, layer in layers.items() if layer.merges_exactly}
    merged: dict[nn.Module, nn.Module] = {layer: layer.merge(paths[name], safe=False) for name, layer in exact.items()}
    unmerged = using_paths(model, paths) if len(exact) < len(layers) else nullcontext()
    with unmerged, replaced_modules(model, merged):
        return evaluate(merged.get(model, model), dataset, batch_size)
