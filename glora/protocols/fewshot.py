"""Few-shot transfer to five fine-grained data sets: 1, 2, 4, 8 or 16 images per class, three draws of each.

Images lie as in CoOp's DATASETS.md. Lists lie as in NOAH, from whose repository they come: the draws
``annotations/train_meta.list.num_shot_<shots>.seed_<seed>``; ``val_meta.list``, on which NOAH's search scores its
candidates; and ``test_meta.list``, on which the reported accuracy is measured. Folder names are those of the official
code and NOAH's scripts; NOAH's repository spells some differently. Its one-shot lists of Oxford Pets hold every line
twice, which fills a batch of 64.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from .base import Layout, Protocol
from .images import ImageSettings
from .sources import DataSet, ListSource

_IMAGES = "https://github.com/KaiyangZhou/CoOp/blob/main/DATASETS.md"
_LISTS = "https://github.com/ZhangYuanhan-AI/NOAH/tree/main/data/few-shot"
GROUP = "Fine-grained"


def lists_of(folder: str) -> str:
    """A sentence that says how to get NOAH's lists, which lie in ``folder`` of its few-shot data."""
    return f"Copy the files of {_LISTS}/{folder}/annotations into {{home}}/annotations."


def _data_set(name: str, classes: int, title: str, images: str, section: str, lists: str) -> DataSet:
    obtain = f"Put the images into {images}, as {_IMAGES}#{section} says. {lists_of(lists)}"
    return DataSet(name, classes, GROUP, title, f"{_IMAGES}#{section}", obtain)


DATA_SETS = (
    _data_set("food-101", 101, "Food101", "{home}/images", "food101", "food101"),
    _data_set(
        "stanford_cars", 196, "StanfordCars", "{home}/cars_train and cars_test", "stanfordcars", "standford-cars"
    ),
    _data_set("oxford_flowers", 102, "Flowers102", "{home}/jpg", "flowers102", "oxford-flowers102"),
    _data_set("fgvc_aircraft", 100, "FGVCAircraft", "{home}/images", "fgvcaircraft", "fgvc-aircraft"),
    _data_set("oxford_pets", 37, "OxfordPets", "{home}/images", "oxfordpets", "oxford-pets"),
)
# The folders that a list's paths are relative to. Flowers: `images` in the official code and NOAH, `jpg` in CoOp.
_FOLDERS: Mapping[str, tuple[str, ...]] = {"stanford_cars": (".",), "oxford_flowers": ("images", "jpg")}


class FewShot(Protocol):
    """The few-shot protocol. Training sees only the shots: the validation list is never trained on."""

    name = "fewshot"
    table = DATA_SETS
    shots = (1, 2, 4, 8, 16)
    seeds = (0, 1, 2)
    images = ImageSettings(augment=True, resize="squash_crop")
    trains_last_on = "train"

    def _layout(self, root: Path, about: DataSet, shots: int | None, seed: int) -> Layout:
        home = root / about.name
        folders = tuple(home / name for name in _FOLDERS.get(about.name, ("images",)))

        def split(name: str, repeats: bool = False) -> ListSource:
            file = home / "annotations" / name
            return ListSource(about, home, file, folders, range(about.classes), repeats)

        train = split(shots_list(shots, seed), repeats=True)
        return Layout(train, split("val_meta.list"), train, split("test_meta.list"))


def shots_list(shots: int | None, seed: int) -> str:
    """The name of NOAH's list for one draw."""
    return f"train_meta.list.num_shot_{shots}.seed_{seed}"
