"""What the domains of images share: tasks that are shifts of the source, few-shot draws, and tests under corruption.

Pixels are within [-1, 1], so that inverting is a change of sign.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from .domain import Domain, FewShot, Source, split_by_class

CLASSES = 10
VALIDATION_PER_CLASS = 4
Shift = Callable[[Tensor], Tensor]
TASKS: dict[str, Shift] = {"inverted": lambda x: -x, "rotated90": lambda x: torch.rot90(x, 1, (-2, -1))}


class Halves(NamedTuple):
    """Images and labels: the source task, upright, and what target tasks are drawn from."""

    source: tuple[Tensor, Tensor]
    target: tuple[Tensor, Tensor]


class Moved(TensorDataset):
    """Images moved by up to ``pixels`` each way, at random, whenever they are read."""

    def __init__(self, x: Tensor, y: Tensor, pixels: int):
        super().__init__(x, y)
        self.pixels = pixels

    def __getitem__(self, index):
        x, target = super().__getitem__(index)
        most = self.pixels
        padded = F.pad(x, (most, most, most, most), value=float(x.min()))
        down, right = torch.randint(2 * most + 1, (2, len(x))).tolist()
        size = x.shape[-1]
        moved = [image[:, i : i + size, j : j + size] for image, i, j in zip(padded, down, right)]
        return torch.stack(moved), target


# A domain of images, without what differs.
image_domain = partial(
    Domain,
    classes=CLASSES,
    samples="images",
    validation=VALIDATION_PER_CLASS,
    shots=16,
    curve=(1, 2, 4, 8, 16),
    attention=("qkv",),
    pretraining_steps=1000,
)


def small_vit(image: int, patch: int) -> nn.Module:
    """An untrained vision transformer of about 200,000 parameters for grey images."""
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(
        img_size=image, patch_size=patch, in_chans=1, num_classes=CLASSES, embed_dim=64, depth=4, num_heads=4
    )


def halved(x: Tensor, y: Tensor, source: int) -> Halves:
    """The first ``source`` of a shuffle that is always the same, and the others."""
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    one, other = order[:source], order[source:]
    return Halves((x[one], y[one]), (x[other], y[other]))


def source_of(halves: Halves, pixels: int) -> Source:
    """The source task for training, and the target half upright: what pre-training should reach."""
    return Source(Moved(*halves.source, pixels), TensorDataset(*halves.target))


def draw_images(
    halves: Halves, change: Shift, shifts: dict[str, Shift], shots: int, seed: int, most: int | None = None
) -> FewShot:
    """``shots`` images a class to train, 4 to validate, the others to test, at most ``most``; by the seed."""
    x, y = change(halves.target[0]), halves.target[1]
    train, validation, rest = (
        mask.nonzero().flatten() for mask in split_by_class(y, shots, VALIDATION_PER_CLASS, seed)
    )
    test = rest[:most]
    shifted = {name: TensorDataset(shift(x[test]), y[test]) for name, shift in shifts.items()}
    drawn = [TensorDataset(x[rows], y[rows]) for rows in (train, validation, test)]
    return FewShot(drawn[0], drawn[1], drawn[2], shifted)


def shifts(square: int, blur: int) -> dict[str, Shift]:
    """Corruptions by name, never trained on: the mean test accuracy over them is the generalisation figure.

    Args:
        square: the side of the grey square that covers a part of each image.
        blur: the side of the window that a pixel becomes the mean of; odd.
    """

    def noise(x: Tensor) -> Tensor:
        return x + 0.5 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1))

    def occlusion(x: Tensor) -> Tensor:
        places = x.shape[-1] - square + 1
        rows, columns = torch.randint(places, (2, len(x)), generator=torch.Generator().manual_seed(2)).tolist()
        occluded = x.clone()
        for image, i, j in zip(occluded, rows, columns):
            image[:, i : i + square, j : j + square] = 0
        return occluded

    def blurred(x: Tensor) -> Tensor:
        margin = blur // 2
        return F.avg_pool2d(F.pad(x, (margin,) * 4, mode="replicate"), blur, stride=1)

    return {"noise": noise, "occlusion": occlusion, "contrast": lambda x: 0.4 * x, "blur": blurred}
