"""bench/search_variants.py and search_reuse.py, small: equal costs, figures by hand, and nothing wrong is timed."""

import math
import zlib
from dataclasses import replace

import pytest
import torch
from torch.utils.data import TensorDataset

from bench import search_reuse, search_variants
from glora import Candidate, SearchSettings, SearchSpace, evolve, glora_layers
from glora.evolution.scoring import CandidateScorer
from glora.quickstart.domain import FewShot
from tests.glora.toys import IN_FEATURES, generator, trained_mlp


def data(count):
    return TensorDataset(torch.randn(count, IN_FEATURES, generator=generator(count)), torch.arange(count) % 3)


@pytest.fixture
def trial(monkeypatch):
    """Of a model of two layers, in a space that it has room for."""
    monkeypatch.setattr(search_variants, "SPACE", SearchSpace((2, 1)))
    return search_variants.Trial(trained_mlp(), FewShot(data(4), data(40), data(9), {}), seed=0)


def by_text(model, space, validation, metric, **options):
    """A search whose scores cost nothing."""

    def score(paths, start, stop):
        return (stop - start) * (zlib.crc32(str(paths).encode()) / 2**32 - 1)

    layers = {name: layer.shape for name, layer in glora_layers(model).items()}
    return evolve(layers, space, score, samples=len(validation), **options)


def test_all_variants_cost_the_same(trial, monkeypatch):
    monkeypatch.setattr(search_variants, "search", by_text)
    entries = search_variants.run(trial, 1, lambda text: None)
    costs = {part: {e["cost"] for e in entries if e["part"] == part} for part in ("one limit", "four limits")}
    assert costs == {"one limit": {180}, "four limits": {720}}
    assert [e["variant"] for e in entries[::2]] == list(search_variants.VARIANTS)
    for entry in entries:
        limits = [1.0] if entry["part"] == "one limit" else search_variants.LIMITS
        names = ["parameters"] if entry["part"] == "one limit" else [f"parameters at {share}" for share in limits]
        assert all(entry[name] <= round(share * trial.mean) for name, share in zip(names, limits))
    study = {"seeds": 1, "searches": 1, "entries": entries, "environment": search_reuse.environment("cpu")}
    text = search_variants.tables({**study, "summary": search_variants.summarise(entries)})
    assert text.count("| *minus* | +0.000 |") == 11


def test_hypervolume_by_hand(trial):
    guess, largest = search_variants.GUESS, round(1.25 * trial.mean)
    sizes = [largest // 4, largest // 2]
    found = [
        Candidate({}, -loss * guess, size, 0) for loss, size in [(0.5, sizes[0]), (0.25, sizes[1]), (0.3, largest)]
    ]
    area = 0.5 * (sizes[1] - sizes[0]) + 0.75 * (largest - sizes[1])
    assert trial.hypervolume(found) == pytest.approx(area / largest)
    assert trial.hypervolume([Candidate({}, -2 * guess, 1, 0)]) == 0


def test_summary_by_hand():
    def entry(seed, search, variant, test):
        return {"seed": seed, "search": search, "variant": variant, "part": "one limit", "test": test}

    paper, other = search_variants.PAPER, "front"
    entries = [entry(0, 0, paper, 80), entry(0, 1, paper, 82), entry(1, 0, paper, 90), entry(1, 1, paper, 90)]
    entries += [entry(0, 0, other, 85), entry(0, 1, other, 85), entry(1, 0, other, 91), entry(1, 1, other, 93)]
    found = search_variants.summarise(entries)["one limit"]
    assert found[paper]["test"]["mean"] == 85.5
    assert found[paper]["test"]["std"] == pytest.approx(9 / math.sqrt(2))
    assert found[other]["test"]["minus_paper"] == {"mean": 3.0, "std": pytest.approx(2 / math.sqrt(2))}


SMALL = SearchSettings(population=4, top=2, crossover=2, mutation=2, generations=1)


@pytest.fixture
def small(monkeypatch):
    from timm.models.vision_transformer import VisionTransformer

    sizes = {"img_size": 8, "patch_size": 4, "embed_dim": 8, "depth": 2, "num_heads": 2}
    monkeypatch.setattr("timm.create_model", lambda name: VisionTransformer(**sizes))


def test_reuse_is_measured_candidate_by_candidate(small):
    found = search_reuse.measure("vit_small", 2, replace(SMALL, mutation_probability=0.05), SearchSpace((2,)))
    assert {len(seconds) for seconds in found["seconds"].values()} == {found["candidates"]} == {8}
    assert search_reuse.table([found], search_reuse.environment("cpu")).count("| vit_small, 2 images | 4, 1 x 4 |") == 1


def test_scores_that_differ_are_not_timed(small, monkeypatch):
    right, scored = CandidateScorer.__call__, []

    def wrong(self, *arguments):
        scored.append(self)
        return right(self, *arguments) + 1e-6 * len(scored)

    monkeypatch.setattr(CandidateScorer, "__call__", wrong)
    with pytest.raises(ValueError, match=r"^reuse: expected equal bits"):
        search_reuse.measure("vit_small", 2, SMALL, SearchSpace((2,)))
