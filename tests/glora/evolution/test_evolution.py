"""The search: what it finds, what it never does, and that it can be cut anywhere."""

import json
import math
import os
import random
import signal
import time
import zlib
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import IterableDataset, Subset, TensorDataset

from glora import (
    GLoRALinear,
    LayerShape,
    PathConfig,
    SearchSettings,
    SearchSpace,
    count_parameters,
    evaluate_merged,
    evolve,
    inject,
    search,
    set_paths,
)
from glora.dataset import reading
from glora.evaluation import count
from glora.evolution.scoring import CandidateScorer
from glora.objective import Objective
from glora.sampling import PathSampler
from tests.glora.toys import IN_FEATURES, exit_code, generator, kill_while_writing, mlp, points, trained_mlp, unchanged

LAYERS = {f"fc{i}": LayerShape(8 + i, 6, bias=i % 2 == 0) for i in range(4)}
SPACE = SearchSpace((2,))
NARROW = SearchSpace((2,), C=("none",), D=("none",), E=("none",))  # 16 paths a layer, 65,536 in all
QUICK = SearchSettings(population=10, top=3, crossover=5, mutation=5, generations=4)


def worth(name, slot, kind):
    """What a kind in one place adds to the score: fixed, and different everywhere."""
    return zlib.crc32(f"{name} {slot} {kind}".encode()) / 2**32


def additive(paths):
    return sum(worth(name, slot, kind) for name, path in paths.items() for slot, kind in path.to_dict().items())


def optimum(space):
    return sum(max(worth(n, slot, k) for k in kinds) for n in LAYERS for slot, kinds in space.options.items())


def run(evaluate=additive, layers=LAYERS, space=SPACE, settings=QUICK, **options):
    return evolve(layers, space, evaluate, settings=settings, progress=False, **options)


def settings(**changes):
    return SearchSettings(**{**vars(QUICK), **changes})


def scored(journal, torn=False):
    """What a journal knows (but for a torn last line), seconds and order left out, which are those of the run."""
    header, *lines = journal.read_bytes().splitlines(keepends=True)[: -1 if torn else None]
    return header, sorted(json.loads(line)[:4] for line in lines)


class Counted:
    """Counts evaluations, and may be cut at one of them."""

    def __init__(self, cut=math.inf):
        self.cut, self.seen = cut, []

    def __call__(self, paths):
        if len(self.seen) + 1 == self.cut:
            raise InterruptedError
        self.seen.append(tuple(paths.items()))
        return additive(paths)


@pytest.fixture
def journal(tmp_path):
    return tmp_path / "journal.jsonl"


# -- what it finds ---------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_finds_the_optimum_of_a_small_space(seed):
    assert run(space=NARROW, settings=SearchSettings(seed=seed)).best.score == pytest.approx(optimum(NARROW))


@pytest.mark.parametrize("limit", [None, 150])
@pytest.mark.parametrize("seed", range(3))
def test_beats_as_many_random_paths(seed, limit):
    result = run(settings=SearchSettings(seed=seed), limit=limit)
    sampler, gen = PathSampler(LAYERS, SPACE, limit), generator(seed)
    assert result.best.score > max(additive(sampler.sample(gen)) for _ in result.history)


def test_by_default_as_in_the_paper():
    result = run(settings=SearchSettings())
    assert Counter(c.generation for c in result.history) == dict.fromkeys(range(21), 50)
    assert result.evaluated == SearchSettings().candidates == 1050


def test_a_quick_search():
    assert len(run(settings=SearchSettings.quick()).history) == SearchSettings.quick().candidates == 120
    changed = SearchSettings.quick(generations=2, seed=3)
    assert changed == SearchSettings(20, 5, 10, 10, generations=2, seed=3)
    with pytest.raises(ValueError, match="population: expected an integer from 1"):
        SearchSettings.quick(population=0)


@pytest.mark.parametrize("limit", [0, 1, 20, 100, 150, 10_000])
def test_every_candidate_is_within_the_limit(limit):
    result = run(limit=limit)
    counts = [sum(path.count(LAYERS[name]) for name, path in c.paths.items()) for c in result.history]
    assert counts == [c.parameters for c in result.history]
    assert max(counts) <= limit
    assert result.limit == limit


def test_refuses_a_limit_that_no_path_meets(journal):
    costly = SearchSpace((2,), B=("vector",))
    smallest = sum(shape.out_features for shape in LAYERS.values())
    with pytest.raises(ValueError, match=f"at least {smallest} parameters .*, got {smallest - 1}"):
        run(space=costly, limit=smallest - 1, journal=journal)
    assert not journal.exists()


