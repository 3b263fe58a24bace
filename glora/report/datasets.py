"""The protocols' data sets: the names of their folders, as the tables of the paper call them, and their groups."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean
from typing import NamedTuple


class DataSet(NamedTuple):
    """``title`` is the paper's name; ``group`` is one of :data:`GROUPS` for VTAB-1K."""

    title: str
    group: str = ""


GROUPS = ("Natural", "Specialized", "Structured")
VTAB = {
    "cifar": DataSet("CIFAR-100", "Natural"),
    "caltech101": DataSet("Caltech101", "Natural"),
    "dtd": DataSet("DTD", "Natural"),
    "oxford_flowers102": DataSet("Flowers102", "Natural"),
    "oxford_iiit_pet": DataSet("Pets", "Natural"),
    "svhn": DataSet("SVHN", "Natural"),
    "sun397": DataSet("Sun397", "Natural"),
    "patch_camelyon": DataSet("Camelyon", "Specialized"),
    "eurosat": DataSet("EuroSAT", "Specialized"),
    "resisc45": DataSet("Resisc45", "Specialized"),
    "diabetic_retinopathy": DataSet("Retinopathy", "Specialized"),
    "clevr_count": DataSet("Clevr-Count", "Structured"),
    "clevr_dist": DataSet("Clevr-Dist", "Structured"),
    "dmlab": DataSet("DMLab", "Structured"),
    "kitti": DataSet("KITTI-Dist", "Structured"),
    "dsprites_loc": DataSet("dSpr-Loc", "Structured"),
    "dsprites_ori": DataSet("dSpr-Ori", "Structured"),
    "smallnorb_azi": DataSet("sNORB-Azim", "Structured"),
    "smallnorb_ele": DataSet("sNORB-Ele", "Structured"),
}
FEW_SHOT = {
    "food-101": DataSet("Food101"),
    "stanford_cars": DataSet("StanfordCars"),
    "oxford_flowers": DataSet("Flowers102"),
    "fgvc_aircraft": DataSet("FGVCAircraft"),
    "oxford_pets": DataSet("OxfordPets"),
}
SHOTS = (1, 2, 4, 8, 16)
IMAGENET = {"imagenet": DataSet("ImageNet")}
TARGETS = ("V2", "Sketch", "A", "R")
_PROTOCOLS = {"vtab1k": VTAB, "fewshot": FEW_SHOT, "imagenet": IMAGENET}


def data_sets(protocol: str) -> Mapping[str, DataSet]:
    """A protocol's data sets by folder name, in the paper's order. Raises ValueError for an unknown protocol."""
    if protocol not in _PROTOCOLS:
        raise ValueError(f"protocol: expected one of {list(_PROTOCOLS)}, got {protocol!r}")
    return _PROTOCOLS[protocol]


def group_of(group: str) -> list[str]:
    """The data sets of one of VTAB-1K's groups."""
    return [name for name, about in VTAB.items() if about.group == group]


def average(accuracies: Mapping[str, float]) -> float:
    """VTAB-1K's average: the mean of the three groups' means, over all 19 data sets."""
    return fmean(fmean(accuracies[name] for name in group_of(group)) for group in GROUPS)
