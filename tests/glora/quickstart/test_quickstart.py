"""The demonstration, in small: same structure, same files, figures that repeat."""

import copy
import json
from dataclasses import replace

import pytest
import torch

from glora.quickstart.digits import SHIFTS, TASKS, draw_few_shot, load_source
from glora.quickstart.figures import save_figures
from glora.quickstart.methods import SEARCHED
from glora.quickstart.study import StudySettings, load_study, run_study, save_study
from glora.quickstart.table import format_study
from tests.tiers import at

SMALL = StudySettings(shots=(1, 2), seeds=at(1, 2), steps=2, pretraining_steps=4)
METHODS = [
    "linear probe",
    "BitFit",
    "SSF (A, D, E vectors)",
    "LoRA r3",
    "LoRA r3 (train+val)",
    "full fine-tuning",
    "random path of the supernet",
    "GLoRA, searched",
    "GLoRA, searched and refit (train+val)",
]


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    return run_study(SMALL, tmp_path_factory.mktemp("study"), progress=False)


def without_seconds(data):
    if isinstance(data, dict):
        return {key: without_seconds(value) for key, value in data.items() if "seconds" not in key}
    return [without_seconds(value) for value in data] if isinstance(data, list) else data


def test_rows_and_parameters(study):
    assert [summary["shots"] for summary in study["summary"]] == [1, 2]
    for summary in study["summary"]:
        assert [row["method"] for row in summary["rows"]] == METHODS
        assert [row["parameters"] for row in summary["rows"][:6]] == [0, 2944, 6912, 12288, 12288, 201536]
    assert study["pretraining"]["parameters"] == 201536


def test_searched_path_is_within_the_limit(study):
    for run in study["runs"]:
        searched = next(row for row in run["rows"] if row["method"] == SEARCHED)
        assert 0 < searched["parameters"] <= searched["details"]["limit"]
        assert searched["details"]["evaluations"] == 180
        assert len(searched["details"]["paths"]) == 16


def test_merge_is_proven(study):
    for summary in study["summary"]:
        proof = summary["merge"]
        assert proof["same_parameters"]
        assert proof["same_modules"]
        assert proof["largest_output_difference"] < 1e-4
        assert proof["largest_layer_error"] < 1e-4
        assert proof["agreement"] == 1.0


def test_same_seed_same_figures(study, tmp_path):
    """Also of a study that has fewer runs: each stands for itself."""
    again = run_study(at(replace(SMALL, shots=(2,)), SMALL), tmp_path, progress=False)
    for part in ("runs", "summary"):
        same = [found for found in study[part] if found["shots"] in again["settings"]["shots"]]
        assert without_seconds(again[part]) == without_seconds(same)
    assert without_seconds(again["pretraining"]) == without_seconds(study["pretraining"])


def test_json_table_and_figures(study, tmp_path):
    file = save_study(study, tmp_path)
    assert load_study(file) == json.loads(json.dumps(study))
    text = format_study(load_study(file))
    assert all(method in text for method in METHODS)
    assert "the same parameter names, shapes and module types" in text
    names = {figure.name for figure in save_figures(study, tmp_path)}
    assert names == {
        "accuracy-inverted-1shots.png",
        "accuracy-inverted-2shots.png",
        "paths-inverted-1shots.png",
        "paths-inverted-2shots.png",
        "shots-inverted.png",
    }
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in names)


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"format": 1}'])
def test_anything_else_is_not_a_study(content, tmp_path):
    file = tmp_path / "quickstart.json"
    file.write_text(content)
    with pytest.raises(ValueError, match="expected the JSON of a quickstart"):
        load_study(file)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tasks": ("mirrored",)}, "tasks: expected distinct names"),
        ({"tasks": ()}, "tasks: expected distinct names"),
        ({"shots": (4, 4)}, "shots: expected distinct numbers"),
        ({"rows": ("lora", "dora")}, "rows: expected 'all' or names out of"),
        ({"seeds": 0}, "seeds: expected at least 1, got 0"),
        ({"workers": 0}, "workers: expected at least 1, got 0"),
    ],
)
def test_bad_settings(change, message):
    with pytest.raises(ValueError, match=message):
        StudySettings(**change)


def test_too_many_shots_fail_before_any_work(tmp_path):
    with pytest.raises(ValueError, match="shots: expected 1 to"):
        run_study(StudySettings(shots=(500,)), tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_pictures_have_room_for_all_rows(study, tmp_path):
    many = copy.deepcopy(study)
    for summary in many["summary"]:
        summary["rows"] *= 3
    assert all(figure.exists() for figure in save_figures(many, tmp_path))


def test_table_without_pre_training_and_generalisation(study):
    texts = copy.deepcopy(study)
    texts["settings"]["tasks"], texts["pretraining"]["accuracy"] = ["plots"], None
    for summary in texts["summary"]:
        summary["rows"] = [{**row, "generalisation": None} for row in summary["rows"]]
    text = format_study(texts)
    assert "Backbone: the top 2 of the 6 layers of all-MiniLM-L6-v2, 201,536 parameters.\n" in text
    assert "Used: all-MiniLM-L6-v2 (Apache-2.0)" in text
    assert "2 texts a class" in text


def test_splits_are_disjoint_and_complete():
    for task in TASKS:
        data = draw_few_shot(task, 16, seed=1)
        assert [len(split) for split in data[:3]] == [160, 40, 697]
        assert data.train.tensors[1].bincount().tolist() == [16] * 10
        assert data.validation.tensors[1].bincount().tolist() == [4] * 10
        images = torch.cat([split.tensors[0] for split in data[:3]]).flatten(1)
        whole = torch.cat([split.tensors[0] for split in draw_few_shot(task, 4, seed=2)[:3]]).flatten(1)
        assert torch.equal(images.unique(dim=0), whole.unique(dim=0))


def test_draws_depend_on_the_seed_alone():
    one, same, other = (draw_few_shot("inverted", 2, seed) for seed in (3, 3, 4))
    assert torch.equal(one.train.tensors[0], same.train.tensors[0])
    assert not torch.equal(one.train.tensors[0], other.train.tensors[0])


def test_tasks_and_shifts_change_images_and_keep_labels():
    upright = load_source()[1].tensors[0]
    assert torch.equal(TASKS["inverted"](upright), -upright)
    assert torch.equal(TASKS["rotated90"](TASKS["rotated90"](upright)), upright.flip(-1, -2))
    test = draw_few_shot("inverted", 1, 0)
    for name, shifted in test.shifted_tests.items():
        assert name in SHIFTS
        assert shifted.tensors[0].shape == test.test.tensors[0].shape
        assert not torch.equal(shifted.tensors[0], test.test.tensors[0])
        assert torch.equal(shifted.tensors[1], test.test.tensors[1])
