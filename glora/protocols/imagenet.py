"""16-shot ImageNet, and from it to ImageNet-V2, -Sketch, -A and -R.

Folders are those of CoOp's DATASETS.md, lists those of NOAH. Training images: a list of 16 images per class from
ImageNet's training set, in three draws. Validation: NOAH's ``unofficial_val_list_4_shot16seed0``, other training
images, drawn for the first draw; for each draw its own training images are left out. Test: ImageNet's validation set,
in folders of synsets, or flat with a list ``val_meta.list``. Targets: NOAH's lists if they have been copied, otherwise
the folders of classes.

A and R have 200 of the 1,000 classes. Their authors (``eval.py`` of hendrycks/natural-adv-examples and
hendrycks/imagenet-r) take the greatest of those 200 logits, as :class:`AmongClasses` does. NOAH takes the greatest
of all 1,000, which never gives a higher figure. Labels are always those of the 1,000 classes.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

import torch
from torch import Tensor, nn

from .base import Layout, Protocol
from .fewshot import lists_of, shots_list
from .images import ImageSettings
from .sources import DataSet, Either, ListSource, Source, TreeSource

CLASSES = 1000
_COOP = "https://github.com/KaiyangZhou/CoOp/blob/main/DATASETS.md"
_NOAH = "https://github.com/ZhangYuanhan-AI/NOAH/tree/main/data/domain-generalization"
IMAGENET = DataSet(
    "imagenet",
    CLASSES,
    "ImageNet",
    "ImageNet",
    "https://image-net.org",
    f"Put the folders train and val of ImageNet (https://image-net.org; {_COOP}#imagenet) into {{home}}, each with a "
    f"folder a synset, or val flat and labelled by annotations/val_meta.list. {lists_of('imagenet')}",
)


def _target(name: str, classes: int, title: str, page: str, folder: str) -> DataSet:
    obtain = f"Extract the images of {page} into {{home}}/{folder}, as {_COOP} says. "
    obtain += f"To have them checked, copy {_NOAH}/{name}/annotations into {{home}}/annotations."
    return DataSet(name, classes, "ImageNet", title, page, obtain)


V2_FOLDER = "imagenetv2-matched-frequency-format-val"
TARGETS = {
    "V2": _target("imagenetv2", CLASSES, "ImageNet-V2", "https://github.com/modestyachts/ImageNetV2", V2_FOLDER),
    "Sketch": _target(
        "imagenet-sketch", CLASSES, "ImageNet-Sketch", "https://github.com/HaohanWang/ImageNet-Sketch", "images"
    ),
    "A": _target(
        "imagenet-adversarial", 200, "ImageNet-A", "https://github.com/hendrycks/natural-adv-examples", "imagenet-a"
    ),
    "R": _target("imagenet-rendition", 200, "ImageNet-R", "https://github.com/hendrycks/imagenet-r", "imagenet-r"),
}


class ImageNet(Protocol):
    """16-shot ImageNet with its four targets."""

    name = "imagenet"
    table = (IMAGENET,)
    shots = (16,)
    seeds = (0, 1, 2)
    images = ImageSettings(augment=True, resize="squash_crop")
    trains_last_on = "train"

    def _layout(self, root: Path, about: DataSet, shots: int | None, seed: int) -> Layout:
        home, synsets = root / about.name, imagenet_synsets()
        training_images = (home / "train", home / "images" / "train")
        test_images = (home / "val", home / "images" / "val")

        def listed(name: str, folders: tuple[Path, ...], repeats: bool = False) -> ListSource:
            return ListSource(about, home, home / "annotations" / name, folders, range(CLASSES), repeats)

        train = listed(shots_list(shots, seed), training_images)
        # drawn at random by NOAH: a repeated image does no harm
        validation = listed("unofficial_val_list_4_shot16seed0", training_images, repeats=True)
        tree = TreeSource(about, home, test_images, tuple((name, label) for label, name in enumerate(synsets)))
        test = Either(about, home, tree, listed("val_meta.list", test_images))
        return Layout(train, validation, train, test, _targets(root, synsets))


def _targets(root: Path, synsets: tuple[str, ...]) -> dict[str, tuple[Source, tuple[int, ...] | None]]:
    a, r = subset_classes("A"), subset_classes("R")
    everything = range(CLASSES)
    return {
        "V2": (_source(root, "V2", V2_FOLDER, {str(label): label for label in everything}), None),
        "Sketch": (_source(root, "Sketch", "images", {synsets[label]: label for label in everything}), None),
        "A": (_source(root, "A", "imagenet-a", {synsets[label]: label for label in a}), a),
        "R": (_source(root, "R", "imagenet-r", {synsets[label]: label for label in r}), r),
    }


def _source(root: Path, target: str, folder: str, class_folders: dict[str, int]) -> Source:
    """NOAH's list, which can be checked for completeness; if it is missing, the folders of the classes."""
    about = TARGETS[target]
    home = root / about.name
    listed = ListSource(about, home, home / "annotations" / "val_meta.list", (home,), frozenset(class_folders.values()))
    return Either(about, home, listed, TreeSource(about, home, (home / folder,), tuple(class_folders.items())))


def imagenet_synsets() -> tuple[str, ...]:
    """The WordNet synsets of ImageNet's 1,000 classes in the order of their labels, as timm has them."""
    return tuple(_timm_file("imagenet_synsets.txt"))


def subset_classes(target: str) -> tuple[int, ...]:
    """The labels, among the 1,000, of the 200 classes that ImageNet-A or -R has, ascending, as timm has them.

    Raises:
        ValueError: a target that is neither ``"A"`` nor ``"R"``.
    """
    if target not in ("A", "R"):
        raise ValueError(f"target: expected 'A' or 'R', got {target!r}")
    return tuple(int(label) for label in _timm_file(f"imagenet_{target.lower()}_indices.txt"))


def _timm_file(name: str) -> list[str]:
    return (files("timm.data") / "_info" / name).read_text(encoding="utf-8").split()


class AmongClasses(nn.Module):
    """``model``, made to choose among ``classes``: all other logits become minus infinity.

    Softmax, cross-entropy and argmax are then those over ``classes``, with labels as before.

    Raises:
        ValueError: no classes, or not distinct integers from 0.
    """

    def __init__(self, model: nn.Module, classes: tuple[int, ...]):
        super().__init__()
        if not classes or len(set(classes)) < len(classes) or not all(type(c) is int and c >= 0 for c in classes):
            raise ValueError(f"classes: expected distinct integers from 0, at least one, got {classes!r}")
        self.model, self.classes = model, tuple(classes)

    def forward(self, x: Tensor) -> Tensor:
        logits = self.model(x)
        index = torch.tensor(self.classes, device=logits.device)
        return torch.full_like(logits, -torch.inf).index_copy(-1, index, logits.index_select(-1, index))
