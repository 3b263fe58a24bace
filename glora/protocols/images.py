"""Images as (tensor, class): how a picture becomes a tensor, a data set of files, and a data set that is decoded once.

The settings are those of the official code (Arnav0400/ViT-Slim, GLoRA/data) and of NOAH (ZhangYuanhan-AI/NOAH,
lib/datasets.py), which agree. VTAB-1K: squash to a square, without augmentation, also in training. Few-shot and
ImageNet: timm's training augmentation (random crop and flip, RandAugment, random erasing); tests squash to 256/224 of
the size and cut out the centre. All images are normalised by ImageNet's mean and deviation, although the ImageNet-21k
checkpoint was pre-trained with others.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

from ..progress import progress_bar

INTERPOLATIONS = ("nearest", "bilinear", "bicubic")
RESIZES = ("squash", "squash_crop")


@dataclass(frozen=True)
class ImageSettings:
    """How a picture becomes a tensor ``(3, size, size)``, float32.

    Args:
        size: pixels per side.
        mean: of the normalisation, one number per channel, for pixels in 0 to 1; the default is ImageNet's.
        std: as ``mean``.
        interpolation: one of ``INTERPOLATIONS``.
        augment: timm's training augmentation, only for training images.
        resize: ``"squash"``: to ``(size, size)`` from any shape; ``"squash_crop"``: to 256/224 of that, then the
            centre. Used wherever ``augment`` does not apply.

    Raises:
        ValueError: a value out of range.
    """

    size: int = 224
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    interpolation: str = "bicubic"
    augment: bool = False
    resize: str = "squash"

    def __post_init__(self) -> None:
        if type(self.size) is not int or self.size < 1:
            raise ValueError(f"size: expected an integer from 1, got {self.size!r}")
        for name in ("mean", "std"):
            object.__setattr__(self, name, _three_numbers(name, getattr(self, name)))
        if not min(self.std) > 0:
            raise ValueError(f"std: expected numbers above 0, got {self.std}")
        for name, known in (("interpolation", INTERPOLATIONS), ("resize", RESIZES)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}: expected one of {known}, got {getattr(self, name)!r}")
        if not isinstance(self.augment, bool):
            raise ValueError(f"augment: expected True or False, got {self.augment!r}")


def _three_numbers(name: str, values: Any) -> tuple[float, ...]:
    """Three numbers as a tuple; lists are accepted, since TOML and JSON have no tuples."""
    numbers = isinstance(values, (tuple, list)) and all(type(value) in (int, float) for value in values)
    if not numbers or len(values) != 3:
        raise ValueError(f"{name}: expected three numbers, got {values!r}")
    return tuple(values)


def transform_for(settings: ImageSettings, train: bool) -> Callable[[Any], Tensor]:
    """The transform from a PIL image in RGB to a tensor ``(3, size, size)``; random if ``train and augment``."""
    from torchvision import transforms

    if train and settings.augment:
        return _augmentation(settings)
    size, interpolation = settings.size, transforms.InterpolationMode(settings.interpolation)
    if settings.resize == "squash":
        reshape = [transforms.Resize((size, size), interpolation)]
    else:
        larger = int(256 / 224 * size)
        reshape = [transforms.Resize((larger, larger), interpolation), transforms.CenterCrop(size)]
    return transforms.Compose([*reshape, transforms.ToTensor(), transforms.Normalize(settings.mean, settings.std)])


def _augmentation(settings: ImageSettings) -> Callable[[Any], Tensor]:
    from timm.data import create_transform
    from timm.data.auto_augment import RandAugment, posterize

    transform = create_transform(
        settings.size,
        is_training=True,
        color_jitter=0.4,
        auto_augment="rand-m9-mstd0.5-inc1",
        interpolation=settings.interpolation,
        mean=settings.mean,
        std=settings.std,
        re_prob=0.25,
        re_mode="pixel",
        re_count=1,
    )
    for step in transform.transforms:
        for operation in step.ops if isinstance(step, RandAugment) else ():
            if operation.aug_fn is posterize:
                operation.aug_fn = _posterize
    return transform


def _posterize(image: Any, bits: int, **_: Any) -> Any:
    """timm's, which asks for 0 bits at its largest magnitude: a black image, where Pillow 13 raises."""
    from PIL import Image, ImageOps

    if bits >= 8:
        return image
    return ImageOps.posterize(image, bits) if bits > 0 else Image.new(image.mode, image.size)


class ImageList(Dataset):
    """A map-style data set of ``(tensor, class)`` from image files, decoded to RGB whenever they are read.

    Args:
        root: the folder that the paths are relative to.
        entries: ``(relative path, class)`` pairs.
        transform: from a PIL image to a tensor, as of :func:`transform_for`.
        random: whether the transform is random; such a list cannot be preloaded.
    """

    noun = "images"

    def __init__(
        self,
        root: str | os.PathLike,
        entries: Iterable[tuple[str, int]],
        transform: Callable[[Any], Tensor],
        *,
        random: bool = False,
    ):
        self.root, self.entries, self.transform, self.random = Path(root), tuple(entries), transform, random

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def identity(self) -> list:
        """What tells the list from others; the images are not read."""
        return list(self.entries)

    def of(self, entries: Iterable[tuple[str, int]]) -> ImageList:
        """The same list of other ``entries``."""
        return ImageList(self.root, entries, self.transform, random=self.random)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        from torchvision.datasets.folder import pil_loader

        path, label = self.entries[index]
        try:
            image = pil_loader(self.root / path)
        except OSError as error:
            raise ValueError(f"{self.root / path}: expected an image that can be read ({error})") from error
        return self.transform(image), label


def preload(dataset: ImageList, progress: bool = True) -> TensorDataset:
    """The same samples, bit for bit, decoded once: images ``(n, 3, size, size)`` and classes ``(n,)``, int64.

    At 224 pixels an image takes 588 KiB, so the 1,000 of VTAB-1K take 0.6 GB; streaming decodes each once per epoch.

    Raises:
        ValueError: an empty list, or random transforms.
    """
    if dataset.random:
        raise ValueError("dataset: expected a deterministic transform, got one that augments at random")
    if not len(dataset):
        raise ValueError("dataset: expected at least one image, got none")
    first, _ = dataset[0]
    images = torch.empty(len(dataset), *first.shape, dtype=first.dtype)
    classes = torch.empty(len(dataset), dtype=torch.int64)
    for i in progress_bar(range(len(dataset)), desc="decode", unit="image", shown=progress):
        images[i], classes[i] = dataset[i]
    return TensorDataset(images, classes)
