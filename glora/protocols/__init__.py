"""The paper's three protocols as data: VTAB-1K, few-shot transfer, and ImageNet with its shifted targets; and own data.

>>> splits = protocol("vtab1k").open("data/vtab-1k", "cifar")
>>> glora.train(model, preload(splits.train), recipe, space=space)
"""

from .base import Protocol, Samples, Splits, Target
from .checking import describe_missing
from .fewshot import FewShot
from .imagenet import TARGETS, AmongClasses, ImageNet, imagenet_synsets, subset_classes
from .images import ImageList, ImageSettings, preload, transform_for
from .lists import read_list
from .own import (
    OWN,
    OWN_IMAGES,
    OWN_TEXTS,
    OwnData,
    OwnSplit,
    own_data_from_dict,
    own_protocol,
    split_images,
    split_texts,
)
from .sources import DataSet, Missing
from .texts import TextList, TextSettings
from .vtab import GROUPS, VTAB, average, group_averages

__all__ = [
    "GROUPS",
    "OWN",
    "OWN_IMAGES",
    "OWN_TEXTS",
    "PROTOCOLS",
    "TARGETS",
    "AmongClasses",
    "DataSet",
    "FewShot",
    "ImageList",
    "ImageSettings",
    "Missing",
    "OwnData",
    "OwnSplit",
    "Protocol",
    "Samples",
    "Splits",
    "Target",
    "TextList",
    "TextSettings",
    "average",
    "describe_missing",
    "group_averages",
    "imagenet_synsets",
    "own_data_from_dict",
    "own_protocol",
    "preload",
    "protocol",
    "read_list",
    "split_images",
    "split_texts",
    "subset_classes",
    "transform_for",
]

PROTOCOLS: tuple[Protocol, ...] = (VTAB(), FewShot(), ImageNet())


def protocol(name: str) -> Protocol:
    """The protocol of that name: ``"vtab1k"``, ``"fewshot"`` or ``"imagenet"``.

    Raises:
        ValueError: there is none.
    """
    for candidate in PROTOCOLS:
        if candidate.name == name:
            return candidate
    raise ValueError(f"name: expected one of {tuple(one.name for one in PROTOCOLS)}, got {name!r}")
