"""The refit of a run: after the search, in a folder of its own, beside the winner that the paper reports."""

import json
import re
import shutil
import subprocess
import sys

import pytest
import timm
import torch
from safetensors.torch import load_file

import glora
from glora.cli import main
from glora.protocols import protocol
from glora.runs import RunFolder, evaluate_run, find_runs, load_recipe, merge_run, recipe_from_dict
from glora.runs.models import make_model
from glora.runs.recipes import RefitSettings
from glora.runs.samples import open_splits
from tests.glora.runs.own_data import IMAGE_RECIPE, write_images, write_recipe
from tests.glora.runs.test_own_images import MODEL
from tests.glora.runs.test_own_images import command as own_command
from tests.glora.runs.test_runs import QUICK, RECIPE, _call, contents, data, run, train_command
from tests.glora.toys import kill_while_writing, same_bits
from tests.miniature.images import DATASETS

__all__ = ["data"]  # the fixture
SHORT = ("--set", "refit.steps=10")
FILES = {"refit.json", "checkpoint.pt", "log.csv", "adapter.safetensors"}
MADE = {"merge.json", "merged.safetensors", "test.json", "features.npz"}


@pytest.fixture(scope="module")
def searched(data, tmp_path_factory):
    study = tmp_path_factory.mktemp("searched") / "study"
    for command in (train_command(data, study), ["search", str(study)]):
        assert main([*command, "--json"]) == 0
    return study


@pytest.fixture(scope="module")
def finished(searched, tmp_path_factory):
    """The run and its refit after every stage; tests that change files copy it."""
    study = shutil.copytree(searched, tmp_path_factory.mktemp("finished") / "study")
    for command in (["refit", str(study), *SHORT], ["merge", str(study), "--test"]):
        assert main([*command, "--json"]) == 0
    return study


@pytest.fixture
def study(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "study")


def read(file):
    return json.loads(file.read_text())


# -- what it does ----------------------------------------------------------------------------------


def test_its_files_lie_beside_those_of_the_winner_and_change_none(searched, finished):
    folder = finished / "svhn-seed0"
    assert {file.name for file in (folder / "refit").iterdir()} == FILES | MADE
    before, after = contents(searched / "svhn-seed0"), contents(folder)
    assert {file: after[file] for file in before} == before
    assert {str(file) for file in after} - set(map(str, before)) == MADE | {f"refit/{name}" for name in FILES | MADE}


def test_it_is_the_winner_refitted_on_train800val200(searched, finished):
    """As somebody would do it in Python."""
    [winner] = find_runs(searched)
    model = glora.load_adapter(make_model(winner.spec), winner / "adapter.safetensors")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    recipe = glora.Recipe(10, 8, lr=1e-2, warmup=0.1, clip_norm=1.0, checkpoint_every=1)
    splits = open_splits(winner.spec)
    assert sorted(splits.train_and_validation.entries) == sorted([*splits.train.entries, *splits.validation.entries])
    glora.refit(model, glora.get_paths(model), splits.train_and_validation, recipe, progress=False)
    found = glora.load_adapter(make_model(winner.spec), finished / "svhn-seed0/refit/adapter.safetensors")
    assert glora.get_paths(found) == glora.get_paths(model)
    assert same_bits(found.state_dict(), model.state_dict())
    assert not same_bits(found.state_dict(), before)


def test_the_description(finished):
    folder = finished / "svhn-seed0"
    told = read(folder / "refit" / "refit.json")
    assert (told["run"], told["refit"], told["samples"], told["steps"]) == ("svhn-seed0", True, 40, 10)
    assert told["settings"] == {"steps": 10, "lr": None, "warmup": 0.1}
    assert told["winner"] == RunFolder(folder).winner
    kept = {"batch_size": 8, "weight_decay": 1e-4, "clip_norm": 1.0, "amp": None, "seed": 0, "min_lr": 0}
    assert {name: told["recipe"][name] for name in kept} == kept


