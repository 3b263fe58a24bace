"""The domain ``digits``: scikit-learn's handwritten digits (1,797 grey images of 8 x 8), which ship with the package.

Half of them are the source task, upright. The other half are the target task, shifted: inverted, or
rotated by 90 degrees.
"""

from __future__ import annotations

from functools import partial

import torch

from .domain import FewShot, Source, rates
from .images import TASKS, Halves, draw_images, halved, image_domain, shifts, small_vit, source_of

SOURCE_IMAGES = 900
SHIFTS = shifts(square=3, blur=3)


def load_source() -> Source:
    """The source task for training, and the target half upright: what pre-training should reach."""
    return source_of(_halves(), pixels=1)


def draw_few_shot(task: str, shots: int, seed: int) -> FewShot:
    """``shots`` images per class to train, 4 to validate, all others to test; a function of the seed.

    Raises:
        ValueError: an unknown task, or more shots than there are images.
    """
    if task not in TASKS:
        raise ValueError(f"task: expected one of {sorted(TASKS)}, got {task!r}")
    return draw_images(_halves(), TASKS[task], SHIFTS, shots, seed)


def _halves() -> Halves:
    from sklearn.datasets import load_digits

    digits = load_digits()
    x = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1
    return halved(x, torch.tensor(digits.target), SOURCE_IMAGES)


DIGITS = image_domain(
    name="digits",
    title="Digits",
    tasks=tuple(TASKS),
    model="a ViT pre-trained on upright digits",
    origins=("digits of scikit-learn (UCI, Alpaydin and Kaynak, CC BY 4.0)",),
    extra="demo",
    make_backbone=partial(small_vit, image=8, patch=4),
    draw=draw_few_shot,
    rates={  # bench/results/quality/digits/table.md
        **rates(lora=2e-2, glora=2e-2, full=2e-3),
        **{"linear": 1e-2, "bitfit": 4e-2, "ssf": 1e-2, "lora-attention": 5e-3, "hira": 4e-2, "glora-paper": 1e-2},
    },
    rows=("linear", "bitfit", "ssf", "lora", "full"),
    source=load_source,
)
