"""Successive halving: which samples each rung has, who goes on, what it costs, and that nothing else changes."""

import math
import zlib
from collections import Counter, defaultdict

import pytest
import torch
from torch.utils.data import Dataset, Subset, TensorDataset

from glora import SearchSettings, SearchSpace, evaluate_merged, evolve, search
from glora.evolution.halving import balanced_order, classes_of, rung_ends
from tests.glora.evolution.test_evolution import LAYERS, QUICK, SPACE, additive, journal, scored, settings
from tests.glora.toys import IN_FEATURES, generator, points, trained_mlp, unchanged

__all__ = ["journal"]  # the fixture
SAMPLES = 24
RUNGS = (0.25, 0.5, 1)


def noise(paths, sample):
    """What a sample adds to the score of a candidate: another for each of both."""
    return zlib.crc32(f"{sample} {paths}".encode()) / 2**32


def of_part(paths, start, stop):
    return (stop - start) * additive(paths) + sum(noise(paths, sample) for sample in range(start, stop))


class Parts:
    """Counts the samples that each candidate was scored on."""

    def __init__(self, cut=math.inf):
        self.seen, self.cut, self.calls = defaultdict(list), cut, 0

    def __call__(self, paths, start, stop):
        self.calls += 1
        if self.calls == self.cut:
            raise InterruptedError
        self.seen[tuple(paths.values())] += range(start, stop)
        return of_part(paths, start, stop)

    @property
    def samples(self):
        return sum(map(len, self.seen.values()))


def run(evaluate=of_part, settings=settings(halving=RUNGS), samples=SAMPLES, **options):
    return evolve(LAYERS, SPACE, evaluate, settings=settings, samples=samples, progress=False, **options)


def generation(result, number):
    return [c for c in result.history if c.generation == number]


# -- who goes on -------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", ["score", "front"])
def test_of_each_rung_the_better_half_goes_on(objective):
    result = run(settings=settings(halving=RUNGS, objective=objective, population=11))
    for number in range(QUICK.generations + 1):
        shares = Counter(c.share for c in generation(result, number))
        assert shares == ({0.25: 5, 0.5: 3, 1: 3} if number == 0 else {0.25: 5, 0.5: 2, 1: 3})
    for number in range(QUICK.generations + 1 if objective == "score" else 0):
        for share, end in zip(RUNGS[:-1], rung_ends(RUNGS, SAMPLES)):
            there = [c for c in generation(result, number) if c.share >= share]
            scores = {c: of_part(c.paths, 0, end) / end for c in map(Hashable, there)}
            stayed = max(scores[c] for c in scores if c.share == share)
            assert all(scores[c] >= stayed for c in scores if c.share > share)


class Hashable:
    """A candidate as a key."""

    def __init__(self, candidate):
        self.paths, self.share = candidate.paths, candidate.share


def test_a_score_is_the_mean_over_the_samples_of_all_rungs_that_were_reached():
    for c in run().history:
        assert c.score == pytest.approx(of_part(c.paths, 0, round(c.share * SAMPLES)) / (c.share * SAMPLES))


def test_every_rung_evaluates_the_new_samples_alone():
    parts = Parts()
    result = run(parts)
    for c in result.history:
        assert parts.seen[tuple(c.paths.values())] == list(range(round(c.share * SAMPLES)))
    assert result.cost == parts.samples / SAMPLES
    # of 10: 10 on a quarter, 5 on another, 3 on a half; five generations
    assert result.cost == 5 * (10 / 4 + 5 / 4 + 3 / 2)
    assert result.evaluated == parts.calls == 5 * (10 + 5 + 3)


