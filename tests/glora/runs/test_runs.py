"""A protocol end to end, as the commands run it: VTAB-1K in miniature, with random weights."""

import json
import math
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

import glora
from glora.cli import main
from glora.merging import merge
from glora.protocols import ImageSettings, protocol
from glora.runs import (
    RunFolder,
    choose_device,
    evaluate_run,
    find_runs,
    load_recipe,
    merge_run,
    plan_runs,
    search_settings,
)
from glora.runs.models import make_backbone, make_model
from tests.glora.toys import kill_while_writing, same_bits
from tests.graph_emulation import emulate
from tests.miniature.images import DATASETS, write_datasets

RECIPE = Path(__file__).parents[2] / "miniature" / "recipe.toml"
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
        assert merged["created_biases"] == []
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
        assert after[file] == before[file], file
    assert set(after) == set(before)
    assert [found["hours"] > 0 for found in searches] == [True] * 3
    assert [m["test"] for m in merges] == [json.loads(before[Path(f"{m['run']}/test.json")]) for m in merges]


def test_another_search_needs_to_be_asked_for(study, capsys):
    folder = study / "svhn-seed0"
    before = contents(folder)
    assert main(["search", str(folder), "--limit", "9000"]) == 2
    assert "journal of another search: limit 12000, expected 9000; choose" in capsys.readouterr().err
    assert contents(folder) == before
    [found] = run(capsys, "search", folder, "--limit", "9000", "--again")
    assert found["best"]["parameters"] <= 9000
    kept = contents(folder / "earlier-1")
    assert kept == {Path(name): before[Path(name)] for name in map(str, kept)}
    assert {"search.jsonl", "search.json", "merged.safetensors", "test.json"} <= set(map(str, kept))
    assert not (folder / "test.json").exists()


def test_the_test_split_is_read_for_one_winner_alone(study, capsys):
    folder = study / "svhn-seed0"
    shutil.copy(study / "eurosat-seed0" / "adapter.safetensors", folder)  # another winner of the same layers
    [found] = find_runs(folder)
    model, _ = merge_run(found, torch.device("cpu"))
    with pytest.raises(ValueError, match="the test split has been read for another winner"):
        evaluate_run(found, model, torch.device("cpu"))


def test_what_is_merged_and_tested_stays_on_a_machine_that_rounds_otherwise(study, monkeypatch):
    folder = study / "svhn-seed0"
    before = contents(folder)

    def rounded_otherwise(model, sample):
        report = merge(model, sample)
        with torch.no_grad():
            model.blocks[0].mlp.fc1.weight.add_(1e-9)
        return report

    monkeypatch.setattr("glora.runs.stages.merge", rounded_otherwise)
    [found] = find_runs(folder)
    model, _ = merge_run(found, torch.device("cpu"))
    assert evaluate_run(found, model, torch.device("cpu")) == json.loads(before[Path("test.json")])
    assert contents(folder) == before


@pytest.mark.parametrize("name", ["train800.txt", "val200.txt"])
def test_other_lists_of_images_are_refused(study, data, name, capsys):
    """A candidate must not be ranked on what its supernet was trained on."""
    folder, file = study / "svhn-seed0", data / "svhn" / name
    before, text = contents(folder), file.read_text()
    file.write_text("".join(text.splitlines(keepends=True)[:-1]))
    try:
        for command in (["search", str(folder)], ["merge", str(folder)], train_command(data, study)):
            assert main(command) == 2
            assert re.search("expected the .*images that it was trained with", capsys.readouterr().err)
    finally:
        file.write_text(text)
    assert contents(folder) == before


def test_other_weights_are_refused(data, tmp_path, capsys):
    weights = tmp_path / "backbone.safetensors"
    model = load_recipe(str(RECIPE)).model
    for seed in (0, 1):
        torch.manual_seed(seed)
        save_file(timm.create_model(model.name, num_classes=10, **model.options).state_dict(), weights)
        if seed == 0:
            assert main([*train_command(data, tmp_path / "study"), "--weights", str(weights)]) == 0
    assert main(["search", str(tmp_path / "study")]) == 2
    assert "expected the weights that it was trained with" in capsys.readouterr().err


def test_a_search_that_cannot_be_leaves_the_earlier_one(study, capsys):
    folder = study / "svhn-seed0"
    before = contents(folder)
    for option in (["--limit", "-1"], ["--set", "search.halving=[0.001, 1]"]):
        assert main(["search", str(folder), "--again", *option]) == 2
        assert contents(folder) == before