def test_every_evaluation_counts_the_last_one_too():
    calls = []
    result = run(lambda paths: calls.append(paths) or len(calls))
    assert result.best.paths == calls[-1]
    assert result.best.score == len(calls) == len(result.history)
    assert result.best.generation == QUICK.generations


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("limit", [None, 100])
def test_nothing_is_evaluated_twice(seed, limit):
    counted = Counted()
    result = run(counted, settings=settings(seed=seed, generations=10), limit=limit)
    assert len(set(counted.seen)) == len(counted.seen) == len(result.history) == result.evaluated


def test_of_equals_the_smaller_then_the_earlier_is_best():
    result = run(lambda paths: 1.0)
    smallest = min(c.parameters for c in result.history)
    assert result.best is next(c for c in result.history if c.parameters == smallest)


@pytest.mark.parametrize("kinds", [("vector",), ("vector", "none")], ids=len)
def test_a_space_smaller_than_the_population_ends(kinds):
    tiny = SearchSpace((2,), A=kinds, **dict.fromkeys("BCDE", ("none",)))
    result = run(space=tiny, settings=SearchSettings())
    assert len(result.history) == len(kinds) ** len(LAYERS)
    assert result.best.score == pytest.approx(optimum(tiny))


def test_without_generations_it_is_a_random_search():
    result = run(settings=settings(generations=0))
    assert [c.generation for c in result.history] == [0] * 10


def test_a_nan_ranks_last():
    calls = []
    result = run(lambda paths: calls.append(paths) or (math.nan if len(calls) % 2 else -float(len(calls))))
    assert result.best.score == -2


def test_nothing_but_nan_ends():
    result = run(lambda paths: math.nan)
    assert len(result.history) == 50
    assert math.isnan(result.best.score)


def test_neighbours_in_evaluation_have_first_layers_in_common():
    """In the order of the paths of the first layer, of the second, and so on; the history is as drawn."""
    counted = Counted()
    result = run(counted, space=NARROW)
    drawn = [[str(path) for path in c.paths.values()] for c in result.history]
    assert [[str(path) for _, path in items] for items in counted.seen] == [
        key for start in range(0, 50, 10) for key in sorted(drawn[start : start + 10], key=tuple)
    ]
    assert drawn != sorted(drawn)


# -- offspring -------------------------------------------------------------------------------------

MANY = {f"fc{i}": LayerShape(8, 6) for i in range(20)}


def parents_of(result, generation, top):
    earlier = [c for c in result.history if c.generation < generation]
    return sorted(earlier, key=lambda c: (-c.score, c.parameters))[:top]


def test_crossover_takes_every_path_from_two_parents():
    result = run(layers=MANY, settings=settings(mutation=0, generations=3))
    for child in (c for c in result.history if c.generation):
        parents = parents_of(result, child.generation, QUICK.top)
        pairs = [(one.paths, other.paths) for one in parents for other in parents]
        assert any(all(child.paths[n] in (one[n], other[n]) for n in MANY) for one, other in pairs)


def test_mutation_redraws_a_fifth_of_a_parent():
    result = run(layers=MANY, settings=settings(crossover=0, mutation=40, generations=5))
    changes = []
    for child in (c for c in result.history if c.generation):
        parents = parents_of(result, child.generation, QUICK.top)
        changes.append(min(sum(child.paths[n] != parent.paths[n] for n in MANY) for parent in parents))
    assert sum(changes) / len(changes) == pytest.approx(0.2 * 20, rel=0.15)


# -- repeated, cut and resumed -----------------------------------------------------------------------


def test_same_seed_same_history_another_seed_another():
    assert run().history == run().history
    assert run().history != run(settings=settings(seed=1)).history


def test_a_journal_changes_nothing(journal):
    assert run(journal=journal).history == run().history


@pytest.mark.parametrize("call", [1, 2, 10, 11, 27, 50])
@pytest.mark.parametrize("limit", [None, 100])
def test_resumed_search_has_the_history_of_an_uncut_one(journal, call, limit):
    first, second, third = Counted(cut=call), Counted(), Counted()
    with pytest.raises(InterruptedError):
        run(first, journal=journal, limit=limit)
    resumed, uncut = run(second, journal=journal, limit=limit), run(third, limit=limit)
    assert (resumed.best, resumed.history) == (uncut.best, uncut.history)
    assert len(first.seen) == call - 1
    assert first.seen + second.seen == third.seen
    assert resumed.evaluated == len(second.seen)


def test_a_finished_search_is_only_read(journal):
    first = run(journal=journal)
    again = run(lambda paths: pytest.fail("evaluated again"), journal=journal)
    assert again.history == first.history
    assert again.evaluated == 0


