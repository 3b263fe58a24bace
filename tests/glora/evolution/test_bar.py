"""What a search shows while it runs: the best so far, and how long it will take."""

import math
from dataclasses import replace

import pytest

from glora import evolve, search
from glora.evolution import bar as bars
from glora.evolution.journal import Part, Total
from glora.evolution.texts import describe_estimate, describe_score
from tests.glora.evolution.test_evolution import LAYERS, QUICK, SPACE, Counted, additive, journal, points, trained_mlp

__all__ = ["journal"]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.01, "1 s"),
        (40.4, "40 s"),
        (89, "89 s"),
        (90, "2 min"),
        (1020, "17 min"),
        (89.4 * 60, "89 min"),
        (90 * 60, "1 h 30 min"),
        (3 * 3600 - 1, "3 h"),
        (3 * 3600 + 22 * 60, "3 h 20 min"),
        (52.4 * 3600, "52 h"),
    ],
)
def test_durations(seconds, text):
    assert describe_estimate(1050, 0, seconds) == f"search: 1,050 candidates, about {text}"


def test_candidates_of_an_earlier_call_are_told():
    want = "search: 1,050 candidates, 1,020 of them scored before, about 5 s"
    assert describe_estimate(1050, 1020, 5) == want


@pytest.mark.parametrize(
    ("metric", "score", "text"),
    [
        ("accuracy", 0.8125, "81.25%"),
        ("loss", -0.25, "loss 0.2500"),
        ("score", -0.25, "score -0.2500"),
        (None, 0.5, "score 0.5000"),
        ("loss", None, "not finite"),
        ("accuracy", math.nan, "not finite"),
    ],
)
def test_scores(metric, score, text):
    assert describe_score(metric, score) == text


def test_an_estimate_is_by_the_median_of_seconds_a_sample():
    seconds = {Part("a", 0, 10): 100.0, Part("b", 0, 10): 5.0, Part("b", 10, 30): 12.0}  # the first is slow
    scored = {part: Total(0.0, taken) for part, taken in seconds.items()}
    assert bars.estimate(scored, 1000, 1) == 600
    assert bars.estimate(scored, 1000, 4) == 150


@pytest.fixture
def estimated(monkeypatch):
    """The samples that estimates were made of."""
    found = []
    monkeypatch.setattr(bars, "estimate", lambda scored, samples, processes: found.append(samples) or 120.0)
    return found


def run(evaluate=additive, settings=QUICK, **options):
    return evolve(LAYERS, SPACE, evaluate, settings=settings, **options)


def told(capsys):
    return [line.strip() for line in capsys.readouterr().err.splitlines() if "candidates" in line]


def test_after_ten_scores_it_says_how_long_it_takes(estimated, capsys):
    counted = Counted(cut=11)
    with pytest.raises(InterruptedError):
        run(counted)
    assert told(capsys) == ["search: 50 candidates, about 2 min"]
    assert (len(counted.seen), estimated) == (10, [50])


@pytest.mark.parametrize("settings", [replace(QUICK, generations=0), replace(QUICK, population=3, generations=0)])
def test_it_says_nothing_where_nothing_is_left(estimated, capsys, settings):
    run(settings=settings)
    assert not told(capsys)


def test_without_progress_it_says_nothing(capsys):
    run(progress=False)
    assert capsys.readouterr() == ("", "")


def test_other_ranks_say_nothing(capsys, monkeypatch):
    monkeypatch.setattr(bars, "is_first", lambda: False)
    run()
    assert capsys.readouterr() == ("", "")


def test_an_estimate_counts_what_is_left_of_a_resumed_search(estimated, capsys, journal):
    with pytest.raises(InterruptedError):
        run(Counted(cut=6), journal=journal, progress=False)
    run(journal=journal)
    assert told(capsys) == ["search: 50 candidates, 5 of them scored before, about 2 min"]
    assert estimated == [45]
    run(journal=journal)
    assert not told(capsys)


def test_with_halving_work_is_measured_in_samples(estimated, capsys):
    run(lambda paths, start, stop: additive(paths), replace(QUICK, halving=(0.25, 0.5, 1)), samples=24)
    assert told(capsys) == ["search: 50 candidates, about 2 min"]
    assert estimated == [5 * (10 * 6 + 5 * 6 + 3 * 12)]


def test_a_loss_is_shown_as_a_loss(capsys):
    result = search(trained_mlp(), SPACE, points(), settings=QUICK, metric="loss")
    assert f"best loss {-result.best.score:.4f} with {result.best.parameters:,} parameters" in capsys.readouterr().err
    assert result.best.score < 0


def test_an_accuracy_is_shown_in_percent(capsys):
    result = search(trained_mlp(), SPACE, points(), settings=QUICK)
    assert f"best {result.best.score:.2%} with" in capsys.readouterr().err