def test_runs_of_several_seeds_are_searched_with_several_seeds(study):
    run = find_runs(study / "svhn-seed0")[0]
    other = RunFolder(run.path)
    other.spec = replace(run.spec, seed=3)
    assert search_settings(run).settings.seed == 0
    assert search_settings(other).settings.seed == 3


def test_the_classifier_is_fresh_though_the_weights_have_one_of_as_many_classes(data, tmp_path):
    recipe, weights = load_recipe(str(RECIPE)), tmp_path / "backbone.safetensors"
    given = timm.create_model(recipe.model.name, num_classes=10, **recipe.model.options)
    save_file(given.state_dict(), weights)
    heads = []
    for spec in plan_runs(recipe, data, datasets=["svhn"], seeds=[0, 1], weights=str(weights)):
        model = make_backbone(spec)
        assert torch.equal(model.blocks[0].mlp.fc1.weight, given.blocks[0].mlp.fc1.weight)
        heads.append(model.head.weight)
    assert not torch.equal(heads[0], heads[1])
    assert not any(torch.equal(head, given.head.weight) for head in heads)


@pytest.mark.parametrize(
    ("name", "classifiers"),
    [("deit_tiny_distilled_patch16_224", {"head", "head_dist"}), ("swin_tiny_patch4_window7_224", {"head.fc"})],
)
def test_timms_classifier_is_trained_whatever_its_name(data, name, classifiers):
    recipe = load_recipe(str(RECIPE))
    recipe = replace(recipe, model=replace(recipe.model, name=name, options={}))
    model = make_model(plan_runs(recipe, data, datasets=["svhn"])[0])
    support = {id(p) for layer in glora.glora_layers(model).values() for p in layer.support_parameters()}
    trained = {n.rpartition(".")[0] for n, p in model.named_parameters() if p.requires_grad and id(p) not in support}
    assert trained == classifiers


@pytest.mark.parametrize("option", [["--front"], ["--halving"], ["--set", "search.generations=1"]], ids=" ".join)
def test_other_kinds_of_search(study, capsys, option):
    [found] = run(capsys, "search", study / "svhn-seed0", "--again", *option)
    assert found["best"]["parameters"] <= 12_000
    if option == ["--front"]:
        counts = [candidate["parameters"] for candidate in found["front"]]
        scores = [candidate["score"] for candidate in found["front"]]
        assert counts == sorted(counts) and scores == sorted(scores)


def test_a_quick_search_takes_changes_and_refuses_the_journal_of_another(study, capsys):
    command = ["search", str(study / "svhn-seed0"), "--quick", "--set", "search.generations=1"]
    assert main(command) == 2
    assert re.search("journal of another search: .*settings crossover 2, expected 10", capsys.readouterr().err)
    [found] = run(capsys, *command, "--again")
    quick = glora.SearchSettings.quick(generations=1)
    assert found["settings"] == quick.to_dict()
    assert found["evaluations"] == quick.candidates == 40


def test_searches_by_loss_show_the_loss(study, capsys):
    folder = study / "svhn-seed0"
    command = ["search", str(folder), "--again", "--front", "--set", "search.generations=1"]
    assert main(command) == 0
    found = json.loads((folder / "search.json").read_text())
    assert found["metric"] == "loss"
    shown = re.findall(r"(\S*) (\d\.\d{4}) +([\d,]+) ", capsys.readouterr().out)
    candidates = [found["best"], *found["front"]]
    assert shown == [("loss", f"{-each['score']:.4f}", f"{each['parameters']:,}") for each in candidates]


def test_a_folder_of_another_run_is_left_alone(study, data, capsys):
    before = contents(study)
    command = train_command(data, study, changes=[*QUICK, "training.lr=3e-3"])
    assert main(command) == 2
    assert "holds another run: recipe training lr 0.01, expected 0.003" in capsys.readouterr().err
    assert contents(study) == before


def _call(command):
    torch.set_num_threads(1)
    assert main(command) == 0


@pytest.mark.parametrize("after", [0.0, 0.02, 0.1])
def test_killed_and_called_again(finished, data, tmp_path, after):
    """To the same bits as without."""
    command = train_command(data, tmp_path / "study", "--json")
    folder = tmp_path / "study" / "svhn-seed0"
    assert kill_while_writing(folder / "checkpoint.pt", after, _call, command) in ((-9,) if after == 0 else (-9, 0))
    _call(command)
    assert same_bits(
        load_file(folder / "supernet.safetensors"), load_file(finished / "svhn-seed0/supernet.safetensors")
    )
    assert (folder / "log.csv").read_bytes() == (finished / "svhn-seed0/log.csv").read_bytes()


