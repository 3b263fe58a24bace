"""A protocol end to end, as the commands run it: VTAB-1K in miniature, with random weights."""

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file

import glora
from glora.cli import main
from glora.protocols import ImageSettings, protocol
from glora.runs import choose_device, evaluate_run, find_runs, load_recipe, plan_runs
from tests.glora.toys import kill_while_writing, same_bits
from tests.miniature.images import DATASETS, write_datasets

RECIPE = Path(__file__).parents[1] / "miniature" / "recipe.toml"
QUICK = [
    "training.epochs=3",
    "training.batch_size=8",
    "training.checkpoint_epochs=1",
    "sizes.mini.limit=12_000",
    "search.population=4",
    "search.top=2",
    "search.crossover=2",
    "search.mutation=2",
    "search.generations=2",
]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_datasets(folder, train=24, validation=16, test=20)
    return folder


def train_command(data, out, *more, changes=QUICK, datasets=("svhn",)):
    sets = [text for change in changes for text in ("--set", change)]
    given = ["--recipe", str(RECIPE), "--data", str(data), "--out", str(out), "--weights", "none"]
    return ["train", *given, "--dataset", *datasets, *sets, *more]


def run(capsys, *arguments):
    """What a command prints as JSON."""
    assert main([*map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    """A study of three data sets after every stage; tests that change files copy it."""
    study = tmp_path_factory.mktemp("finished") / "study"
    assert main(train_command(data, study, datasets=DATASETS)) == 0
    for command in (["search", str(study)], ["merge", str(study), "--test"]):
        assert main(command) == 0
    return study


@pytest.fixture
def study(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "study")
    return tmp_path / "study"


# -- the whole protocol ----------------------------------------------------------------------------


@pytest.mark.parametrize("dataset", DATASETS)
def test_every_stage_left_its_files(finished, dataset):
    files = {file.name for file in (finished / f"{dataset}-seed0").iterdir()}
    assert files == {
        *("run.json", "checkpoint.pt", "log.csv", "supernet.safetensors", "train.json"),
        *("search.jsonl", "search.json", "adapter.safetensors"),
        *("merge.json", "merged.safetensors", "test.json", "features.npz"),
    }


@pytest.mark.parametrize("dataset", DATASETS)
def test_the_merged_file_is_a_plain_model_with_the_tested_accuracy(finished, data, dataset):
    """Nothing but timm, torch and the data: what a user of the file does."""
    folder, recipe = finished / f"{dataset}-seed0", load_recipe(str(RECIPE))
    model = timm.create_model(recipe.model.name, num_classes=DATASETS[dataset][0], **recipe.model.options)
    model.load_state_dict(load_file(folder / "merged.safetensors"))
    splits = protocol("vtab1k").open(data, dataset, images=recipe.images)
    tested, searched = (json.loads((folder / name).read_text()) for name in ("test.json", "search.json"))
    metrics = glora.evaluate(model, splits.test())
    assert (tested["accuracy"], tested["samples"]) == (metrics.accuracy, 20)
    assert tested["loss"] == pytest.approx(metrics.loss, rel=1e-5)
    assert searched["best"]["score"] == pytest.approx(-glora.evaluate(model, splits.validation).loss, rel=1e-5)


def test_the_winner_keeps_the_limit_and_merging_changes_nothing(finished):
    for found in find_runs(finished):
        searched, merged = (json.loads((found / name).read_text()) for name in ("search.json", "merge.json"))
        assert searched["best"]["parameters"] == merged["parameters"] <= 12_000
        assert searched["best"]["paths"] == merged["paths"]
        assert merged["model_difference"] < 1e-4
        assert merged["same_modules"]
        assert merged["total_parameters"] == merged["backbone_parameters"]


def test_the_log_has_every_step(finished):
    rows = np.genfromtxt(finished / "svhn-seed0" / "log.csv", delimiter=",", names=True)
    assert rows["step"].tolist() == list(range(1, 10))
    assert np.isfinite(rows["loss"]).all()


def test_features_of_the_merged_and_of_the_frozen_model(finished):
    features = np.load(finished / "svhn-seed0" / "features.npz")
    assert features["adapted"].shape == features["frozen"].shape == (20, 64)
    assert np.abs(features["adapted"] - features["frozen"]).max() > 1e-3
    assert sorted(features["labels"]) == sorted(number % 10 for number in range(20))


def test_a_report_of_the_study(study, capsys):
    files = run(capsys, "report", study)["files"]
    assert files and all(Path(file).is_file() for file in files)
    assert {Path(file).suffix for file in files} >= {".png", ".svg", ".md", ".csv"}


# -- called again ----------------------------------------------------------------------------------


def contents(folder):
    return {file.relative_to(folder): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_every_stage_again_changes_nothing(study, data, capsys):
    before = contents(study)
    for name in DATASETS:  # nothing reads it a second time
        (data / name / "test.txt").rename(data / name / "test.away")
    try:
        searches = run(capsys, "search", study)
        merges = run(capsys, "merge", study, "--test")
    finally:
        for name in DATASETS:
            (data / name / "test.away").rename(data / name / "test.txt")
    run(capsys, *train_command(data, study, datasets=DATASETS))
    after = contents(study)
    for file in before:
        if file.name not in ("search.json", "test.json"):
            assert after[file] == before[file], file
    assert set(after) == set(before)
    assert [found["evaluated_now"] for found in searches] == [0, 0, 0]
    assert [m["test"] for m in merges] == [json.loads(before[Path(f"{m['run']}/test.json")]) for m in merges]


def test_another_search_needs_to_be_asked_for(study, capsys):
    folder = study / "svhn-seed0"
    before = contents(folder)
    assert main(["search", str(folder), "--limit", "9000"]) == 2
    assert "journal of another search" in capsys.readouterr().err
    assert contents(folder) == before
    [found] = run(capsys, "search", folder, "--limit", "9000", "--again")
    assert found["best"]["parameters"] <= 9000
    kept = contents(folder / "earlier-1")
    assert kept == {Path(name): before[Path(name)] for name in map(str, kept)}
    assert {"search.jsonl", "search.json", "merged.safetensors", "test.json"} <= set(map(str, kept))
    assert not (folder / "test.json").exists()


def test_the_test_split_is_read_for_one_winner_alone(study, capsys):
    folder = study / "svhn-seed0"
    model = glora.inject(timm.create_model("vit_tiny_patch16_224", num_classes=10), 4)
    (folder / "merged.safetensors").write_bytes(b"another")
    [found] = find_runs(folder)
    with pytest.raises(ValueError, match="the test split has been read for another merged model"):
        evaluate_run(found, model, torch.device("cpu"))


@pytest.mark.parametrize("option", [["--front"], ["--halving"], ["--set", "search.generations=1"]], ids=" ".join)
def test_other_kinds_of_search(study, capsys, option):
    [found] = run(capsys, "search", study / "svhn-seed0", "--again", *option)
    assert found["best"]["parameters"] <= 12_000
    if option == ["--front"]:
        counts = [candidate["parameters"] for candidate in found["front"]]
        scores = [candidate["score"] for candidate in found["front"]]
        assert counts == sorted(counts) and scores == sorted(scores)


def test_a_folder_of_another_run_is_left_alone(study, data, capsys):
    before = contents(study)
    command = train_command(data, study, changes=[*QUICK, "training.lr=3e-3"])
    assert main(command) == 2
    assert "holds another run: recipe training lr 0.01, expected 0.003" in capsys.readouterr().err
    assert contents(study) == before


def _train(command):
    torch.set_num_threads(1)
    assert main(command) == 0


@pytest.mark.parametrize("after", [0.0, 0.02, 0.1])
def test_killed_and_called_again(finished, data, tmp_path, after):
    """To the same bits as without."""
    command = train_command(data, tmp_path / "study", "--json")
    folder = tmp_path / "study" / "svhn-seed0"
    assert kill_while_writing(folder / "checkpoint.pt", after, _train, command) in (-9, 0)
    _train(command)
    assert same_bits(
        load_file(folder / "supernet.safetensors"), load_file(finished / "svhn-seed0/supernet.safetensors")
    )
    assert (folder / "log.csv").read_bytes() == (finished / "svhn-seed0/log.csv").read_bytes()


# -- presets ---------------------------------------------------------------------------------------


def test_a_preset_is_trained_merged_and_tested_without_a_search(data, tmp_path, capsys):
    [trained] = run(capsys, *train_command(data, tmp_path / "lora", "--preset", "lora"))
    assert math.isfinite(trained["loss"])
    [merged] = run(capsys, "merge", tmp_path / "lora", "--test")
    assert {tuple(path.items()) for path in merged["paths"].values()} == {
        (("A", "none"), ("B", "lora_4"), ("C", "none"), ("D", "none"), ("E", "none"))
    }
    assert 0 <= merged["test"]["accuracy"] <= 1
    assert main(["search", str(tmp_path / "lora")]) == 2
    assert "nothing to search" in capsys.readouterr().err


# -- before any work -------------------------------------------------------------------------------


def test_a_dry_run_lists_everything_missing_of_the_19_data_sets_at_once(data, tmp_path, capsys):
    command = train_command(data, tmp_path / "out", "--dry-run", datasets=["all"])
    assert main(command) == 1
    printed = capsys.readouterr().out
    for name in protocol("vtab1k").datasets:
        assert f"{tmp_path / 'out' / name}-seed0" in printed
        assert (f"{name}: {data / name}: not there" in printed) == (name not in DATASETS)
    assert "get_vtab1k.py" in printed
    assert not (tmp_path / "out").exists()
    assert main([*command, "--json"]) == 1
    assert len(json.loads(capsys.readouterr().out)["runs"]) == 19


def test_a_dry_run_with_nothing_missing(data, tmp_path, capsys):
    assert main(train_command(data, tmp_path / "out", "--dry-run")) == 0
    assert "nothing is missing" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_missing_images_and_weights_are_told_before_training(data, tmp_path, capsys):
    root = tmp_path / "data"
    shutil.copytree(data, root)
    (root / "svhn" / "images" / "test_00003.png").unlink()
    command = train_command(root, tmp_path / "out")
    command[command.index("none")] = str(tmp_path / "ViT-B_16.npz")
    assert main(command) == 2
    printed = capsys.readouterr().err
    assert "1 of the 20 images of test.txt are not there: images/test_00003.png" in printed
    assert f"expected a file, found none at '{tmp_path / 'ViT-B_16.npz'}'; download" in printed
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--dataset", "mnist"], r"dataset: expected 'all' or names out of .*got ['mnist']"),
        (["--size", "0.86M"], "size: expected one of ['mini'], got '0.86M'"),
        (["--preset", "dora"], "preset: expected one of"),
        (["--shots", "4"], "shots: vtab1k has none, got [4]"),
        (["--seeds", "1", "1"], "seeds: expected distinct values, got [1, 1]"),
        (["--device", "tpu9"], "device: expected one that is here"),
        (["--set", "training.epochs=0"], "epochs"),
    ],
)
def test_bad_arguments(data, tmp_path, capsys, more, message):
    assert main(train_command(data, tmp_path / "out", *more)) == 2
    printed = capsys.readouterr().err
    for part in message.split(".*"):
        assert part in printed
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["search", "merge", "report"])
def test_a_folder_without_runs(tmp_path, capsys, command):
    assert main([command, str(tmp_path)]) == 2
    assert f"glora {command}: error: folder: expected a run" in capsys.readouterr().err