def test_only_whole_scores_are_the_best_parents_or_on_the_front():
    """A quarter of the samples scores much higher than all of them."""

    def flattering(paths, start, stop):
        return of_part(paths, start, stop) + (1000 * (stop - start) if stop <= 6 else 0)

    result = run(flattering)
    assert max(c.score for c in result.history if c.share == 0.25) > result.best.score
    assert result.best.share == 1
    assert {c.share for c in result.front} == {1}
    many = {f"fc{i}": shape for i, shape in enumerate([*LAYERS.values()] * 4)}
    crossing = settings(halving=RUNGS, population=20, top=5, mutation=0, generations=3)
    crossed = evolve(many, SPACE, flattering, samples=SAMPLES, settings=crossing, progress=False)
    for child in (c for c in crossed.history if c.generation):
        parents = [c for c in crossed.history if c.generation < child.generation and c.share == 1]
        pairs = [(one.paths, other.paths) for one in parents for other in parents]
        assert any(all(child.paths[n] in (one[n], other[n]) for n in many) for one, other in pairs)


def test_one_rung_is_no_halving():
    whole = run(settings=QUICK)
    assert [c[:4] for c in run(settings=settings(halving=(1,))).history] == [c[:4] for c in whole.history]
    assert whole.cost == len(whole.history)


def test_finds_a_better_candidate_than_as_many_full_evaluations():
    """Where samples agree, halving sees more candidates for the same cost; this is the claim it stands on."""
    better = 0
    for seed in range(5):
        halved = run(settings=settings(halving=RUNGS, seed=seed, generations=8))
        paper = run(settings=settings(seed=seed))
        assert halved.cost <= paper.cost
        better += halved.best.score > paper.best.score
    assert better >= 3


# -- cut and resumed ---------------------------------------------------------------------------------


@pytest.mark.parametrize("call", [1, 2, 10, 11, 15, 16, 18, 19, 40, 90])
def test_resumed_has_the_history_of_an_uncut_one(journal, call):
    first, second, uncut = Parts(cut=call), Parts(), run()
    with pytest.raises(InterruptedError):
        run(first, journal=journal)
    resumed = run(second, journal=journal)
    assert (resumed.best, resumed.history, resumed.cost) == (uncut.best, uncut.history, uncut.cost)
    assert first.samples + second.samples == uncut.cost * SAMPLES


def test_the_journal_has_every_rung_and_the_seconds(journal):
    result = run(journal=journal)
    again = run(lambda *arguments: pytest.fail("evaluated again"), journal=journal)
    assert again.history == result.history
    assert len(scored(journal)[1]) == result.evaluated
    assert again.evaluated == 0
    assert again.evaluation_seconds == result.evaluation_seconds > 0
    assert (again.cost, again.hours) == (result.cost, result.evaluation_seconds / 3600)


@pytest.mark.parametrize("other", [{"samples": 48}, {"settings": QUICK}, {"settings": settings(halving=(0.5, 1))}])
def test_refuses_the_journal_of_other_rungs(journal, other):
    run(journal=journal)
    with pytest.raises(ValueError, match="journal of another search"):
        run(journal=journal, **other)


# -- which samples -----------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("sizes", [(4,) * 10, (1, 1, 1), (20, 5, 10), (37, 1, 12, 3), (7,)])
def test_every_beginning_has_the_classes_in_proportion(sizes, seed):
    classes = [label for label, size in enumerate(sizes) for _ in range(size)]
    order = balanced_order(classes, seed)
    assert sorted(order) == list(range(len(classes)))
    for stop in range(len(order) + 1):
        counts = Counter(classes[i] for i in order[:stop])
        for label, size in enumerate(sizes):
            # half a sample of rounding for each class moves where the beginning of so many samples ends
            slack = 0 if len(set(sizes)) == 1 else len(sizes) * size / (2 * len(order))
            assert abs(counts[label] - size * stop / len(order)) <= 1 + slack


def test_a_quarter_of_four_a_class_is_one_of_each():
    classes = [label for label in range(10) for _ in range(4)]
    order = balanced_order(classes, 0)
    for start in range(0, 40, 10):
        assert sorted(classes[i] for i in order[start : start + 10]) == list(range(10))