def test_both_are_merged_and_tested_each_in_its_place(finished, data, capsys):
    folder, recipe = finished / "svhn-seed0", load_recipe(str(RECIPE))
    first, second = run(capsys, "merge", finished, "--test")
    assert "refit" not in first and second["refit"] is True and first["run"] == second["run"] == "svhn-seed0"
    for summary, place in ((first, folder), (second, folder / "refit")):
        assert summary["test"] == read(place / "test.json")
        assert {name: value for name, value in summary.items() if name != "test"} == read(place / "merge.json")
        model = timm.create_model(recipe.model.name, num_classes=DATASETS["svhn"][0], **recipe.model.options)
        model.load_state_dict(load_file(place / "merged.safetensors"))
        images = protocol("vtab1k").open(data, "svhn", images=recipe.images).test()
        assert glora.evaluate(model, images).accuracy == summary["test"]["accuracy"]
    assert first["paths"] == second["paths"] and first["winner"] != second["winner"]
    assert first["test"]["loss"] != second["test"]["loss"]
    assert main(["merge", str(finished), "--test"]) == 0
    assert re.findall(r"^svhn-seed0(?:, refit)? ", capsys.readouterr().out, re.M) == [
        "svhn-seed0 ",
        "svhn-seed0, refit ",
    ]


def test_every_stage_again_changes_nothing(study, capsys):
    before = contents(study)
    [told] = run(capsys, "refit", study, *SHORT)
    run(capsys, "merge", study, "--test")
    assert told == read(study / "svhn-seed0/refit/refit.json")
    assert contents(study) == before


def test_it_reads_no_test_list(searched, data, tmp_path, capsys):
    study = shutil.copytree(searched, tmp_path / "study")
    (data / "svhn" / "test.txt").rename(data / "svhn" / "test.away")
    try:
        run(capsys, "refit", study, *SHORT)
    finally:
        (data / "svhn" / "test.away").rename(data / "svhn" / "test.txt")


@pytest.mark.parametrize("after", [0.0, 0.05])
def test_killed_and_called_again(searched, finished, tmp_path, after):
    """To the same bits as without."""
    folder = shutil.copytree(searched, tmp_path / "study") / "svhn-seed0"
    command = ["refit", str(folder), *SHORT, "--json"]
    assert kill_while_writing(folder / "refit" / "checkpoint.pt", after, _call, command) in (
        (-9,) if after == 0 else (-9, 0)
    )
    _call(command)
    one, other = folder / "refit", finished / "svhn-seed0" / "refit"
    assert same_bits(*(load_file(each / "adapter.safetensors") for each in (one, other)))
    assert (one / "log.csv").read_bytes() == (other / "log.csv").read_bytes()


# -- another one -----------------------------------------------------------------------------------


def test_another_refit_needs_to_be_asked_for(study, capsys):
    folder = study / "svhn-seed0"
    before = contents(folder)
    command = ["refit", str(folder), "--set", "refit.steps=4", "--set", "refit.lr=1e-3"]
    assert main(command) == 2
    err = capsys.readouterr().err
    assert "refit: holds another refit: settings steps 10, expected 4; settings lr None, expected 0.001" in err
    assert contents(folder) == before
    [told] = run(capsys, *command, "--again")
    assert (told["steps"], told["settings"]["lr"]) == (4, 1e-3)
    after = contents(folder)
    for file, content in before.items():
        assert after["earlier-1" / file if file.parts[0] == "refit" else file] == content, file
    assert {file.name for file in (folder / "refit").iterdir()} == FILES


def test_another_search_puts_the_refit_aside(study, capsys):
    folder = study / "svhn-seed0"
    before = contents(folder / "refit")
    run(capsys, "search", folder, "--limit", "9000", "--again")
    assert contents(folder / "earlier-1" / "refit") == before
    assert not (folder / "refit").exists()
    [merged] = run(capsys, "merge", folder)
    assert "refit" not in merged


