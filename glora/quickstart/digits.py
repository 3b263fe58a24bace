"""The data: scikit-learn's handwritten digits (1,797 grey images of 8 x 8), which ship with the package.

Half of them are the source task, upright. The other half are the target task, shifted: inverted, or
rotated by 90 degrees. Pixels are scaled to [-1, 1], so that inverting is a change of sign.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import TensorDataset

CLASSES = 10
SOURCE_IMAGES = 900
VALIDATION_PER_CLASS = 4
TASKS = {"inverted": lambda x: -x, "rotated90": lambda x: torch.rot90(x, 1, (-2, -1))}


class FewShot(NamedTuple):
    """One few-shot draw of a target task; the test split is everything that was not drawn."""

    train: TensorDataset
    validation: TensorDataset
    test: TensorDataset
    shifted_tests: dict[str, TensorDataset]


class ShiftedByOne(TensorDataset):
    """Images moved by up to one pixel each way, at random, whenever they are read."""

    def __getitem__(self, index):
        x, target = super().__getitem__(index)
        padded = F.pad(x, (1, 1, 1, 1), value=float(x.min()))
        down, right = torch.randint(3, (2, len(x))).tolist()
        size = x.shape[-1]
        moved = [image[:, i : i + size, j : j + size] for image, i, j in zip(padded, down, right)]
        return torch.stack(moved), target


def load_source() -> tuple[ShiftedByOne, TensorDataset]:
    """The source task for training, and the target half upright: what pre-training should reach."""
    (x, y), (target_x, target_y) = _halves()
    return ShiftedByOne(x, y), TensorDataset(target_x, target_y)


def draw_few_shot(task: str, shots: int, seed: int) -> FewShot:
    """``shots`` images per class to train, 4 to validate, all others to test; a function of the seed.

    Raises:
        ValueError: an unknown task, or more shots than there are images.
    """
    if task not in TASKS:
        raise ValueError(f"task: expected one of {sorted(TASKS)}, got {task!r}")
    _, (x, y) = _halves()
    x = TASKS[task](x)
    most = int(y.bincount().min()) - VALIDATION_PER_CLASS - 1
    if not 1 <= shots <= most:
        raise ValueError(f"shots: expected 1 to {most}, got {shots}")
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    place = torch.empty_like(order)  # how many images of the same class come earlier in the order
    for label in range(CLASSES):
        members = order[y[order] == label]
        place[members] = torch.arange(len(members))
    train, validation = place < shots, (place >= shots) & (place < shots + VALIDATION_PER_CLASS)
    test = place >= shots + VALIDATION_PER_CLASS
    shifted = {name: TensorDataset(shift(x[test]), y[test]) for name, shift in SHIFTS.items()}
    drawn = [TensorDataset(x[mask], y[mask]) for mask in (train, validation, test)]
    return FewShot(drawn[0], drawn[1], drawn[2], shifted)


def _halves() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Source and target; the split is always the same."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    x = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1
    y = torch.tensor(digits.target)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    source, target = order[:SOURCE_IMAGES], order[SOURCE_IMAGES:]
    return (x[source], y[source]), (x[target], y[target])


def _noise(x: Tensor) -> Tensor:
    return x + 0.5 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1))


def _occlusion(x: Tensor) -> Tensor:
    """A grey square of 3 x 3 at a random place of each image."""
    rows, columns = (torch.randint(6, (2, len(x)), generator=torch.Generator().manual_seed(2))).tolist()
    occluded = x.clone()
    for image, i, j in zip(occluded, rows, columns):
        image[:, i : i + 3, j : j + 3] = 0
    return occluded


def _contrast(x: Tensor) -> Tensor:
    return 0.4 * x


def _blur(x: Tensor) -> Tensor:
    return F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, stride=1)


# Never trained on: the mean test accuracy over these is the domain-generalisation figure.
SHIFTS = {"noise": _noise, "occlusion": _occlusion, "contrast": _contrast, "blur": _blur}