def test_the_order_is_drawn_from_the_seed():
    classes = [0, 1] * 10
    assert balanced_order(classes, 1) == balanced_order(classes, 1) != balanced_order(classes, 2)


class Pairs(Dataset):
    def __init__(self, classes, **attributes):
        self.classes = classes
        vars(self).update(attributes)

    def __len__(self):
        return len(self.classes)

    def __getitem__(self, index):
        return torch.zeros(1), self.classes[index]


@pytest.mark.parametrize(
    "dataset",
    [
        TensorDataset(torch.zeros(4, 1), torch.tensor([2, 0, 1, 2])),
        Pairs([2, 0, 1, 2]),
        Pairs([9, 9, 9, 9], targets=[2, 0, 1, 2]),
        Pairs([9, 9, 9, 9], targets=torch.tensor([2, 0, 1, 2])),
        Subset(Pairs([0, 1, 2, 2]), [3, 0, 1, 2]),
    ],
    ids=["tensors", "pairs", "targets", "targets-tensor", "subset"],
)
def test_classes_of_every_data_set(dataset):
    assert classes_of(dataset) == [2, 0, 1, 2]


@pytest.mark.parametrize(
    ("shares", "samples", "ends"),
    [((1,), 7, [7]), (RUNGS, 40, [10, 20, 40]), (RUNGS, 7, [2, 4, 7]), ((0.1, 1), 5, None)],
)
def test_rungs_have_samples_of_their_own(shares, samples, ends):
    if ends is None:
        with pytest.raises(
            ValueError, match=r"^halving: expected rungs of at least one sample each, got .* of 5 samples"
        ):
            rung_ends(shares, samples)
    else:
        assert rung_ends(shares, samples) == ends


# -- settings ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value", [(0, 1), (0.5,), (0.5, 0.5, 1), (1, 0.5), (0.5, 2), ("a", 1), 0.5, None, (True,), (math.nan, 1)], ids=str
)
def test_refuses_shares(value):
    with pytest.raises(ValueError, match=r"^halving: expected growing shares above 0, the last 1"):
        SearchSettings(halving=value)


@pytest.mark.parametrize("value", ["accuracy", None, "Front"])
def test_refuses_an_objective(value):
    with pytest.raises(ValueError, match=r"^objective: expected one of \('score', 'front'\), got"):
        SearchSettings(objective=value)


def test_a_list_of_shares_is_as_good():
    assert SearchSettings(halving=[0.5, 1]) == SearchSettings(halving=(0.5, 1))


def test_halving_needs_to_know_of_samples(journal):
    with pytest.raises(ValueError, match=r"^halving: expected samples"):
        run(samples=None, journal=journal)
    assert not journal.exists()


# -- on a model ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", ["accuracy", "loss"])
def test_scores_are_those_of_the_merged_model(metric):
    """In another order of samples: a right answer counts as ever, losses round differently."""
    model = trained_mlp()
    with unchanged(model):
        result = search(
            model, SearchSpace((2,)), points(), settings=settings(halving=RUNGS), metric=metric, progress=False
        )
    for c in result.history:
        metrics = evaluate_merged(model, c.paths, points())
        if c.share == 1 and metric == "accuracy":
            assert c.score == metrics.accuracy
        elif c.share == 1:
            assert c.score == pytest.approx(-metrics.loss, rel=1e-6)
    assert result.cost == 5 * (10 / 4 + 5 / 4 + 3 / 2)


def test_refuses_too_few_samples_before_anything_is_evaluated(journal):
    few = TensorDataset(torch.randn(2, IN_FEATURES, generator=generator()), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=r"^halving: expected rungs of at least one sample each"):
        search(trained_mlp(), SPACE, few, settings=settings(halving=RUNGS), journal=journal, progress=False)
    assert not journal.exists()
