"""Validation while training: the figures, where they are written, and that training does not notice."""

import csv

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, TensorDataset

from glora import PathConfig, Recipe, SearchSpace, evaluate, get_paths, inject, set_paths, train
from glora.processes import process_rank
from glora.report.figures.training import read_log
from tests.glora.test_distributed import WRAPPERS
from tests.glora.toys import IN_FEATURES, adapted_mlp, generator, mlp, on_ranks, points, same_bits, seeded, state
from tests.graph_emulation import emulate

SPACE = SearchSpace((2, 1))
RECIPE = Recipe(steps=12, batch_size=5, lr=0.05, seed=3, checkpoint_every=4)
ENDS = [3, 5, 8, 10, 12]  # of epochs of 12 samples, in steps of 5; the last step is an end too
COLUMNS = ["step", "epoch", "lr", "loss", "accuracy"]


class CutError(Exception):
    """The run ends here."""


def validation():
    return TensorDataset(torch.randn(9, IN_FEATURES, generator=generator(7)), torch.arange(9) % 3)


class Noisy(Dataset):
    """Draws from torch's generator whenever it is read."""

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return torch.randn(IN_FEATURES), index % 3


def run(model, **options):
    return train(model, points(), RECIPE, progress=False, **{"space": SPACE, "validation": validation(), **options})


def rows(file):
    with open(file, newline="") as stream:
        return list(csv.DictReader(stream))


def test_it_is_due_at_the_end_of_each_epoch_and_after_the_last_step():
    assert list(run(adapted_mlp()).validations) == ENDS
    half = train(adapted_mlp(), points(), Recipe(steps=1, batch_size=5), validation=validation(), progress=False)
    assert list(half.validations) == [1]
    assert run(adapted_mlp(), validation=None).validations == {}


def test_the_figures_are_those_of_evaluate_under_the_paths_of_before():
    """Dropout would show a model in training mode, and another path than that of before any other output."""
    model = adapted_mlp(dropout=0.5)
    paths = {name: PathConfig(B=f"lora_{1 + index}") for index, name in enumerate(get_paths(model))}
    set_paths(model, paths)
    expected, seen = [], []

    def on_step(step, _):
        if step in ENDS:
            drawn = get_paths(model)
            seen.append(drawn)
            with torch.random.fork_rng():
                set_paths(model, paths)
                expected.append(evaluate(model, validation(), RECIPE.batch_size))
                set_paths(model, drawn)

    found = run(model, on_step=on_step).validations
    assert list(found.values()) == expected
    assert len({metrics.loss for metrics in expected}) == len(ENDS)
    assert all(drawn != paths for drawn in seen)  # the step's own path is back afterwards
    assert get_paths(model) == paths and model.training


@pytest.mark.parametrize("data", [validation, Noisy, lambda: DataLoader(Noisy(), 2, shuffle=True)])
def test_training_has_the_same_bits_with_it_and_without(data):
    one, other = adapted_mlp(dropout=0.5), adapted_mlp(dropout=0.5)
    assert run(one, validation=data()).losses == run(other, validation=None).losses
    assert same_bits(state(one), state(other))


@pytest.mark.parametrize("graphs", ["piecewise", "whole"])
def test_in_graphs(graphs, monkeypatch):
    """Emulated ones: the step's own, with dropout, between which the model is scored without them."""
    emulate(monkeypatch)
    one, other = adapted_mlp(dropout=0.5), adapted_mlp(dropout=0.5)
    found = run(one, graphs=graphs)
    assert found.graphs == graphs and list(found.validations) == ENDS
    assert found.losses == run(other, graphs=graphs, validation=None).losses
    assert same_bits(state(one), state(other))
    assert found.validations[12] == evaluate(one, validation(), RECIPE.batch_size)


def test_of_a_model_without_adapted_layers():
    model = mlp()
    found = run(model, space=None).validations
    assert list(found) == ENDS and found[12] == evaluate(model, validation(), RECIPE.batch_size)


def test_the_log(tmp_path):
    found = run(adapted_mlp(), log=tmp_path / "log.csv").validations
    written = rows(tmp_path / "log.csv")
    assert list(written[0]) == [*COLUMNS, "validation_loss", "validation_accuracy"]
    for row in written:
        metrics = found.get(int(row["step"]))
        values = [f"{metrics.loss:.6g}", f"{metrics.accuracy:.6g}"] if metrics else ["", ""]
        assert [row["validation_loss"], row["validation_accuracy"]] == values
    log = read_log(tmp_path / "log.csv")
    assert log.steps == list(range(1, 13))
    assert log.validation == [(step, pytest.approx(metrics.loss, rel=1e-5)) for step, metrics in found.items()]