@pytest.mark.parametrize("missing", [1, 2, 5, 30, 80])
def test_a_torn_last_line_is_evaluated_again(journal, missing):
    whole = run(journal=journal)
    content, known = journal.read_bytes(), scored(journal)
    assert content.endswith(b"]\n")
    journal.write_bytes(content[:-missing])
    counted = Counted()
    assert run(counted, journal=journal).history == whole.history
    assert len(counted.seen) == 1
    assert scored(journal) == known
    assert journal.read_bytes().startswith(content[: -max(missing, 80)])


def test_an_empty_journal_is_a_new_one(journal):
    journal.touch()
    assert run(journal=journal).evaluated == 50


def test_nan_scores_are_remembered(journal):
    first = run(lambda paths: math.nan, journal=journal)
    again = run(lambda paths: pytest.fail("evaluated again"), journal=journal)
    assert [c.paths for c in again.history] == [c.paths for c in first.history]


# -- killed ----------------------------------------------------------------------------------------


def search_and_die(journal, call):
    calls = []

    def dying(paths):
        calls.append(paths)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return additive(paths)

    run(dying, journal=journal)


@pytest.mark.parametrize("call", [1, 10, 11, 33])
def test_killed_while_it_evaluates(journal, call):
    assert exit_code(search_and_die, journal, call) == -signal.SIGKILL
    counted = Counted()
    resumed = run(counted, journal=journal)
    assert resumed.history == run().history
    assert len(counted.seen) == 50 - (call - 1)


LONG = settings(generations=100)


def search_long(journal):
    run(settings=LONG, journal=journal)


def test_killed_at_random_moments(journal):
    """No whole line is lost; one that a kill tore is dropped when the search resumes."""
    moments = random.Random(0)
    lines = [0]
    for _ in range(10):
        assert kill_while_writing(journal, moments.uniform(0, 0.02), search_long, journal) == -signal.SIGKILL
        lines.append(journal.read_bytes().count(b"\n"))
    assert lines == sorted(lines)
    assert run(settings=LONG, journal=journal).history == run(settings=LONG).history


# -- journals of others ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("other", "difference"),
    [
        ({"layers": {**LAYERS, "fc0": LayerShape(9, 6)}}, "layers .*, expected "),
        ({"layers": dict(reversed(LAYERS.items()))}, "layers .*, expected "),
        ({"space": NARROW}, "space "),
        ({"settings": settings(seed=1)}, "settings seed 0, expected 1; choose"),
        ({"limit": 100}, "limit None, expected 100; choose"),
        ({"scored_by": {"metric": "loss"}}, "scored_by metric None, expected 'loss'; choose"),
    ],
    ids=["shape", "order", "space", "settings", "limit", "score"],
)
def test_refuses_the_journal_of_another_search(journal, other, difference):
    run(journal=journal)
    content = journal.read_bytes()
    with pytest.raises(ValueError, match=f"journal of another search: {difference}") as refusal:
        run(**other, journal=journal)
    assert len(str(refusal.value)) < 600
    assert journal.read_bytes() == content


def test_a_description_that_json_changes_is_known_again(journal):
    first = run(scored_by={"shares": (0.5, 1)}, journal=journal)
    assert run(scored_by={"shares": (0.5, 1)}, journal=journal).history == first.history


def test_refuses_a_folder_as_journal(tmp_path):
    with pytest.raises(ValueError, match="journal: expected a file, got the folder"):
        run(journal=tmp_path)


@pytest.mark.parametrize(
    "content",
    [b"\x80\x81\x82", b"\x80\x81\n\x82\n", b"one line of text", b"text\n", b"[]\n", b'{\n "best": 1\n}\n', b"1\n2\n"],
    ids=["bytes", "byte-lines", "line", "text", "list", "json", "numbers"],
)
def test_refuses_a_file_that_is_no_journal(journal, content):
    journal.write_bytes(content)
    with pytest.raises(ValueError, match=r"journal\.jsonl: (expected a search journal|journal of another search)"):
        run(journal=journal)
    assert journal.read_bytes() == content


# -- settings and results ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("population", 0),
        ("population", 2.5),
        ("top", 0),
        ("crossover", -1),
        ("mutation", -1),
        ("generations", -1),
        ("mutation_probability", 0),
        ("mutation_probability", 1.5),
        ("mutation_probability", math.nan),
    ],
)
def test_refuses_settings(name, value):
    with pytest.raises(ValueError, match=rf"^{name}: expected .* got {value}"):
        SearchSettings(**{name: value})


