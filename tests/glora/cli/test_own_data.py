"""Data of one's own, as somebody types it: from a folder of images to a report, with Ctrl-C in the middle."""

import json
import re
import signal
import subprocess
import sys
import time

import pytest
from safetensors.torch import load_file

from glora.cli import main
from tests.glora.runs.own_data import IMAGE_RECIPE, write_images, write_recipe, write_texts
from tests.glora.toys import same_bits

MODEL = "vit_tiny_patch16_224"
STEPS = 120  # 40 epochs of 24 images, in batches of 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("data") / "animals")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return write_recipe(tmp_path_factory.mktemp("recipe"), IMAGE_RECIPE)


def train_command(folder, recipe, out):
    given = ["--images", folder, "--model", MODEL, "--weights", "none", "--recipe", recipe, "--out", out]
    return ["train", *map(str, given), "--set", "training.epochs=40"]


def start(command):
    """``glora`` in a process of its own, which Ctrl-C can reach whatever this one was started with."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen([sys.executable, "-m", "glora", *command], start_new_session=True, **pipes)
    finally:
        signal.signal(signal.SIGINT, before)


def interrupted(command, checkpoint):
    """Status, output and error of a command that gets SIGINT as soon as there is a checkpoint."""
    process = start(command)
    try:
        while not checkpoint.is_file() and process.poll() is None:
            time.sleep(0.002)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=120)
    finally:
        if process.poll() is None:
            process.kill()
    return process.returncode, out, err


def test_from_a_folder_of_images_to_a_report_with_ctrl_c_in_the_middle(folder, recipe, tmp_path, capsys):
    study, run = tmp_path / "study", tmp_path / "study" / "animals-seed0"
    command = train_command(folder, recipe, study)
    code, out, err = interrupted(command, run / "checkpoint.pt")
    last = err.splitlines()[-1]
    [step] = re.findall(
        rf"^glora train: interrupted; saved: .*, step (\d+) of {STEPS}; the same command line continues$", last
    )
    assert (code, out) == (130, "animals-seed0\n") and 0 < int(step) < STEPS and "Traceback" not in err
    assert not (run / "train.json").exists()

    assert main(command) == 0
    out, err = capsys.readouterr()
    assert f"train: continues from {run / 'checkpoint.pt'}, step {step} of {STEPS}\n" in err
    assert "; validation loss " in err and f"Next: glora search {study}" in out
    assert main([*train_command(folder, recipe, tmp_path / "uncut"), "--json"]) == 0
    uncut = tmp_path / "uncut" / "animals-seed0"
    assert same_bits(load_file(run / "supernet.safetensors"), load_file(uncut / "supernet.safetensors"))
    assert (run / "log.csv").read_bytes() == (uncut / "log.csv").read_bytes()

    capsys.readouterr()
    for command, then in (
        (["search", str(study)], f"Next: glora refit {study}"),
        (["refit", str(study), "--set", "refit.steps=10"], f"Next: glora merge {study} --test"),
        (["merge", str(study), "--test"], f"Next: glora report {study}"),
        (["report", str(study)], "100.00%"),
    ):
        assert main(command) == 0
        assert then in capsys.readouterr().out
    tested = json.loads((run / "test.json").read_text())
    assert tested["samples"] == 6 and tested["accuracy"] == 1  # three colours
    assert "| animals | 100.0 (1 seed) | 100.0 (1 seed) |" in (study / "report" / "report.md").read_text()


def test_the_study_is_named_after_the_data_by_default(folder, recipe, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_texts(tmp_path / "reviews.csv")
    command = ["train", "--images", str(folder), "--recipe", str(recipe), "--model", MODEL, "--weights", "none"]
    assert main([*command, "--dry-run", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["out"] == "runs/animals" and plan["runs"][0]["data"] == str(tmp_path / "runs" / "animals" / "split")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "expected one of --data FOLDER (with --recipe and --weights), --images FOLDER (with --model) or --texts"),
        (["--recipe", "vtab1k"], "(with --model), got none"),
        (["--images", "a", "--texts", "b", "--model", "c"], "got --images and --texts"),
        (["--images", "a", "--data", "b", "--model", "c"], "got --data and --images"),
        (["--images", "a"], "--images: expected --model with it, got none"),
        (["--texts", "a"], "--texts: expected --model with it, got none"),
        (["--data", "a"], "--data: expected --recipe and --weights with it, got none"),
        (["--data", "a", "--recipe", "vtab1k"], "--data: expected --weights with it, got none"),
        (
            ["--data", "a", "--recipe", "vtab1k", "--weights", "none", "--model", "b", "--max-length", "3"],
            "--data: expected no --max-length or --model with it",
        ),
        (["--images", "a", "--model", "b", "--text-column", "c"], "--images: expected no --text-column with it"),
        (["--images", "a", "--model", "b", "--shots", "1"], "--images: expected no --shots with it"),
        (["--texts", "a", "--model", "b", "--dataset", "c"], "--texts: expected no --dataset with it"),
    ],
)
def test_arguments_that_do_not_go_together_are_refused(arguments, message, capsys):
    assert main(["train", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_what_is_missing_of_the_weights_is_told_with_where_to_get_it(folder, recipe, tmp_path, capsys):
    command = train_command(folder, recipe, tmp_path / "study")
    command[command.index("none")] = str(tmp_path / "vit.safetensors")
    assert main(command) == 2
    err = capsys.readouterr().err
    assert "weights: expected a file, found none" in err and "download model.safetensors of https://" in err
    assert not (tmp_path / "study").exists()
