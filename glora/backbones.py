"""Backbones: timm's models, with weights from a file or from timm's hub and a fresh head for the task's classes."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

State = dict[str, Tensor]
SUFFIXES = (".npz", ".pth", ".pt", ".bin", ".safetensors")


def load_backbone(
    name: str,
    classes: int,
    *,
    weights: str | os.PathLike | None = None,
    drop_path: float = 0.0,
    options: Mapping[str, Any] | None = None,
) -> nn.Module:
    """A timm model with a head of ``classes`` outputs.

    What is not loaded (the head, unless the file has one of as many classes) is drawn from torch's generator.

    Args:
        name: of the model, as ``timm.list_models()`` has it, with or without a tag.
        weights: a file: ``.npz`` in the layout of Google's ViT (``ViT-B_16.npz``), or a state dict as ``.pth``,
            ``.pt``, ``.bin`` (read with ``weights_only``) or ``.safetensors``; ``"hub"``: what timm downloads for
            ``name``; None: random numbers.
        drop_path: rate of stochastic depth in training.
        options: further arguments of ``timm.create_model``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: an unknown model or suffix; a file that is damaged or of another model, listing the names that are
            missing or unknown; nothing to download, or no way to.
    """
    import timm

    if not timm.is_model(name.partition(".")[0]):
        raise ValueError(f"name: expected a model of timm (timm.list_models()), got {name!r}")
    arguments = {**(options or {}), "num_classes": classes}
    if drop_path:
        arguments["drop_path_rate"] = drop_path
    if weights == "hub":
        return _from_hub(name, arguments)
    model = timm.create_model(name, **arguments)
    if weights is not None:
        _load_file(model, Path(weights))
    return model


def features(model: nn.Module, x: Tensor) -> Tensor:
    """What a timm ``model`` gives its head for images ``x`` (M, 3, height, width): (M, features)."""
    return model.forward_head(model.forward_features(x), pre_logits=True)  # type: ignore[operator]


def _from_hub(name: str, arguments: Mapping[str, Any]) -> nn.Module:
    import timm

    try:
        return timm.create_model(name, pretrained=True, **arguments)
    except (OSError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"weights: timm could not download those of {name!r} ({error}); give a local file instead"
        ) from error


def _load_file(model: nn.Module, file: Path) -> None:
    if file.suffix not in SUFFIXES:
        raise ValueError(f"weights: expected 'hub' or a file that ends in one of {SUFFIXES}, got {str(file)!r}")
    if not file.is_file():
        raise FileNotFoundError(f"weights: expected a file, found none at {str(file)!r}")
    try:
        if file.suffix == ".npz":
            _load_npz(model, file)
        else:
            _load_state(model, file)
    except Exception as error:  # a damaged file may raise anything
        raise ValueError(f"weights: {file} does not fit {type(model).__name__}: {error}") from error


def _load_npz(model: nn.Module, file: Path) -> None:
    load = getattr(model, "load_pretrained", None)
    if load is None:
        raise ValueError("timm reads .npz files for ViT-like models alone")
    load(str(file))


def _load_state(model: nn.Module, file: Path) -> None:
    from timm.models import load_checkpoint

    heads = _head_names(model)
    own = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    translate = _translation(model)

    def without_other_head(state: State, _: nn.Module) -> State:
        state = translate(state)
        fits = all(name in state and tuple(state[name].shape) == own[name] for name in heads)
        return state if fits else {name: tensor for name, tensor in state.items() if name not in heads}

    result = load_checkpoint(model, str(file), strict=False, filter_fn=without_other_head)
    missing = sorted(set(result.missing_keys) - set(heads))
    if missing or result.unexpected_keys:
        raise ValueError(f"missing tensors {missing}, unknown tensors {sorted(result.unexpected_keys)}")


def _head_names(model: nn.Module) -> list[str]:
    """The tensors of the classifier, which timm's models say themselves."""
    inside = {id(tensor) for tensor in model.get_classifier().parameters()}  # type: ignore[operator]
    return [name for name, parameter in model.named_parameters() if id(parameter) in inside]


def _translation(model: nn.Module) -> Callable[[State], State]:
    """From names and shapes that others gave a model's tensors to timm's, where timm has a function for it."""
    known = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    return (lambda state: state) if known is None else (lambda state: known(state, model))