def test_result_as_json(tmp_path):
    result = run(limit=100)
    result.save(tmp_path / "result.json")
    data = json.loads((tmp_path / "result.json").read_text())
    assert {name: PathConfig.from_dict(path) for name, path in data["best"]["paths"].items()} == result.best.paths
    assert data["best"]["score"] == result.best.score
    assert (data["limit"], data["evaluations"], data["evaluated_now"]) == (100, 50, 50)
    assert data["history"][-1] == [4, result.history[-1].parameters, result.history[-1].score, 1]
    assert [entry["parameters"] for entry in data["front"]] == [c.parameters for c in result.front]
    assert (data["cost"], data["hours"]) == (50, result.evaluation_seconds / 3600)


def test_the_bar_counts_the_evaluations_of_every_rung(capfd):
    halving = settings(halving=(0.5, 1))
    evolve(LAYERS, SPACE, lambda paths, start, stop: additive(paths), samples=4, settings=halving)
    last = capfd.readouterr().err.splitlines()[-1]
    assert all(word in last for word in ("search: 100%", "75/75"))


def test_the_bar_shows_the_best(capfd):
    evolve(LAYERS, SPACE, additive, settings=QUICK)
    last = capfd.readouterr().err.splitlines()[-1]
    assert all(word in last for word in ("search: 100%", "50/50", "best ", "parameters"))


# -- on a model ------------------------------------------------------------------------------------


def search_model(model, validation=points(), **options):
    return search(model, SPACE, validation, settings=QUICK, progress=False, **options)


@pytest.mark.parametrize("metric", ["accuracy", "loss"])
def test_scores_are_those_of_the_merged_model(metric):
    model = trained_mlp()
    best = search_model(model, metric=metric).best
    metrics = evaluate_merged(model, best.paths, points())
    assert best.score == (metrics.accuracy if metric == "accuracy" else -metrics.loss)
    set_paths(model, best.paths)
    assert count_parameters(model) == best.parameters


def loss_scorer(model):
    return CandidateScorer(model, reading("validation", points(), 4), "loss", Objective(model))


def test_layers_of_equal_paths_are_merged_once(monkeypatch):
    merged, merge = [], GLoRALinear.merge
    monkeypatch.setattr(
        GLoRALinear, "merge", lambda self, path, **options: merged.append(path) or merge(self, path, **options)
    )
    one, other = PathConfig(B="vector"), PathConfig(E="vector")
    scorer = loss_scorer(trained_mlp())
    for chosen, made in [((one, one), 2), ((one, other), 1), ((one, other), 0), ((other, one), 2)]:
        before, paths = len(merged), dict(zip(("fc1", "fc2"), chosen))
        assert scorer(paths, 0, 12) == loss_scorer(trained_mlp())(paths, 0, 12)
        assert len(merged) - before == made + 2


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_as_it_is(training, journal):
    model = trained_mlp(dropout=0.5).train(training)
    with unchanged(model):
        search_model(model, limit=60, journal=journal)


def test_hooks_that_merging_would_lose_are_refused_before_anything_is_scored(journal):
    model = trained_mlp()
    model.fc2.register_forward_hook(lambda *call: None)
    with pytest.raises(ValueError, match=r"expected adapted layers without hooks.*'fc2'"):
        search_model(model, journal=journal)
    assert not journal.exists()


def test_the_model_is_left_as_it_is_after_an_error():
    model = trained_mlp()
    wrong = TensorDataset(torch.zeros(3, IN_FEATURES + 1), torch.zeros(3, dtype=torch.long))
    with unchanged(model), pytest.raises(RuntimeError):
        search(model, SPACE, wrong, settings=QUICK, progress=False)


def test_an_interrupted_search_of_a_model_goes_on(journal, monkeypatch):
    model, calls = trained_mlp(), []
    whole = search_model(model, metric="loss")

    def cut(*arguments, **options):
        calls.append(arguments)
        if len(calls) == 20:
            raise InterruptedError
        return count(*arguments, **options)

    monkeypatch.setattr("glora.evolution.scoring.count", cut)
    with pytest.raises(InterruptedError):
        search_model(model, metric="loss", journal=journal)
    assert search_model(model, metric="loss", journal=journal).history == whole.history
    assert len(calls) == 1 + len(whole.history)