def test_the_log_of_targets_that_are_no_classes(tmp_path):
    targets = TensorDataset(torch.randn(9, IN_FEATURES, generator=generator(7)), torch.zeros(9, 3))
    data = TensorDataset(points().tensors[0], torch.zeros(12, 3))
    how = {"loss_fn": torch.nn.functional.mse_loss, "space": SPACE, "log": tmp_path / "log.csv", "progress": False}
    train(adapted_mlp(), data, RECIPE, validation=targets, **how)
    assert [row["validation_accuracy"] for row in rows(tmp_path / "log.csv")] == [""] * 12
    assert rows(tmp_path / "log.csv")[2]["validation_loss"]


def test_without_it_the_log_keeps_its_columns(tmp_path):
    run(adapted_mlp(), validation=None, log=tmp_path / "log.csv")
    assert list(rows(tmp_path / "log.csv")[0]) == COLUMNS
    assert read_log(tmp_path / "log.csv").validation == []


@pytest.mark.parametrize("last_step", [4, 5, 9])
def test_a_run_that_was_cut_has_the_same_bits_and_the_same_log(tmp_path, last_step):
    uncut, cut = adapted_mlp(dropout=0.5), adapted_mlp(dropout=0.5)
    whole = run(uncut, log=tmp_path / "uncut.csv")

    def on_step(step, _):
        if step == last_step:
            raise CutError

    files = {"checkpoint": tmp_path / "checkpoint.pt", "log": tmp_path / "cut.csv"}
    with pytest.raises(CutError):
        run(cut, on_step=on_step, **files)
    resumed = run(cut, **files)
    assert resumed.resumed_from == last_step // 4 * 4
    assert resumed.validations == whole.validations
    assert same_bits(state(cut), state(uncut))
    assert (tmp_path / "cut.csv").read_bytes() == (tmp_path / "uncut.csv").read_bytes()


def test_a_checkpoint_of_an_earlier_release_is_continued(tmp_path):
    file = tmp_path / "checkpoint.pt"

    def on_step(step, _):
        if step == 6:
            raise CutError

    with pytest.raises(CutError):
        run(adapted_mlp(), validation=None, checkpoint=file, on_step=on_step)
    content = torch.load(file, weights_only=True)
    del content["validations"]
    torch.save(content, file)
    assert list(run(adapted_mlp(), checkpoint=file).validations) == [5, 8, 10, 12]


def test_the_bar_shows_the_last_figures(capsys):
    with seeded():
        model = inject(mlp(), 2)
    summary = train(model, points(), RECIPE, space=SPACE, validation=validation())
    last = summary.validations[12]
    line = capsys.readouterr().err.splitlines()[-1]
    assert f"; validation loss {last.loss:.3f}, accuracy {last.accuracy:.1%}" in line


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        (TensorDataset(torch.zeros(0, IN_FEATURES), torch.zeros(0)), ValueError, "validation: expected at least one"),
        (torch.zeros(3, IN_FEATURES), TypeError, "validation: expected a map-style data set"),
    ],
)
def test_what_is_no_data_is_refused_before_any_work(data, error, message, tmp_path):
    model = adapted_mlp()
    before = state(model)
    with pytest.raises(error, match=message):
        run(model, validation=data, checkpoint=tmp_path / "checkpoint.pt")
    assert same_bits(state(model), before) and not list(tmp_path.iterdir())


def _validated(wrapped):
    found = run(WRAPPERS[wrapped](adapted_mlp()))
    return found.losses, dict(found.validations)


def _differing():
    run(adapted_mlp(), validation=None if process_rank() else validation())


@pytest.mark.parametrize("wrapped", WRAPPERS)
def test_two_processes_have_the_figures_of_one(tmp_path, wrapped):
    """Rank 0 scores alone; a sharded model has to be run by all."""
    alone = _validated("plain")
    both = on_ranks(2, tmp_path / "two", _validated, wrapped)
    for losses, found in both:
        assert losses == pytest.approx(alone[0], rel=1e-4) and list(found) == ENDS
        assert [metrics.loss for metrics in found.values()] == [
            pytest.approx(metrics.loss, rel=1e-4) for metrics in alone[1].values()
        ]
    assert both[0] == both[1]


def test_processes_that_differ_in_it_are_refused(tmp_path):
    with pytest.raises(Exception, match=r"expected the same on every rank, got 'validation'"):
        on_ranks(2, tmp_path / "two", _differing)
