"""Small data sets of PIL images on disk, laid out as the releases are."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

from glora.protocols import imagenet_synsets, protocol, subset_classes

Entry = tuple[str, int]


def picture(file: Path, seed: int = 0, size: tuple[int, int] = (12, 9), mode: str = "RGB") -> None:
    """Noise, as PNG or JPEG by the name."""
    file.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], len(mode)), dtype=np.uint8)
    Image.fromarray(pixels.squeeze()).save(file)


def write_list(file: Path, entries: Iterable[Entry]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(f"{path} {label}\n" for path, label in entries))


def split(home: Path, list_file: str, entries: Iterable[Entry], folder: str = ".") -> None:
    """A list and the pictures it names, each different."""
    entries = list(entries)
    write_list(home / list_file, entries)
    for number, (path, _) in enumerate(entries):
        picture(home / folder / path, seed=number)


def vtab_data(root: Path, dataset: str = "cifar", per_split: int = 3) -> Path:
    home = root / dataset
    last = protocol("vtab1k").classes(dataset) - 1
    for name in ("train800", "val200", "train800val200", "test"):
        labels = [min(number, last) for number in range(per_split - 1)] + [last]
        split(home, f"{name}.txt", [(f"images/{name}/{n:06d}.jpg", label) for n, label in enumerate(labels)])
    return home


def fewshot_data(root: Path, dataset: str, folder: str, shots: int = 1, seed: int = 0) -> Path:
    home = root / dataset
    train = [("a b/one.jpg", 0), ("two.jpg", 1)] * (2 if dataset == "oxford_pets" and shots == 1 else 1)
    split(home, f"annotations/train_meta.list.num_shot_{shots}.seed_{seed}", train, folder)
    split(home, "annotations/val_meta.list", [("three.jpg", 0)], folder)
    split(home, "annotations/test_meta.list", [("four.jpg", 1), ("five.jpg", 2)], folder)
    return home


def imagenet_data(root: Path, seed: int = 0) -> Path:
    """Training images and lists, and the validation set in folders of synsets."""
    home, synsets = root / "imagenet", imagenet_synsets()
    train = [(f"{synsets[label]}/{synsets[label]}_{n}.JPEG", label) for label in (0, 999) for n in (1, 2)]
    split(home, f"annotations/train_meta.list.num_shot_16.seed_{seed}", train, "train")
    other = (f"{synsets[5]}/{synsets[5]}_1.JPEG", 5)
    split(home, "annotations/unofficial_val_list_4_shot16seed0", [train[0], other], "train")
    for label in (3, 0):
        picture(home / "val" / synsets[label] / f"ILSVRC2012_val_{label:08d}.JPEG", seed=label)
    return home


def target_trees(root: Path) -> None:
    """The four targets as their authors' archives lay them out: one picture in the folder of one class."""
    synsets = imagenet_synsets()
    picture(root / "imagenetv2/imagenetv2-matched-frequency-format-val/361/0f.jpeg")
    picture(root / f"imagenet-sketch/images/{synsets[653]}/sketch_23.JPEG")
    picture(root / f"imagenet-adversarial/imagenet-a/{synsets[subset_classes('A')[0]]}/0.003_soap dispenser _ x.jpg")
    picture(root / f"imagenet-rendition/imagenet-r/{synsets[subset_classes('R')[-1]]}/cartoon_19.jpg")