def test_a_journal_of_an_earlier_version_is_only_read(journal):
    """tests/data/search.jsonl is of commit dca98af, which could pass over the first children of a Sequential."""
    content = (Path(__file__).parents[2] / "data/search.jsonl").read_bytes()
    journal.write_bytes(content)
    model = inject(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2)), 1, heads=())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.5)
    validation = TensorDataset(torch.arange(12.0).reshape(4, 3), torch.arange(4) % 2)
    sizes = SearchSettings(population=3, top=1, crossover=1, mutation=1, generations=1, seed=1)
    options = {"settings": sizes, "metric": "loss", "journal": journal, "progress": False}
    result = search(model, SearchSpace((1,)), validation, **options)
    assert (result.evaluated, len(result.history)) == (0, 5)
    assert journal.read_bytes() == content


def test_a_journal_of_another_metric_is_refused(journal):
    model = trained_mlp()
    search_model(model, metric="accuracy", journal=journal)
    with unchanged(model), pytest.raises(ValueError, match="journal of another search"):
        search_model(model, metric="loss", journal=journal)


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (mlp, {}, "at least one adapted layer, found none"),
        (trained_mlp, {"metric": "f1"}, r"^metric: expected one of \('accuracy', 'loss', 'perplexity'\), got 'f1'"),
        (trained_mlp, {"batch_size": 0}, "^batch_size: expected an integer from 1, got 0"),
        (trained_mlp, {"validation": points(0)}, "^validation: expected at least one sample, got none"),
        (trained_mlp, {"limit": -1}, r"^limit: expected at least 0 parameters .* got -1"),
        (lambda: trained_mlp(rank=1), {}, r"^space: expected ranks up to 1 \(storage of layer 'fc1'\)"),
    ],
    ids=["plain-model", "metric", "batch-size", "empty", "limit", "rank"],
)
def test_refuses_before_anything_is_evaluated(model, options, message, journal):
    model = model()
    with unchanged(model), pytest.raises(ValueError, match=message):
        search_model(model, journal=journal, **options)
    assert not journal.exists()


def test_refuses_a_data_set_without_a_length():
    with pytest.raises(TypeError, match=r"^validation: expected .*, with a length and an index, got Endless"):
        search_model(trained_mlp(), Endless())


class Endless(IterableDataset):
    def __iter__(self):
        yield from points()


@pytest.mark.parametrize("samples", [0, -1, 1.5, True])
def test_refuses_a_number_of_samples(samples):
    with pytest.raises(ValueError, match=r"^samples: expected an integer from 1 or None, got"):
        run(samples=samples)


def test_is_quick_under_a_limit_that_almost_nothing_meets():
    started = time.process_time()
    run(settings=SearchSettings(), limit=3)
    assert time.process_time() - started < 20


def test_a_journal_of_another_supernet_is_refused(journal):
    """Scores of weights that have been trained on since would be wrong."""
    search_model(trained_mlp(), journal=journal)
    with pytest.raises(ValueError, match="journal of another search"):
        search_model(trained_mlp(seed=1), journal=journal)


def test_a_journal_of_other_images_is_refused(journal):
    model = trained_mlp()
    x, target = points().tensors
    search(model, SPACE, TensorDataset(x, target), journal=journal, progress=False, settings=QUICK)
    with pytest.raises(ValueError, match="journal of another search"):
        search(model, SPACE, TensorDataset(x + 1, target), journal=journal, progress=False, settings=QUICK)


def test_a_journal_of_other_images_of_the_same_data_set_is_refused(journal):
    model, data = trained_mlp(), points(80)
    search(model, SPACE, Subset(data, range(30)), journal=journal, progress=False, settings=QUICK)
    with pytest.raises(ValueError, match="journal of another search: scored_by validation"):
        search(model, SPACE, Subset(data, range(50, 80)), journal=journal, progress=False, settings=QUICK)


def test_a_journal_of_other_batches_is_refused(journal):
    """Their sums have other last bits."""
    model = trained_mlp()
    search_model(model, metric="loss", journal=journal)
    with pytest.raises(ValueError, match="scored_by batch_size 256, expected 3"):
        search_model(model, metric="loss", journal=journal, batch_size=3)


def test_images_read_by_other_processes_have_the_same_scores():
    model = trained_mlp()
    few = {"settings": settings(population=2, generations=0), "metric": "loss", "progress": False}
    here = search(model, SPACE, points(), **few)
    there = search(model, SPACE, points(), **few, workers=1)
    assert there.history == here.history


def test_a_score_that_is_no_number_is_null_in_json(tmp_path):
    result = run(lambda paths: math.nan)
    result.save(tmp_path / "search.json")
    text = (tmp_path / "search.json").read_text()
    assert "NaN" not in text
    assert json.loads(text)["best"]["score"] is None


def test_journal_folder_has_to_exist(tmp_path):
    with pytest.raises(ValueError, match="journal: expected an existing folder"):
        search_model(trained_mlp(), journal=tmp_path / "nowhere" / "search.jsonl")