@pytest.mark.parametrize("name", ["merged.safetensors", "features.npz"])
def test_merging_and_testing_killed_and_called_again(finished, study, name):
    folder = study / "svhn-seed0"
    for made in ("merged.safetensors", "merge.json", "features.npz", "test.json"):
        (folder / made).unlink()
    command = ["merge", str(folder), "--test", "--json"]
    assert kill_while_writing(folder / name, 0.0, _call, command) == -9
    _call(command)
    for made in ("merged.safetensors", "merge.json"):
        assert (folder / made).read_bytes() == (finished / "svhn-seed0" / made).read_bytes()
    first, again = (json.loads((base / "svhn-seed0/test.json").read_text()) for base in (finished, study))
    assert {**first, "date": None} == {**again, "date": None}


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


def test_a_run_in_graphs_is_the_run_without(data, tmp_path, capsys, monkeypatch):
    """Over an emulation; ``train.json`` says how the steps ran. AdamW's first steps turn rounding into differences."""
    [expected] = run(capsys, *train_command(data, tmp_path / "off", "--graphs", "off"))
    assert run(capsys, *train_command(data, tmp_path / "auto"))[0]["graphs"] == "off"  # on a CPU
    emulate(monkeypatch)
    for graphs, used in [("auto", "piecewise"), ("whole", "whole"), ("off", "off")]:
        [found] = run(capsys, *train_command(data, tmp_path / f"emulated-{graphs}", "--graphs", graphs))
        assert found["graphs"] == used
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-2)
        first, others = (read_log(tmp_path / name)[:2] for name in ("off", f"emulated-{graphs}"))
        assert others == [pytest.approx(row, rel=1e-4) for row in first]


def read_log(study):
    """Step, epoch, learning rate, loss and accuracy of every step."""
    [file] = study.glob("*/log.csv")
    return [[float(value) for value in row.split(",")] for row in file.read_text().splitlines()[1:]]


# -- before any work -------------------------------------------------------------------------------


def test_graphs_that_the_device_does_not_have(data, tmp_path, capsys):
    assert main(train_command(data, tmp_path / "out", "--graphs", "whole", "--device", "cpu")) == 2
    assert "graphs: expected 'auto' or 'off' on the device cpu" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


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
        (["--set", "training.batch_size=0"], "batch_size: expected an integer from 1, got 0"),
        (["--set", "training.lr_of.svnh=1e-3"], "training.lr_of: expected data sets out of .*got ['svnh']"),
        (["--set", "seeds=[0.5]"], "seeds: expected a list of integers from 0, got (0.5,)"),
        (["--set", "seeds=0"], "seeds: expected a list of integers from 0, got 0"),
        (["--set", "model.product=outer"], "product"),
        (["--set", "model.exclude=head"], "exclude: expected a list of module names, got 'head'"),
        (["--set", "model.options.depht=3"], "options: expected arguments of timm's"),
        (["--set", "model.options.depht=3", "--dry-run"], "options: expected arguments of timm's"),
        (["--set", "images.size=48"], "images.size: expected a size that vit_tiny_patch16_224 takes, got 48"),
        (["--set", "model.name=resnet18", "--set", "model.options={}"], "expected one without batch norm"),
    ],
)
def test_bad_arguments(data, tmp_path, capsys, more, message):
    assert main(train_command(data, tmp_path / "out", *more)) == (1 if "--dry-run" in more else 2)
    printed = "".join(capsys.readouterr())
    for part in message.split(".*"):
        assert part in printed
    assert not (tmp_path / "out").exists()


def test_a_refused_run_does_not_stand_in_the_way_of_the_corrected_one(data, tmp_path, capsys):
    command = train_command(data, tmp_path / "out", "--device", "cpu")
    assert main([*command, "--set", "training.amp=float16"]) == 2
    assert "amp: expected 'bfloat16' or None on a CPU" in capsys.readouterr().err
    assert {file.name for file in tmp_path.rglob("*") if file.is_file()} <= {"run.json"}
    run(capsys, *command)


def test_nothing_is_searched_before_all_runs_are_trained(study, capsys):
    (study / "svhn-seed0" / "supernet.safetensors").unlink()
    before = contents(study)
    assert main(["search", str(study), "--again"]) == 2
    assert "svhn-seed0: expected supernet.safetensors, found none" in capsys.readouterr().err
    assert contents(study) == before


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