def test_stages_in_the_wrong_order(data, tmp_path, capsys):
    run(capsys, *train_command(data, tmp_path / "out"))
    assert main(["merge", str(tmp_path / "out")]) == 2
    assert "expected adapter.safetensors, found none; run `glora search` first" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "expected JSON"),
        ("[]", "expected a JSON object"),
        ("{}", "description of a run"),
        ('{"format": 9}', "newer"),
    ],
)
def test_a_damaged_description(tmp_path, capsys, content, message):
    (tmp_path / "run.json").write_text(content)
    assert main(["search", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err


def test_plans_of_the_few_shot_protocol():
    specs = plan_runs(load_recipe("fewshot"), "data")
    assert len(specs) == 5 * 5 * 3
    assert specs[0].name == "food-101-1shots-seed0"
    assert len({spec.name for spec in specs}) == len(specs)
    assert len(plan_runs(load_recipe("fewshot"), "data", datasets=["oxford_pets"], shots=[2, 4], seeds=[1])) == 2


def test_devices():
    assert choose_device("cpu") == torch.device("cpu")
    assert choose_device("auto").type in ("cpu", "cuda")


# -- several processes -----------------------------------------------------------------------------


def test_under_torchrun_as_in_one_process(data, tmp_path):
    """Without drop path, of which every rank has its own draws."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "glora"]

    def launched(command):
        done = subprocess.run([*launch, *command], check=True, capture_output=True, text=True, timeout=300)
        return json.loads(done.stdout)  # printed once, not once a rank

    commands = [
        train_command(data, tmp_path / name, "--json", changes=[*QUICK, "model.drop_path=0"]) for name in ("one", "two")
    ]
    assert main(commands[0]) == 0
    launched(commands[1])
    one, two = (tmp_path / name / "svhn-seed0" for name in ("one", "two"))
    losses = [np.genfromtxt(folder / "log.csv", delimiter=",", names=True)["loss"] for folder in (one, two)]
    assert losses[0][:3] == pytest.approx(losses[1][:3], rel=1e-3)
    assert losses[0] == pytest.approx(losses[1], rel=2e-2)  # AdamW makes much of little
    shutil.copy(one / "supernet.safetensors", two / "supernet.safetensors")
    assert main(["search", str(one), "--json"]) == 0
    [shared] = launched(["search", str(two), "--json"])
    alone = json.loads((one / "search.json").read_text())
    assert shared["history"] == alone["history"]
    assert shared["best"] == alone["best"]


def test_image_settings_of_the_recipe_are_used():
    assert load_recipe("vtab1k").images == ImageSettings()