@pytest.mark.parametrize("keep", [FILES, {"checkpoint.pt"}], ids=["whole", "checkpoint"])
def test_a_refit_of_another_winner_is_refused(study, capsys, keep):
    folder = study / "svhn-seed0"
    for file in (folder / "refit").iterdir():
        if file.name not in keep:
            file.unlink()
    tensors = load_file(folder / "adapter.safetensors")
    [run_folder] = find_runs(folder)
    model = glora.load_adapter(make_model(run_folder.spec), folder / "adapter.safetensors")
    with torch.no_grad():
        model.head.bias.add_(1)
    glora.save_adapter(model, folder / "adapter.safetensors")
    assert not same_bits(tensors, load_file(folder / "adapter.safetensors"))
    before = contents(folder)
    assert main(["refit", str(folder), *SHORT]) == 2
    assert re.search("refit: holds another refit: .*winner .*expected", capsys.readouterr().err)
    if keep == FILES:
        assert main(["merge", str(folder)]) == 2
        assert "got one of another winner; `glora refit --again` puts it aside" in capsys.readouterr().err
    assert contents(folder) == before
    run(capsys, "refit", folder, *SHORT, "--again")
    assert read(folder / "refit" / "refit.json")["winner"] == run_folder.winner


def test_the_test_split_is_read_for_one_refit_alone(study):
    [found] = find_runs(study)
    shutil.copy(found / "adapter.safetensors", found.refit / "adapter.safetensors")
    model, _ = merge_run(found.refit, torch.device("cpu"))
    with pytest.raises(ValueError, match="read for another winner of this run; `glora refit --again` puts"):
        evaluate_run(found.refit, model, torch.device("cpu"))


