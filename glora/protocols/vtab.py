"""VTAB-1K: 19 data sets of 1,000 training images each, and the average that papers report.

The layout is the one that NOAH's script writes and the official code reads (GLoRA/data/vtab.py): one folder per data
set with ``train800.txt``, ``val200.txt``, ``train800val200.txt`` and ``test.txt``, whose paths are relative to the
folder (``images/test/000000.jpg 3``). Folder names and class counts are those of the official code.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from statistics import fmean

from .base import Layout, Protocol
from .images import ImageSettings
from .sources import DataSet, ListSource

GROUPS = ("Natural", "Specialized", "Structured")
_CATALOGUE = "https://www.tensorflow.org/datasets/catalog/"
_OBTAIN = (
    "Make the 19 folders with get_vtab1k.py of NOAH (https://github.com/ZhangYuanhan-AI/NOAH#data-preparation), or "
    "take them ready from RepAdapter (https://github.com/luogen1996/RepAdapter#data-preparation), and put them into "
    "{root}."
)


def _table(*rows: tuple[str, int, str, str, str]) -> tuple[DataSet, ...]:
    return tuple(DataSet(name, n, group, title, _CATALOGUE + page, _OBTAIN) for name, n, group, title, page in rows)


DATA_SETS = _table(
    ("cifar", 100, "Natural", "CIFAR-100", "cifar100"),
    ("caltech101", 102, "Natural", "Caltech101", "caltech101"),
    ("dtd", 47, "Natural", "DTD", "dtd"),
    ("oxford_flowers102", 102, "Natural", "Flowers102", "oxford_flowers102"),
    ("oxford_iiit_pet", 37, "Natural", "Pets", "oxford_iiit_pet"),
    ("svhn", 10, "Natural", "SVHN", "svhn_cropped"),
    ("sun397", 397, "Natural", "Sun397", "sun397"),
    ("patch_camelyon", 2, "Specialized", "Camelyon", "patch_camelyon"),
    ("eurosat", 10, "Specialized", "EuroSAT", "eurosat"),
    ("resisc45", 45, "Specialized", "Resisc45", "resisc45"),
    ("diabetic_retinopathy", 5, "Specialized", "Retinopathy", "diabetic_retinopathy_detection"),
    ("clevr_count", 8, "Structured", "Clevr-Count", "clevr"),
    ("clevr_dist", 6, "Structured", "Clevr-Dist", "clevr"),
    ("dmlab", 6, "Structured", "DMLab", "dmlab"),
    ("kitti", 4, "Structured", "KITTI-Dist", "kitti"),
    ("dsprites_loc", 16, "Structured", "dSpr-Loc", "dsprites"),
    ("dsprites_ori", 16, "Structured", "dSpr-Ori", "dsprites"),
    ("smallnorb_azi", 18, "Structured", "sNORB-Azim", "smallnorb"),
    ("smallnorb_ele", 9, "Structured", "sNORB-Ele", "smallnorb"),
)


class VTAB(Protocol):
    """VTAB-1K; the data do not depend on a seed."""

    name = "vtab1k"
    table = DATA_SETS
    shots = (None,)
    seeds = ()
    images = ImageSettings()

    def _layout(self, root: Path, about: DataSet, shots: int | None, seed: int) -> Layout:
        home = root / about.name

        def split(name: str) -> ListSource:
            return ListSource(about, home, home / f"{name}.txt", (home,), range(about.classes))

        return Layout(split("train800"), split("val200"), split("train800val200"), split("test"))


def group_averages(accuracies: Mapping[str, float]) -> dict[str, float]:
    """The mean accuracy of each group, from an accuracy for every one of the 19 data sets.

    Raises:
        ValueError: data sets are missing, or do not belong to VTAB-1K; all are named.
    """
    names = [about.name for about in DATA_SETS]
    absent = [name for name in names if name not in accuracies]
    unknown = sorted(set(accuracies) - set(names))
    if absent or unknown:
        raise ValueError(
            f"accuracies: expected one for each of the {len(names)} data sets, got {len(accuracies)}; "
            f"missing: {', '.join(absent) or 'none'}; unknown: {', '.join(unknown) or 'none'}"
        )
    return {group: fmean(accuracies[about.name] for about in DATA_SETS if about.group == group) for group in GROUPS}


def average(accuracies: Mapping[str, float]) -> float:
    """The mean of the three means of :func:`group_averages`, as papers report it; not the mean of the 19 data sets.

    Raises:
        ValueError: as for :func:`group_averages`.
    """
    return fmean(group_averages(accuracies).values())
