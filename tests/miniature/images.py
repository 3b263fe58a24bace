"""The images: handwritten digits (scikit-learn's), gratings, and shapes at a place; 32 x 32, in colour.

Each data set stands in for one of VTAB-1K's three groups under the name and with the class count of a member.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

SIZE = 32
PRETRAINING_DIGITS = 900  # of 1,797, in a fixed order; the others are the target's
Draw = Callable[[int, int, np.random.Generator], np.ndarray]


def digits() -> tuple[np.ndarray, np.ndarray]:
    """All digits in [0, 1] as (n, 24, 24), and their classes, in a fixed order."""
    from sklearn.datasets import load_digits

    loaded = load_digits()
    order = np.random.default_rng(0).permutation(len(loaded.target))
    return np.kron(loaded.images[order] / 16, np.ones((3, 3))), loaded.target[order]


def place(digit: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """The digit in a random colour on a random dark one, moved by up to four pixels: (32, 32, 3)."""
    canvas = np.zeros((SIZE, SIZE))
    row, column = generator.integers(0, SIZE - 24, 2)
    canvas[row : row + 24, column : column + 24] = digit
    ink, paper = 0.7 + 0.3 * generator.random(3), 0.3 * generator.random(3)
    return paper + canvas[..., None] * (ink - paper)


def _svhn() -> Draw:
    """Digits on bright paper, in dark ink: pre-training saw them the other way round."""
    pixels, classes = digits()
    members = [np.flatnonzero(classes[PRETRAINING_DIGITS:] == label) + PRETRAINING_DIGITS for label in range(10)]

    def draw(label: int, split: int, generator: np.random.Generator) -> np.ndarray:
        mine = np.array_split(members[label], [len(members[label]) * 6 // 10, len(members[label]) * 7 // 10])[split]
        return 1 - place(pixels[generator.choice(mine)], generator)

    return draw


def _eurosat() -> Draw:
    """Gratings: five directions, two wavelengths."""

    def draw(label: int, split: int, generator: np.random.Generator) -> np.ndarray:
        direction, wavelength = np.pi * (label % 5 + 0.3 * generator.normal()) / 5, (5, 9)[label // 5]
        rows, columns = np.mgrid[:SIZE, :SIZE]
        phase = 2 * np.pi * (rows * np.sin(direction) + columns * np.cos(direction)) / wavelength
        wave = 0.5 + 0.3 * np.sin(phase + 2 * np.pi * generator.random())
        return wave[..., None] * (0.5 + 0.5 * generator.random(3)) + 0.15 * generator.normal(size=(SIZE, SIZE, 3))

    return draw


def _dsprites_loc() -> Draw:
    """A shape in one of 16 columns, anywhere from top to bottom."""

    def draw(label: int, split: int, generator: np.random.Generator) -> np.ndarray:
        rows, columns = np.mgrid[:SIZE, :SIZE]
        radius = generator.uniform(2.5, 4.5)
        down, across = generator.uniform(4, SIZE - 4), 1.75 * label + 3 + generator.uniform(-0.4, 0.4)
        power = generator.choice([1, 2, 6])  # a diamond, a disc, a square
        inside = np.abs(rows - down) ** power + np.abs(columns - across) ** power < radius**power
        return np.repeat(0.1 + 0.8 * inside[..., None], 3, -1) + 0.1 * generator.normal(size=(SIZE, SIZE, 3))

    return draw


DATASETS: dict[str, tuple[int, Callable[[], Draw]]] = {
    "svhn": (10, _svhn),
    "eurosat": (10, _eurosat),
    "dsprites_loc": (16, _dsprites_loc),
}


def write_datasets(root: Path, train: int = 800, validation: int = 200, test: int = 400) -> None:
    """Every data set as VTAB-1K has it: ``<root>/<name>/images``, and the four lists."""
    for name, (classes, make) in DATASETS.items():
        draw, generator = make(), np.random.default_rng(0)
        (root / name / "images").mkdir(parents=True, exist_ok=True)
        lists = []
        for split, count in enumerate((train, validation, test)):
            lines = []
            for number in range(count):
                label = number % classes
                pixels = np.clip(255 * draw(label, split, generator), 0, 255).astype(np.uint8)
                file = f"images/{('train', 'val', 'test')[split]}_{number:05d}.png"
                Image.fromarray(pixels).save(root / name / file)
                lines.append(f"{file} {label}\n")
            lists.append(lines)
        both = lists[0] + lists[1]
        for file, lines in zip(("train800", "val200", "train800val200", "test"), (lists[0], lists[1], both, lists[2])):
            (root / name / f"{file}.txt").write_text("".join(lines))
