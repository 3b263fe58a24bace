"""Frozen models to adapt: timm's architectures, with weights from its hub or from a local file."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import torch
from torch import Tensor, nn

HUB = "hub"
FORMATS = (".npz", ".pth", ".pt", ".safetensors")
# The paper's backbone: ViT-B/16 trained on ImageNet-21k, timm's vit_base_patch16_224.orig_in21k.
VIT_B_16 = "https://storage.googleapis.com/vit_models/imagenet21k/ViT-B_16.npz"
_SET_HERE = frozenset(
    {"num_classes", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "drop_path_rate"}
)
Build = Callable[..., Any]


def load_backbone(
    name: str,
    classes: int,
    *,
    weights: str | os.PathLike | None = None,
    drop_path: float = 0.0,
    options: Mapping[str, Any] = {},
) -> nn.Module:
    """Make a classifier of timm, for :func:`glora.inject`.

    Weights that are read have to fit: they hold every tensor of the model and nothing else. The exceptions are
    timm's own: it renames the tensors of an architecture's first release, resamples position embeddings and
    patches to another size, and loads a few architectures loosely (DLA, ConvNeXt's ``fcmae``). A classifier head
    that is missing or has another class count is replaced by a fresh one, as in the official code.
    ``reset_classifier`` does that and draws from torch's generator: seed it first.

    Args:
        name: timm's name, as in ``timm.list_models()``, with or without a tag: ``"vit_base_patch16_224.orig_in21k"``.
        classes: outputs of the head.
        weights: None leaves **everything as randomly initialised**. ``"hub"`` loads timm's pretrained
            weights that the tag names. Otherwise a file: ``.npz`` as Google published plain Vision Transformers
            (ViT-B_16.npz, and those of "How to train your ViT?"), ``.safetensors``, or ``.pth`` and ``.pt`` with a
            state dict or one under ``"model"`` or ``"state_dict"`` (averaged weights beside it are preferred). Reading
            them runs no code of theirs.
        drop_path: the largest rate of stochastic depth, that of the last block.
        options: further arguments of ``timm.create_model``, such as ``img_size``.

    Returns:
        The model in training mode, on the CPU, every parameter trainable.

    Raises:
        FileNotFoundError: there is no such file; says what to download, and from where.
        ValueError: an unknown or deprecated name, a value out of range, a file that cannot be read, or one of
            another model; what is missing and what is unexpected is listed. ``"hub"`` where timm has no weights.
        TypeError: options that the architecture does not take.
        ConnectionError: the hub cannot be reached; says how to do without it.
    """
    config = _checked(name, classes, weights, drop_path, options)
    build = partial(_build, name, drop_path, options)
    if weights is None:
        return build(num_classes=classes)
    if weights == HUB:
        model = _from_hub(build, name, config)
    elif Path(weights).suffix == ".npz":
        model = _from_google(build, name, Path(weights), classes)
    else:
        model = _from_state_dict(build, name, Path(weights), config)
    if model.num_classes != classes:
        model.reset_classifier(classes)
    return model


def check_backbone(
    name: str,
    classes: int,
    *,
    weights: str | os.PathLike | None = None,
    drop_path: float = 0.0,
    options: Mapping[str, Any] = {},
) -> None:
    """Raise what :func:`load_backbone` would for these arguments; needs no network and builds no model."""
    _checked(name, classes, weights, drop_path, options)


def features(model: nn.Module, x: Tensor) -> Tensor:
    """The input of a timm model's classifier head: pooled and normalised, ``(n, d)``, for images ``(n, c, h, w)``.

    The caller sets mode and gradients: for features alone, ``model.eval()`` and ``torch.no_grad()``.

    Raises:
        TypeError: a model without timm's ``forward_features`` and ``forward_head``.
    """
    if not (hasattr(model, "forward_features") and hasattr(model, "forward_head")):
        raise TypeError(
            f"model: expected one of timm, with forward_features and forward_head, got {type(model).__name__}"
        )
    found: Any = model
    return found.forward_head(found.forward_features(x), pre_logits=True)


def _checked(
    name: str, classes: int, weights: str | os.PathLike | None, drop_path: float, options: Mapping[str, Any]
) -> Any:
    """timm's configuration of ``name``, after the checks that need no model."""
    config = pretrained_config(name)
    if type(classes) is not int or classes < 1:
        raise ValueError(f"classes: expected an integer from 1, got {classes!r}")
    if isinstance(drop_path, bool) or not isinstance(drop_path, (int, float)) or not 0 <= drop_path < 1:
        raise ValueError(f"drop_path: expected a number from 0 and below 1, got {drop_path!r}")
    if not isinstance(options, Mapping):
        raise TypeError(f"options: expected a mapping of timm's arguments, got {options!r}")
    if _SET_HERE & set(options):
        taken = sorted(_SET_HERE & set(options))
        raise ValueError(f"options: expected none of what the other arguments say, got {taken}")
    if weights == HUB and not config.has_weights:
        raise ValueError(f"weights: expected None or a file, timm has no pretrained weights of {name!r}")
    if weights is not None and weights != HUB:
        _check_file(weights, name, config)
    return config


def pretrained_config(name: str) -> Any:
    """timm's configuration of a model's pretrained weights. Raises TypeError, ValueError for no model of timm."""
    from timm import list_models
    from timm.models import get_deprecated_models, get_pretrained_cfg, is_model

    if not isinstance(name, str):
        raise TypeError(f"name: expected timm's name of a model, got {name!r}")
    architecture, _, tag = name.partition(".")
    if architecture in get_deprecated_models():
        current = get_deprecated_models()[architecture]
        raise ValueError(
            f"name: expected a current name of timm, got the deprecated {name!r}; timm takes it for {current!r}, which "
            "may have other weights than it had"
        )
    if not is_model(name):
        close = difflib.get_close_matches(architecture, list_models(), n=3)
        raise ValueError(f"name: expected a model of timm, got {name!r}; close to it are {close}")
    tagged = [known.partition(".")[2] for known in list_models(architecture, include_tags=True)]
    if tag and tag not in tagged:
        raise ValueError(f"name: expected a tag among {tagged} of timm's {architecture}, got {tag!r}")
    return get_pretrained_cfg(name)


def _check_file(weights: str | os.PathLike, name: str, config: Any) -> None:
    if not isinstance(weights, (str, os.PathLike)):
        raise TypeError(f"weights: expected None, {HUB!r} or a file, got {weights!r}")
    if Path(weights).suffix not in FORMATS:
        raise ValueError(f"weights: expected None, {HUB!r} or a file that ends in {', '.join(FORMATS)}, got {weights}")
    if not Path(weights).is_file():
        raise FileNotFoundError(
            f"weights: expected a file, found none at {os.fspath(weights)!r}; {_where_to_get(name, config)}"
        )


def _where_to_get(name: str, config: Any) -> str:
    """What to download by hand."""
    hub = f"https://huggingface.co/{config.hf_hub_id}" if config.hf_hub_id else None
    sources = [
        f"model.safetensors of {hub} (what weights={HUB!r} loads)" if hub else "",
        config.url if isinstance(config.url, str) else "",
        f"{VIT_B_16} (the paper's, of ImageNet-21k)" if name.partition(".")[0] == "vit_base_patch16_224" else "",
    ]
    known = " or ".join(source for source in sources if source)
    return f"download {known} and give that file" if known else f"timm publishes no weights of {name!r}"


def _build(name: str, drop_path: float, options: Mapping[str, Any], **loading: Any) -> Any:
    from timm import create_model

    try:
        return create_model(name, drop_path_rate=drop_path or None, **options, **loading)
    except TypeError as error:
        raise TypeError(
            f"options: expected arguments of timm's {name}, got {dict(options)} and drop_path={drop_path}: {error}"
        ) from error


def _from_hub(build: Build, name: str, config: Any) -> Any:
    """The model with the head that the weights came with."""
    try:
        return build(pretrained=True)
    except OSError as error:
        raise ConnectionError(
            f"weights: expected timm's hub to hold or to have left in its cache the weights of {name!r}: {error}; "
            f"without a network {_where_to_get(name, config)}: weights='/path/to/it'"
        ) from error
    except RuntimeError as error:
        raise _other_model(name, f"weights of {config.hf_hub_id or config.url}", error) from error


def _from_state_dict(build: Build, name: str, file: Path, config: Any) -> Any:
    """The model with the head of the file, or without a head if the file has none."""
    from timm.models import load_state_dict

    with _reading(file):
        found = load_state_dict(str(file))
    # with its own class count, timm would drop a head, and then overlook whatever else is missing
    loading = {"file": str(file), "num_classes": _head_classes(found, config.classifier)}
    try:
        return build(pretrained=True, num_classes=loading["num_classes"], pretrained_cfg_overlay=loading)
    except (RuntimeError, KeyError, AttributeError) as error:
        raise _other_model(name, str(file), error) from error


def _head_classes(tensors: Mapping[str, Tensor], classifier: str | tuple[str, ...] | None) -> int:
    """The number of classes of a state dict's head, 0 without one; ``head.fc`` was ``head`` in first releases."""
    name = classifier[0] if isinstance(classifier, tuple) else classifier or ""
    while name:
        if f"{name}.weight" in tensors:
            return len(tensors[f"{name}.weight"])
        name = name.rpartition(".")[0]
    return 0


def _from_google(build: Build, name: str, file: Path, classes: int) -> Any:
    """The model with the head of the file if that has ``classes`` outputs, else without a head."""
    from timm.models.vision_transformer import VisionTransformer

    names, head = _google_contents(file)
    model = build(num_classes=classes if head == classes else 0)
    if type(model) is not VisionTransformer:
        raise ValueError(f"weights: expected no .npz, which holds a plain Vision Transformer, for {name!r}; got {file}")
    wanted = _google_names(len(model.blocks))
    missing, unexpected = sorted(wanted - names), sorted(names - wanted)
    if missing or unexpected:
        raise _other_model(name, str(file), f"missing {missing}, unexpected {unexpected}")
    # timm copies what it knows and is silent about the rest: a layer scale, another norm
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
    try:
        model.load_pretrained(str(file))
    except (RuntimeError, KeyError, NotImplementedError, BadZipFile) as error:
        raise _other_model(name, str(file), error) from error
    unread = [each for each, parameter in model.named_parameters() if not parameter.isfinite().all()]
    if unread:
        raise _other_model(name, str(file), f"no finite values for {unread}")
    return model


def _google_contents(file: Path) -> tuple[set[str], int]:
    """The names of the arrays without the optional head and pre-logits, and the number of classes of the head."""
    import numpy as np

    # opened here: np.load leaves a damaged file open if it opened it
    with _reading(file), open(file, "rb") as stream, np.load(stream, allow_pickle=False) as arrays:
        names = set(arrays.files)
        head = len(arrays["head/bias"]) if "head/bias" in names else 0
    return {name for name in names if name.partition("/")[0] not in ("head", "pre_logits")}, head


def _google_names(depth: int) -> set[str]:
    """The arrays of a plain Vision Transformer as https://github.com/google-research/vision_transformer saves it."""
    dense, norm = ("kernel", "bias"), ("scale", "bias")
    attention = {f"MultiHeadDotProductAttention_1/{layer}": dense for layer in ("query", "key", "value", "out")}
    block = {"LayerNorm_0": norm, **attention, "LayerNorm_2": norm}
    block |= {f"MlpBlock_3/Dense_{i}": dense for i in range(2)}
    layers = {"embedding": dense, "Transformer/encoder_norm": norm}
    for i in range(depth):
        layers |= {f"Transformer/encoderblock_{i}/{layer}": leaves for layer, leaves in block.items()}
    names = {f"{layer}/{leaf}" for layer, leaves in layers.items() for leaf in leaves}
    return names | {"cls", "Transformer/posembed_input/pos_embedding"}


@contextmanager
def _reading(file: Path) -> Iterator[None]:
    """Turn whatever a reader of somebody else's files raises into a ValueError that names ``file``."""
    try:
        yield
    except Exception as error:
        raise ValueError(
            f"weights: expected a {file.suffix} file of weights, {file} is damaged or something else ({error})"
        ) from error


def _other_model(name: str, source: str, reason: object) -> ValueError:
    return ValueError(f"weights: expected those of {name!r}, {source} does not fit: {reason}")