# -- before any work -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--set", "refit.steps=0"], "refit: steps: expected an integer from 1, got 0"),
        (["--set", "refit.lr=0"], "refit: recipe: expected lr > 0"),
        (["--set", "refit.lr=high"], "refit: lr: expected a number, got 'high'"),
        (["--set", "refit.warmup=1"], "0 <= warmup < 1"),
        (["--set", "refit.epochs=3"], "refit: missing [], unknown ['epochs']"),
        (["--set", "training.epochs=5"], "set: expected changes of refit alone, got one of ['training']"),
        (["--device", "tpu9"], "device: expected one that is here"),
        (["--graphs", "whole", "--device", "cpu"], "graphs: expected 'auto' or 'off' on the device cpu"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_arguments(searched, capsys, more, message):
    before = contents(searched)
    assert main(["refit", str(searched), *more]) == 2
    assert message in capsys.readouterr().err
    assert contents(searched) == before


def test_what_was_not_searched_is_refused(searched, data, tmp_path, capsys):
    study = shutil.copytree(searched, tmp_path / "study")
    (study / "svhn-seed0" / "adapter.safetensors").unlink()
    assert main(["refit", str(study)]) == 2
    assert "expected adapter.safetensors, found none; run `glora search` first" in capsys.readouterr().err
    run(capsys, *train_command(data, tmp_path / "lora", "--preset", "lora"))
    assert main(["refit", str(tmp_path / "lora")]) == 2
    assert "expected a searched run, got the preset 'lora', whose path was trained itself" in capsys.readouterr().err
    assert main(["refit", str(tmp_path)]) == 2
    assert "folder: expected a run" in capsys.readouterr().err


def test_other_lists_of_images_are_refused(study, data, capsys):
    before, refused = contents(study), []
    for name in ("train800.txt", "val200.txt", "train800val200.txt"):
        file = data / "svhn" / name
        text = file.read_text()
        file.write_text("".join(text.splitlines(keepends=True)[:-1]))
        try:
            refused.append(main(["refit", str(study), *SHORT]))
        finally:
            file.write_text(text)
        err = capsys.readouterr().err
        assert "images that it was trained with" in err or "samples 40, expected 39" in err
    assert refused == [2, 2, 2] and contents(study) == before


# -- the recipe ------------------------------------------------------------------------------------


def test_the_table_of_a_recipe():
    assert load_recipe("vtab1k").refit == RefitSettings(200, None, 0.1)
    changed = load_recipe("vtab1k", ["refit.steps=300", "refit.lr=1e-3", "training.lr_of.dtd=5e-4"])
    assert recipe_from_dict(changed.to_dict()) == changed
    assert changed.refit == RefitSettings(300, 1e-3)
    own, inherited = (settings.recipe(changed.training, "dtd", 7) for settings in (changed.refit, RefitSettings()))
    assert (own.steps, own.lr, inherited.steps, inherited.lr) == (300, 1e-3, 200, 5e-4)
    assert (own.batch_size, own.weight_decay, own.seed, own.checkpoint_every) == (64, 1e-4, 7, 30)


def test_runs_from_before_there_were_refits(searched, tmp_path, capsys):
    study = shutil.copytree(searched, tmp_path / "study")
    described = read(study / "svhn-seed0" / "run.json")
    assert described["recipe"].pop("refit") == {"steps": 200, "warmup": 0.1}
    (study / "svhn-seed0" / "run.json").write_text(json.dumps(described))
    [told] = run(capsys, "refit", study, *SHORT)
    assert told["steps"] == 10


def test_runs_of_a_recipe_with_a_table(searched, data, tmp_path, capsys):
    changes = [*QUICK, "refit.steps=3", "refit.lr=1e-3"]
    run(capsys, *train_command(data, tmp_path / "study", changes=changes))
    run(capsys, "search", tmp_path / "study", "--set", "search.generations=1")
    [told] = run(capsys, "refit", tmp_path / "study")
    assert told["settings"] == {"steps": 3, "lr": 1e-3, "warmup": 0.1}


# -- other data, other processes -------------------------------------------------------------------


def test_own_images_from_the_folder_to_the_report(tmp_path, capsys):
    folder, recipe = write_images(tmp_path / "animals"), write_recipe(tmp_path, IMAGE_RECIPE)
    study, place = tmp_path / "study", tmp_path / "study" / "animals-seed0" / "refit"
    assert main(own_command(folder, recipe, study)) == 0
    assert main(["search", str(study), "--json"]) == 0
    capsys.readouterr()
    assert main(["refit", str(study), *SHORT]) == 0
    out = capsys.readouterr().out
    assert out.startswith("animals-seed0\nrun ") and out.endswith(f"\n\nNext: glora merge {study} --test\n")
    assert read(place / "refit.json")["samples"] == 24 + 6
    [found] = find_runs(study)
    splits = open_splits(found.spec)
    assert splits.train_and_validation.entries == (*splits.train.entries, *splits.validation.entries)
    first, second = run(capsys, "merge", study, "--test")
    assert (first["test"]["samples"], second["test"]["samples"]) == (6, 6)
    model = timm.create_model(MODEL, num_classes=3, **found.spec.recipe.model.options).eval()
    model.load_state_dict(load_file(place / "merged.safetensors"))
    assert glora.evaluate(model, splits.test()).accuracy == second["test"]["accuracy"]
    run(capsys, "report", study)
    page = (study / "report" / "report.md").read_text()
    header = "| Data | GLoRA small | GLoRA small, searched, refit on train+val |"
    accuracies = " | ".join(f"{100 * each['test']['accuracy']:.1f} (1 seed)" for each in (first, second))
    assert header in page and f"| animals | {accuracies} |" in page


def test_shots_are_refitted_on_the_shots_alone():
    """Their validation list is never trained on."""
    assert {name: protocol(name).trains_last_on for name in ("vtab1k", "fewshot", "imagenet")} == {
        "vtab1k": "train+val",
        "fewshot": "train",
        "imagenet": "train",
    }


def test_under_torchrun_as_in_one_process(data, tmp_path):
    """Without drop path, of which every rank has its own draws."""
    one = tmp_path / "one"
    assert main(train_command(data, one, "--json", changes=[*QUICK, "model.drop_path=0"])) == 0
    assert main(["search", str(one), "--json"]) == 0
    two = shutil.copytree(one, tmp_path / "two")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "glora"]
    command = ["--set", "refit.steps=3", "--json"]
    assert main(["refit", str(one), *command]) == 0
    done = subprocess.run([*launch, "refit", two, *command], check=True, capture_output=True, text=True, timeout=300)
    [shared], alone = json.loads(done.stdout), read(one / "svhn-seed0/refit/refit.json")
    assert shared["loss"] == pytest.approx(alone["loss"], rel=1e-2)
    assert shared["winner"] == alone["winner"]
