"""Reports of synthetic studies: the right numbers, nothing invented, published ones apart, files that open."""

import csv
import io
import json
import re
import shutil
from dataclasses import replace
from itertools import pairwise
from statistics import fmean, stdev
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

import glora
from glora import LayerShape, PathConfig
from glora.protocols import GROUPS, FewShot, average
from glora.report import load_runs, write_report
from glora.report.datasets import FEW_SHOT, VTAB, group_of
from glora.report.drawing import NotDrawn
from glora.report.figures.distribution import distribution_figure, shares_by_tensor, shares_by_type
from glora.report.figures.features import choose_classes, choose_images, features_figure, read_features
from glora.report.figures.fewshot import few_shot_figure
from glora.report.figures.path import path_figure
from glora.report.figures.search import search_figure
from glora.report.figures.training import read_log, running_mean, training_figure
from glora.report.figures.vtab import vtab_figure
from glora.report.layer_types import layer_types
from glora.report.overview import overview_markdown, overview_rows
from glora.report.published import published
from glora.report.seeds import by_setting
from glora.report.tables.fewshot import few_shot_table
from glora.report.tables.imagenet import imagenet_table
from glora.report.tables.vtab import vtab_table
from tests.glora.report.report_runs import SMALL, SWIN_B, VIT_B, change, vit_layers, write, write_refit, write_run

STAGES = ("train.json", "log.csv", "search.json", "merge.json", "test.json", "features.npz")


def settings_of(folder):
    return by_setting(load_runs(folder))


def csv_rows(table):
    return list(csv.DictReader(io.StringIO(table.to_csv())))


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def markdown_cell(table, row, column):
    header, _, *body = [cells(line) for line in table.to_markdown().splitlines() if line.startswith("|")]
    return next(line for line in body if line[0] == row)[header.index(column)]


def vtab_study(folder, names=VTAB, seeds=(0, 1), **options):
    """Accuracies that are all different; returns them in per cent by data set, then seed."""
    accuracies = {}
    for index, name in enumerate(VTAB):
        if name in names:
            accuracies[name] = {seed: 0.5 + 0.02 * index + 0.001 * (index + 3) * seed for seed in seeds}
            for seed, accuracy in accuracies[name].items():
                write_run(folder / f"{name}-seed{seed}", name, seed, accuracy=accuracy, **options)
    return {name: {seed: 100 * value for seed, value in each.items()} for name, each in accuracies.items()}


# -- the whole report ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A study of two finished runs and one that was only trained."""
    study = tmp_path_factory.mktemp("study")
    vtab_study(study, ("cifar", "svhn"), seeds=(0,), limit=3000)
    begun = write_run(study / "dtd-seed0", "dtd", limit=3000)
    for name in STAGES[2:]:
        (begun / name).unlink()
    return study, write_report(study, progress=False)


def test_every_file_is_there_and_opens(written):
    study, report = written
    names = {file.name for file in report.files}
    assert {file.name for file in (study / "report").iterdir()} == names
    assert len(names) == len(report.files)
    stems = [f"accuracy-vtab1k-{VIT_B}", f"parameters-vtab1k-{VIT_B}-GLoRA_0.86M", "dtd-seed0-training"]
    stems += [
        f"{run}-{kind}" for run in ("cifar-seed0", "svhn-seed0") for kind in ("paths", "search", "training", "features")
    ]
    tables = {"report.md", f"table-vtab1k-{VIT_B}.md", f"table-vtab1k-{VIT_B}.csv"}
    assert names == tables | {f"{stem}.{kind}" for stem in stems for kind in ("png", "svg")}
    for file in report.files:
        if file.suffix == ".png":
            with Image.open(file) as image:
                image.load()
                assert min(image.size) > 300
                assert np.asarray(image.convert("L")).std() > 1
        elif file.suffix == ".svg":
            assert ElementTree.parse(file).getroot().tag == "{http://www.w3.org/2000/svg}svg"


def test_the_page_shows_every_figure_and_table(written):
    study, report = written
    page = report.files[0].read_text()
    linked = set(re.findall(r"\]\(([^)]+)\)", page))
    assert linked == {file.name for file in report.files[1:]}
    assert all((study / "report" / name).is_file() for name in linked)
    for name in ("cifar-seed0", "svhn-seed0", "dtd-seed0"):
        assert f"<summary>{name}:" in page
        assert name in report.text


def test_one_line_a_run(written):
    study, report = written
    runs = {run.name: run for run in load_runs(study)}
    lines = {
        line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]]
        for line in report.files[0].read_text().splitlines()
        if re.match(r"\| \w+-seed0 ", line)
    }
    run = runs["cifar-seed0"]
    assert lines["cifar-seed0"][:6] == [
        "GLoRA 0.86M",
        f"{run.parameters:,}",
        "3,000",
        f"{100 * run.search.best.score:.2f}%",
        "50.00%",
        "2.00",
    ]
    assert lines["cifar-seed0"][7:] == ["24", "1.0e-06", ""]
    remarks = "not searched; not merged; not tested"
    assert lines["dtd-seed0"] == ["GLoRA 0.86M", "-", "3,000", "-", "-", "2.00", "-", "-", "-", remarks]


REFIT = "GLoRA 0.86M, searched, refit on train+val"


def test_refits_have_rows_columns_and_figures_of_their_own(tmp_path):
    vtab_study(tmp_path, ("cifar", "svhn"), seeds=(0, 1), limit=3000)
    without = settings_of(tmp_path)
    for seed in (0, 1):
        write_refit(tmp_path / f"cifar-seed{seed}", 0.8 + 0.1 * seed)
    runs = load_runs(tmp_path)
    rows = {row[0]: row[1:] for row in overview_rows(runs)}
    assert list(rows) == [
        *("cifar-seed0", "cifar-seed1", "svhn-seed0", "svhn-seed1"),
        *("cifar-seed0-refit", "cifar-seed1-refit"),
    ]
    found, first = rows["cifar-seed0-refit"], rows["cifar-seed0"]
    assert found == [REFIT, first[1], "3,000", "-", "80.00%", "0.50", "-", "-", "1.0e-06", ""]
    table = vtab_table(VIT_B, by_setting(runs))
    row = "CIFAR-100 (Natural)"
    before, after = csv_rows(vtab_table(VIT_B, without)), csv_rows(table)
    assert [entry for entry in after if entry["method"] != REFIT] == before
    [cell] = [entry for entry in after if (entry["method"], entry["row"]) == (REFIT, row)]
    assert (float(cell["value"]), cell["seeds"], cell["source"]) == (pytest.approx(85), "2", "this study")
    assert markdown_cell(table, row, REFIT).startswith("85.0 ± 7.1 (2 seeds)")
    assert any(note.startswith("Refit: ") for note in table.notes)
    assert not any(note.startswith("Refit: ") for note in vtab_table(VIT_B, without).notes)
    assert "(4 runs)" in overview_markdown(runs)[-3]

    names = {file.name for file in write_report(tmp_path, progress=False).files}
    assert {"cifar-seed0-refit-training.png", "cifar-seed0-refit-features.png"} <= names
    assert not {"cifar-seed0-refit-paths.png", "cifar-seed0-refit-search.png"} & names
    assert sum(name.startswith("parameters-") and name.endswith(".png") for name in names) == 1


def test_refits_that_were_made_differently_are_not_averaged(tmp_path):
    for seed, steps in enumerate((200, 300)):
        write_refit(write_run(tmp_path / f"cifar-seed{seed}", "cifar", seed), steps=steps)
    methods = [run.setting.method for run in load_runs(tmp_path)]
    assert methods == ["GLoRA 0.86M", "GLoRA 0.86M", f"{REFIT}, refit.steps 200", f"{REFIT}, refit.steps 300"]


def test_refits_that_are_not_finished_or_of_another_winner_say_so(tmp_path):
    run = write_run(tmp_path / "cifar-seed0")
    refit = write_refit(run, None)
    assert overview_rows(load_runs(tmp_path))[1][-1] == "not trained; not merged; not tested"
    shutil.rmtree(refit)
    write_refit(run)
    (run / "adapter.safetensors").write_bytes(b"another")
    assert [row[-1] for row in overview_rows(load_runs(run))] == [
        "",
        "refit of another winner than adapter.safetensors",
    ]
    change(refit / "refit.json", winner=...)
    with pytest.raises(ValueError, match=r"refit.json: winner: expected a text, got nothing"):
        load_runs(run)


def test_shots_are_refitted_on_the_shots_alone(tmp_path):
    write_refit(write_run(tmp_path / "a", "food-101", protocol="fewshot", shots=4))
    assert [run.setting.method for run in load_runs(tmp_path)] == [
        "GLoRA 0.86M",
        "GLoRA 0.86M, searched, refit on train",
    ]


def test_the_overview_says_what_the_runs_were_made_from(tmp_path):
    write_run(tmp_path / "a", "cifar", weights=None)
    other = write_run(tmp_path / "b", "dtd", weights="/models/ViT-B_16.npz")
    fingerprint = {"weights": 0xABC, "training images": 1, "validation images": 2}
    change(other / "run.json", fingerprint=fingerprint, versions={"glora": "0.1", "torch": "2.9"})
    write_run(tmp_path / "c", "svhn", weights=None)
    lines = overview_markdown(load_runs(tmp_path))
    assert "- Weights: ViT-B_16.npz (CRC-32 00000abc) (1 run); none, randomly initialised (2 runs)." in lines
    assert f"- Versions: glora 0.1, torch 2.9 (1 run); glora {glora.__version__} (2 runs)." in lines
    assert "- Merge error: the largest of a merged layer's output against the formula in fp64." in lines


def test_the_limit_is_the_searchs_own(tmp_path):
    run = write_run(tmp_path / "run", limit=9000)
    recipe = json.loads((run / "run.json").read_text())["recipe"]
    change(run / "run.json", recipe={**recipe, "sizes": {"0.86M": {"ranks": [4, 2], "limit": 15000}}}, limit=15000)
    assert overview_rows(load_runs(run))[0][3] == "9,000"
    (run / "search.json").unlink()
    assert overview_rows(load_runs(run))[0][3] == "15,000"


def test_runs_of_similar_names_have_files_of_their_own(tmp_path):
    names = ("a b", "a_b", "A_B", "a_b-2")
    for dataset, name in zip(VTAB, names):
        run = write_run(tmp_path / name, dataset)
        (run / "features.npz").unlink()
    report = write_report(tmp_path, progress=False)
    paths = [file.name for file in report.files if "-paths" in file.name and file.suffix == ".svg"]
    assert len(paths) == len({name.casefold() for name in paths}) == len(names)
    page = report.files[0].read_text()
    for name in names:  # each run's part shows that run
        _, _, part = page.partition(f"<summary>{name}: ")
        title = part.partition("<")[0]
        picture = re.search(r"\(([^()]+-paths[^()]*\.svg)\)", part).group(1)
        assert f"Path of {title}" in (tmp_path / "report" / picture).read_text()


def test_what_later_stages_do_not_need_may_be_absent(tmp_path):
    run = write_run(tmp_path / "run")
    change(run / "run.json", versions=..., samples=..., date=...)
    change(run / "train.json", images_per_second=..., loss=..., steps=...)
    change(run / "merge.json", largest_error=..., largest_difference=..., model_difference=...)
    change(run / "test.json", loss=..., samples=...)
    [loaded] = load_runs(run)
    assert loaded.remarks == []
    assert overview_rows([loaded])[0][9] == "-"
    assert "- Versions: not recorded (1 run)." in overview_markdown([loaded])


def test_a_report_again_is_the_same_bytes(written, tmp_path):
    study, report = written
    again = write_report(study / "cifar-seed0", tmp_path / "a" / "b", progress=False)
    before = {file.name: file.read_bytes() for file in report.files}
    for file in again.files:
        assert file.parent == tmp_path / "a" / "b"
        if file.name.startswith("cifar"):
            assert file.read_bytes() == before[file.name], file.name


def test_a_run_that_has_only_begun(tmp_path):
    run = write_run(tmp_path / "cifar-seed0")
    for name in STAGES:
        (run / name).unlink()
    report = write_report(run, progress=False)
    assert {file.name for file in report.files} == {
        "report.md",
        f"table-vtab1k-{VIT_B}.md",
        f"table-vtab1k-{VIT_B}.csv",
    }
    assert "not trained; not searched; not merged; not tested" in report.text
    page = report.files[0].read_text()
    assert "Nothing to show yet." in page
    assert "No run was tested yet." in page
    rows = csv_rows(vtab_table(VIT_B, settings_of(run)))
    assert all(row["value"] == "" for row in rows if row["source"] == "this study")


@pytest.mark.parametrize(
    ("missing", "figure", "remarks"),
    [
        ("train.json", None, ["not trained"]),
        ("log.csv", training_figure, []),
        ("search.json", search_figure, ["not searched"]),
        ("merge.json", None, ["not merged"]),  # the path is the search's winner
        ("test.json", None, ["not tested"]),
        ("features.npz", features_figure, []),
    ],
)
def test_any_stage_may_be_missing(missing, figure, remarks, tmp_path):
    run = write_run(tmp_path / "cifar-seed0", features=12)
    (run / missing).unlink()
    [loaded] = load_runs(run)
    assert loaded.remarks == remarks
    for each in (path_figure, training_figure, search_figure, features_figure):
        assert (each(loaded) is None) == (each is figure)


def test_a_preset_has_nothing_to_search(tmp_path):
    run = write_run(tmp_path / "cifar-seed0", preset="lora")
    [loaded] = load_runs(run)
    assert loaded.remarks == []
    assert loaded.limit is None
    assert loaded.setting.method == "preset lora, rank 4"
    assert loaded.parameters == json.loads((run / "merge.json").read_text())["parameters"]


def test_a_preset_without_a_rank_names_none(tmp_path):
    [loaded] = load_runs(write_run(tmp_path / "run", preset="bitfit"))
    assert loaded.setting.method == "preset bitfit"


def test_a_merge_of_other_paths_is_remarked(tmp_path):
    run = write_run(tmp_path / "cifar-seed0")
    none = {name: PathConfig().to_dict() for name in vit_layers(2, 16)}
    change(run / "merge.json", paths=none, parameters=0)
    [loaded] = load_runs(run)
    assert loaded.remarks == ["merge.json has other paths than the winner of search.json"]
    assert loaded.parameters == 0
    assert distribution_figure(loaded.setting, {loaded.task: [loaded]}) is None


# -- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["run.json", "train.json", "search.json", "merge.json", "test.json"])
@pytest.mark.parametrize(("content", "message"), [("{", "expected JSON"), ("[1]", "expected a JSON object, got list")])
def test_damaged_json(name, content, message, tmp_path):
    run = write_run(tmp_path / "cifar-seed0")
    (run / name).write_text(content)
    with pytest.raises(ValueError, match=f"{name}: {message}"):
        write_report(tmp_path, progress=False)
    assert not (tmp_path / "report").exists()


@pytest.mark.parametrize(
    ("name", "entries", "message"),
    [
        ("run.json", {"format": 2}, "expected run format 1, got 2; a newer glora"),
        ("run.json", {"fingerprint": ...}, "expected the description of a run, got KeyError"),
        ("run.json", {"size": "9M"}, r"size: expected one of \['0.86M'\], got '9M'"),
        ("run.json", {"preset": "cub"}, "preset: expected one of .*lora.*got 'cub'"),
        ("run.json", {"weights": 3}, "weights: expected a text, got 3"),
        ("run.json", {"dataset": "mnist"}, "dataset: expected one of .*cifar.*got 'mnist'"),
        ("run.json", {"seed": "0"}, "seed: expected an integer, got '0'"),
        ("run.json", {"seed": True}, "seed: expected an integer, got True"),
        ("run.json", {"recipe": {}}, "the file: missing .*model"),
        ("run.json", {"layers": [["fc1", 8, 6, 1, "hadamard"]]}, "layers: expected lists"),
        ("run.json", {"versions": {"glora": 1}}, "versions.glora: expected a text, got 1"),
        ("train.json", {"seconds": None}, "seconds: expected a number, got None"),
        ("search.json", {"history": [[0, 5]]}, "history: expected lists"),
        ("search.json", {"history": [[0, 5, "high", 1.0]]}, "history: expected numbers as scores"),
        ("search.json", {"limit": -1}, "limit: expected an integer from 0, got -1"),
        ("search.json", {"settings": ...}, "settings: expected an object, got nothing"),
        ("test.json", {"date": ...}, "date: expected a text, got nothing"),
        ("search.json", {"best": {}}, "best.paths: expected an object, got nothing"),
        ("merge.json", {"paths": {}}, "paths: expected one for each of the 8 layers"),
        ("merge.json", {"parameters": 7}, "parameters: expected the [0-9]+ that its paths read, got 7"),
        ("test.json", {"split": "val200"}, "split: expected 'test', got 'val200'"),
        ("test.json", {"accuracy": 75.0}, "accuracy: expected a number from 0 to 1, got 75.0"),
        ("test.json", {"targets": {"V2": {}}}, "targets.V2.accuracy: expected a number, got nothing"),
    ],
)
def test_entries_that_are_not_what_they_should_be(name, entries, message, tmp_path):
    run = write_run(tmp_path / "cifar-seed0")
    change(run / name, **entries)
    with pytest.raises(ValueError, match=f"{name}: {message}"):
        load_runs(tmp_path)


def test_paths_of_unknown_kinds(tmp_path):
    run = write_run(tmp_path / "cifar-seed0")
    merged = json.loads((run / "merge.json").read_text())
    merged["paths"]["blocks.0.attn.qkv"]["C"] = "constant"
    write(run / "merge.json", merged)
    with pytest.raises(ValueError, match=r"merge.json: paths: C: expected one of"):
        load_runs(run)


def test_no_runs(tmp_path):
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(ValueError, match=f"folder: expected a run.*got {folder}"):
            write_report(folder)
        assert not (folder / "report").exists()


def test_the_same_run_twice(tmp_path):
    write_run(tmp_path / "one", "cifar", 3)
    write_run(tmp_path / "two", "cifar", 3)
    with pytest.raises(ValueError, match=r"folder: expected different runs, got one and two, both of GLoRA 0\.86M"):
        load_runs(tmp_path)
    shutil.rmtree(tmp_path / "two")
    write_run(tmp_path / "two", "cifar", 3, size="0.44M")
    assert len(load_runs(tmp_path)) == 2


@pytest.mark.parametrize("inner", ["", "deeper"])
def test_a_file_where_the_report_should_go(inner, tmp_path):
    write_run(tmp_path / "run")
    (tmp_path / "report").write_text("mine")
    with pytest.raises(ValueError, match=r"out: expected a folder.*report"):
        write_report(tmp_path, tmp_path / "report" / inner if inner else None, progress=False)
    assert (tmp_path / "report").read_text() == "mine"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("step,loss\n1,2\n", "expected the columns step, lr, loss, got"),
        ("", "expected the columns"),
        ("step,lr,loss\n1,0.1,2\n2,0.1\n", "line 3: loss: expected a number, got None"),
        ("step,lr,loss\n1,much,2\n", "line 2: lr: expected a number, got 'much'"),
    ],
)
def test_damaged_logs(text, message, tmp_path):
    (tmp_path / "log.csv").write_text(text)
    with pytest.raises(ValueError, match=f"log.csv: {message}"):
        read_log(tmp_path / "log.csv")


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"frozen": np.ones((4, 2)), "labels": np.ones(4)}, "expected frozen, adapted and labels"),
        ({"frozen": np.ones((4, 2)), "adapted": np.ones((3, 2)), "labels": np.ones(4)}, r"expected \(n, d\)"),
    ],
)
def test_damaged_features(arrays, message, tmp_path):
    np.savez(tmp_path / "features.npz", **arrays)
    with pytest.raises(ValueError, match=f"features.npz: {message}"):
        read_features(tmp_path / "features.npz")


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut off", b"\x93NUMPY", b"text"])
def test_features_that_are_no_arrays(content, tmp_path):
    (tmp_path / "features.npz").write_bytes(content)
    with pytest.raises(ValueError, match=r"features\.npz: expected frozen, adapted and labels"):
        read_features(tmp_path / "features.npz")


def test_features_that_are_one_array(tmp_path):
    with open(tmp_path / "features.npz", "wb") as stream:
        np.save(stream, np.ones(3))
    with pytest.raises(ValueError, match=r"features\.npz: expected frozen, adapted and labels"):
        read_features(tmp_path / "features.npz")


# -- tables ----------------------------------------------------------------------------------------


def test_table_1_has_exactly_the_right_numbers(tmp_path):
    accuracies = vtab_study(tmp_path)
    table = vtab_table(VIT_B, settings_of(tmp_path))
    rows = {row["row"]: row for row in csv_rows(table) if row["source"] == "this study"}
    for name, values in accuracies.items():
        row = rows[f"{VTAB[name].title} ({VTAB[name].group})"]
        assert float(row["value"]) == pytest.approx(fmean(values.values()), abs=1e-9)
        assert float(row["standard deviation"]) == pytest.approx(stdev(values.values()), abs=1e-9)
        assert (row["seeds"], row["unit"], row["note"]) == ("2", "%", "")
    by_seed = []
    for seed in (0, 1):
        means = [sum(accuracies[n][seed] for n in VTAB if VTAB[n].group == g) / c for g, c in zip(GROUPS, (7, 4, 8))]
        by_seed.append(sum(means) / 3)
    row = rows["Average of the groups' means"]
    assert float(row["value"]) == pytest.approx(sum(by_seed) / 2, abs=1e-9)
    assert float(row["standard deviation"]) == pytest.approx(stdev(by_seed), abs=1e-9)
    assert (row["seeds"], row["note"]) == ("2", "")
    assert markdown_cell(table, "**Average** of the groups' means", "GLoRA 0.86M") == (
        f"{sum(by_seed) / 2:.1f} ± {stdev(by_seed):.1f} (2 seeds)"
    )
    plain = fmean(fmean(values.values()) for values in accuracies.values())
    assert abs(plain - sum(by_seed) / 2) > 0.1  # the mean of the 19 is another number
    sizes = [run.parameters for run in load_runs(tmp_path)]
    assert float(rows["Parameters, mean over the data sets"]["value"]) == pytest.approx(fmean(sizes))


def test_what_was_not_run_is_said_and_no_average_given(tmp_path):
    accuracies = vtab_study(tmp_path, [name for name in VTAB if name != "kitti"], seeds=(0,))
    (tmp_path / "dtd-seed0" / "test.json").unlink()
    table = vtab_table(VIT_B, settings_of(tmp_path))
    ours = "GLoRA 0.86M"
    assert markdown_cell(table, "KITTI-Dist (Structured)", ours) == "not run"
    assert markdown_cell(table, "DTD (Natural)", ours) == "not tested"
    tested = {name: values[0] for name, values in accuracies.items() if name != "dtd"}
    assert markdown_cell(table, "*Natural*, mean of 7", ours) == (
        f"{fmean(tested[name] for name in group_of('Natural') if name != 'dtd'):.1f} (1 seed), 6 of 7 run"
    )
    plain = fmean(tested.values())
    assert markdown_cell(table, "**Average** of the groups' means", ours) == f"{plain:.1f} (1 seed), 17 of 19 run"
    assert markdown_cell(table, "Parameters, mean over the data sets", ours).endswith("M, 18 of 19 searched")
    notes = " ".join(table.notes)
    assert "`test.json` of 17 of 18 runs" in notes
    assert "given only where all 19 data sets are" in notes


def test_seeds_that_differ_give_no_deviation(tmp_path):
    accuracies = vtab_study(tmp_path, seeds=(0,))
    write_run(tmp_path / "cifar-seed5", "cifar", 5, accuracy=0.9)
    table = vtab_table(VIT_B, settings_of(tmp_path))
    [row] = [r for r in csv_rows(table) if r["source"] == "this study" and r["row"].startswith("Average")]
    means = {name: values[0] for name, values in accuracies.items()} | {"cifar": (accuracies["cifar"][0] + 90) / 2}
    assert float(row["value"]) == pytest.approx(average(means))
    assert (row["standard deviation"], row["seeds"], row["note"]) == ("", "", "seeds differ")


def test_the_split_and_the_days_it_was_read_are_said(tmp_path):
    write_run(tmp_path / "a", "cifar", date="2025-03-05T10:00:00+00:00")
    write_run(tmp_path / "b", "dtd", date="2025-03-01T10:00:00+00:00")
    text = vtab_table(VIT_B, settings_of(tmp_path)).to_markdown()
    assert "accuracy on the test split, which was read between 2025-03-01T10:00:00+00:00 and 2025-03-05T10" in text


def test_settings_are_columns_and_backbones_are_tables(tmp_path):
    write_run(tmp_path / "a", "cifar", size="0.86M", accuracy=0.8)
    write_run(tmp_path / "b", "cifar", size="0.29M", accuracy=0.7)
    write_run(tmp_path / "c", "cifar", size="0.86M", accuracy=0.9, backbone=SWIN_B)
    for file in tmp_path.glob("*/*"):
        if file.name in ("log.csv", "search.json", "features.npz"):
            file.unlink()  # their figures are not looked at here
    report = write_report(tmp_path, progress=False)
    tables = {
        file.name: file.read_text() for file in report.files if file.name.startswith("table") and file.suffix == ".md"
    }
    assert set(tables) == {f"table-vtab1k-{VIT_B}.md", f"table-vtab1k-{SWIN_B}.md"}
    vit, swin = tables[f"table-vtab1k-{VIT_B}.md"], tables[f"table-vtab1k-{SWIN_B}.md"]
    assert vit.startswith("### Table 1: VTAB-1K")
    assert "| Data set | GLoRA 0.29M | GLoRA 0.86M | *LoRA (published)* |" in vit
    assert "| CIFAR-100 (Natural) | 70.0 (1 seed) | 80.0 (1 seed) | - |" in vit
    assert swin.startswith("### Table 5: VTAB-1K")
    assert "| *Natural*, mean of 7 | 90.0 (1 seed), 1 of 7 run | - | - | - | 83.7 |" in swin


@pytest.mark.parametrize(
    ("one", "other", "first", "second"),
    [
        ({}, {"changes": ["training.lr=5e-4"]}, "lr 0.0001", "lr 0.0005"),
        ({}, {"changes": ["training.lr_of.dtd=5e-4"]}, "lr_of none", "lr_of dtd 0.0005"),
        (
            {"changes": ["model.drop_path=0"]},
            {"changes": ["images.size=96"]},
            "model.drop_path 0, images.size 224",
            "model.drop_path 0.1, images.size 96",
        ),
        ({}, {"weights": None}, "weights hub", "weights none"),
        ({"limit": 4000}, {"limit": 9000}, "limit 4,000", "limit 9,000"),
        ({}, {"settings": replace(SMALL, objective="front")}, "objective score", "objective front"),
    ],
)
def test_runs_made_differently_are_columns_of_their_own(one, other, first, second, tmp_path):
    write_run(tmp_path / "s0", "cifar", 0, accuracy=0.7, **one)
    write_run(tmp_path / "s1", "cifar", 1, accuracy=0.9, **other)
    table = vtab_table(VIT_B, settings_of(tmp_path))
    assert markdown_cell(table, "CIFAR-100 (Natural)", f"GLoRA 0.86M, {first}") == "70.0 (1 seed)"
    assert markdown_cell(table, "CIFAR-100 (Natural)", f"GLoRA 0.86M, {second}") == "90.0 (1 seed)"


def test_halving_makes_columns_of_those_that_were_searched(tmp_path):
    for seed in range(3):
        write_run(tmp_path / f"s{seed}", "cifar", seed)
    settings = json.loads((tmp_path / "s1" / "search.json").read_text())["settings"]
    change(tmp_path / "s1" / "search.json", settings={**settings, "halving": [0.25, 0.5, 1]})
    for name in STAGES[2:]:
        (tmp_path / "s2" / name).unlink()
    methods = {run.name: run.setting.method for run in load_runs(tmp_path)}
    assert methods == {"s0": "GLoRA 0.86M, halving none", "s1": "GLoRA 0.86M, halving 0.25/0.5/1", "s2": "GLoRA 0.86M"}


def test_the_metric_of_a_search_counts_and_a_preset_has_none(tmp_path):
    for preset in (None, "lora"):
        for seed in (0, 1):
            run = write_run(tmp_path / f"{preset}-{seed}", "cifar", seed, preset=preset, changes=["metric=loss"][:seed])
            if preset is None and seed:
                change(run / "search.json", metric="loss")
    methods = {setting.method for setting in settings_of(tmp_path)}
    assert methods == {"GLoRA 0.86M, metric accuracy", "GLoRA 0.86M, metric loss", "preset lora, rank 4"}


def test_what_changes_no_result_makes_no_column(tmp_path):
    changes = ["seeds=[0,1]", "training.workers=0", "training.checkpoint_epochs=1", "training.warmup_epochs=10.0"]
    write_run(tmp_path / "s0", "cifar", 0, accuracy=0.7)
    other = write_run(tmp_path / "s1", "cifar", 1, accuracy=0.9, changes=[*changes, "search.seed=7"])
    change(other / "run.json", data="/elsewhere", versions={"glora": "0.1"})
    table = vtab_table(VIT_B, settings_of(tmp_path))
    assert markdown_cell(table, "CIFAR-100 (Natural)", "GLoRA 0.86M") == "80.0 ± 14.1 (2 seeds)"


def test_the_figures_have_room_for_what_differs(tmp_path):
    changes = [f"training.{each}" for each in ("epochs=6", "lr=5e-4", "batch_size=32", "warmup_epochs=1", "min_lr=0")]
    for seed in (0, 1):
        write_run(tmp_path / f"s{seed}", "cifar", seed, changes=changes if seed else (), features=0)
    write_report(tmp_path, progress=False)  # a layout that does not fit is a warning, which is an error here
    figure = vtab_figure(VIT_B, settings_of(tmp_path))
    figure.draw_without_rendering()
    bars, averages = figure.axes
    boxes = [label.get_window_extent() for label in averages.get_yticklabels()]
    assert len(boxes) == 10
    assert all(upper.y0 > lower.y1 for upper, lower in pairwise(boxes))
    assert min(box.x0 for box in boxes) > bars.get_window_extent().x1
    assert averages.get_position().width > 0.14  # of the figure: labels of one line leave less


@pytest.mark.parametrize(
    ("protocol", "shots", "dataset", "table"),
    [
        ("vtab1k", None, "cifar", vtab_table),
        ("fewshot", 4, "food-101", few_shot_table),
        ("imagenet", 16, "imagenet", lambda backbone, settings: imagenet_table(backbone, 16, settings)),
    ],
)
def test_random_weights_are_said_below_the_table(protocol, shots, dataset, table, tmp_path):
    options = {"protocol": protocol, "shots": shots}
    write_run(tmp_path / "hub", dataset, **options)
    assert "Weights: none" not in table(VIT_B, settings_of(tmp_path)).to_markdown()
    write_run(tmp_path / "none", dataset, weights=None, **options)
    note = "- Weights: none, the backbone was randomly initialised (GLoRA 0.86M, weights none)."
    assert note in table(VIT_B, settings_of(tmp_path)).to_markdown()


def test_table_2(tmp_path):
    options = {"protocol": "imagenet", "shots": 16, "size": "0.29M"}
    for seed, r in ((0, 0.30), (1, 0.34)):
        targets = {"V2": 0.6, "Sketch": 0.3, "R": r}
        write_run(tmp_path / f"s{seed}", "imagenet", seed, accuracy=0.7 + 0.02 * seed, targets=targets, **options)
    settings = settings_of(tmp_path)
    table = imagenet_table(VIT_B, 16, settings)
    column = {row: markdown_cell(table, row, "GLoRA 0.29M") for row in table.rows}
    assert column["ImageNet (source)"] == "71.0 ± 1.4 (2 seeds)"
    assert column["ImageNet-V2"] == "60.0 ± 0.0 (2 seeds)"
    assert column["ImageNet-A"] == "not tested"
    assert column["ImageNet-R"] == "32.0 ± 2.8 (2 seeds)"
    theirs = {row: markdown_cell(table, row, "*GLoRA 0.29M (published)*") for row in table.rows}
    assert theirs == {
        "ImageNet (source)": "78.3",
        "ImageNet-V2": "67.5",
        "ImageNet-Sketch": "30.6",
        "ImageNet-A": "13.3",
        "ImageNet-R": "-",
        "Parameters": "0.290M",
    }
    assert imagenet_table(VIT_B, 8, settings).entries == []  # the paper's 16 shots compare with no other number


def few_shot_study(folder, left_out=None):
    for index, name in enumerate(FEW_SHOT):
        for shots in (1, 4):
            if (name, shots) != left_out:
                accuracy = 0.3 + 0.1 * index + 0.02 * shots
                write_run(folder / f"{name}-{shots}", name, shots=shots, protocol="fewshot", accuracy=accuracy)
    return settings_of(folder)


def test_few_shot_table(tmp_path):
    table = few_shot_table(VIT_B, few_shot_study(tmp_path, left_out=("food-101", 4)))
    ours = "GLoRA 0.86M"
    assert markdown_cell(table, "StanfordCars, 4", ours) == "48.0 (1 seed)"
    assert markdown_cell(table, "StanfordCars, 2", ours) == "not run"
    assert markdown_cell(table, "**Average**, 1", ours) == "52.0 (1 seed)"
    assert markdown_cell(table, "**Average**, 4", ours) == "63.0 (1 seed), 4 of 5 run"
    assert markdown_cell(table, "StanfordCars, 16", "*GLoRA (published)*") == "74.3"
    assert markdown_cell(table, "**Average**, 16", "*GLoRA (published)*") == "79.1"


# -- published numbers -----------------------------------------------------------------------------


def test_published_numbers_are_apart_from_ours(tmp_path):
    vtab_study(tmp_path, seeds=(0,))
    known = published("vtab1k", VIT_B)
    rows = csv_rows(vtab_table(VIT_B, settings_of(tmp_path)))
    ours = [row for row in rows if row["source"] == "this study"]
    theirs = [row for row in rows if row["source"] != "this study"]
    assert {row["method"] for row in ours} == {"GLoRA 0.86M"}
    assert {row["source"] for row in theirs} == {"arXiv 2306.07967v1, Table 1"}
    assert all(row["seeds"] == "" for row in theirs)
    published_averages = {row["method"]: float(row["value"]) for row in theirs if row["row"].startswith("Average")}
    assert published_averages == {each.method: each.accuracy["average"] for each in known}
    [mine] = [float(row["value"]) for row in ours if row["row"].startswith("Average")]
    assert mine not in published_averages.values()  # "GLoRA 0.86M" is a method of both


def test_published_numbers_have_a_source_and_belong_to_a_backbone():
    assert {each.method: each.accuracy["average"] for each in published("vtab1k", "vit_base_patch16_224")} == {
        "LoRA": 74.5,
        "NOAH": 75.5,
        "FacT": 75.6,
        "SSF": 75.7,
        "RepAdapter": 76.1,
        "GLoRA 0.29M": 77.3,
        "GLoRA 0.44M": 77.6,
        "GLoRA 0.86M": 78.0,
    }
    assert published("vtab1k", VIT_B) == published("vtab1k", "vit_base_patch16_224")
    assert published("vtab1k", "vit_tiny_patch16_224") == []
    for protocol in ("vtab1k", "imagenet", "fewshot"):
        for each in [*published(protocol, VIT_B), *published(protocol, SWIN_B)]:
            assert "2306.07967v1, Table" in each.source or "/issues/" in each.source
    for each in published("fewshot", VIT_B):
        assert {name: tuple(values) for name, values in each.accuracy.items()} == dict.fromkeys(
            FEW_SHOT, tuple(map(str, FewShot.shots))
        )
    swin = published("vtab1k", SWIN_B)[-1].accuracy
    assert fmean(swin[group] for group in GROUPS) == pytest.approx(swin["average"], abs=0.05)


# -- what the figures show -------------------------------------------------------------------------


def test_layer_types():
    names = [
        "layers.0.blocks.1.attn.qkv",
        "layers.1.blocks.0.attn.qkv",
        "layers.1.blocks.0.mlp.fc1",
        "layers.1.downsample.reduction",
    ]
    assert list(layer_types(names).values()) == ["qkv", "qkv", "fc1", "reduction"]
    bert = [
        "layer.0.attention.output.dense",
        "layer.0.output.dense",
        "layer.1.output.dense",
        "layer.0.intermediate.dense",
    ]
    assert list(layer_types(bert).values()) == [
        "attention.output.dense",
        "layer.output.dense",
        "layer.output.dense",
        "intermediate.dense",
    ]
    assert layer_types(["0", "fc", "a.fc"]) == {"0": "", "fc": "fc", "a.fc": "a.fc"}


def test_shares_of_a_path(tmp_path):
    layers = {"blocks.0.fc1": LayerShape(8, 4), "blocks.0.fc2": LayerShape(4, 8)}
    run = write_run(tmp_path / "run", layers=layers)
    paths = {"blocks.0.fc1": PathConfig(B="lora_2"), "blocks.0.fc2": PathConfig(A="vector", E="vector")}
    change(run / "merge.json", paths={name: path.to_dict() for name, path in paths.items()}, parameters=2 * 12 + 4 + 4)
    [loaded] = load_runs(run)
    assert shares_by_type(loaded) == {"fc1": 24 / 32, "fc2": 8 / 32}
    assert shares_by_tensor(loaded) == {"A": 4 / 32, "B": 24 / 32, "C": 0, "D": 0, "E": 4 / 32}
    axes = path_figure(loaded).axes[0]
    assert axes.images[0].get_array().tolist() == [[0, 3, 0, 0, 0], [2, 0, 0, 0, 2]]
    assert [text.get_text() for text in axes.texts] == ["2"]
    left, _ = distribution_figure(loaded.setting, {loaded.task: [loaded]}).axes
    assert [bar.get_width() for bar in left.patches] == [75.0, 25.0]


def test_search_progress(tmp_path):
    run = write_run(tmp_path / "run", limit=3000)
    scores = [(0, 900, 0.5), (0, 800, 0.25), (0, 700, 0.75), (1, 600, 0.5), (1, 500, 0.125), (1, 400, None)]
    parts = [[0, 300, 0.9, 0.25], [1, 250, 0.95, 0.5]]  # of halving: good scores, of few samples
    history = [*([*each, 1.0, "appended later"] for each in scores), *parts]
    change(run / "search.json", history=history, evaluations=8)
    [loaded] = load_runs(run)
    figure = search_figure(loaded)
    progress, trade = figure.axes
    lines = {line.get_label(): line.get_xydata().tolist() for line in [*progress.lines, *trade.lines]}
    assert lines["median"] == [[0, 50], [1, 31.25]]
    assert lines["best so far"] == [[0, 75], [1, 75]]
    assert lines["front: none is smaller and as good"] == [[500, 12.5], [600, 50], [700, 75]]
    assert lines["limit: 3,000"] == [[3000, 0], [3000, 1]]
    assert progress.get_ylabel() == "validation accuracy, %"
    title = " ".join(figure.get_suptitle().split())
    assert "1 without a finite score left out" in title
    assert "2 of them scored on a part of the validation split only" in title
    assert loaded.search.evaluations == 8
    change(run / "search.json", history=[[*each[:2], None, 1.0] for each in scores])
    best = json.loads((run / "search.json").read_text())["best"]
    change(run / "search.json", best={**best, "score": None})
    assert search_figure(load_runs(run)[0]) is None
    assert write_report(run, progress=False).text


def test_search_by_loss(tmp_path):
    run = write_run(tmp_path / "run")
    change(run / "search.json", metric="loss")
    [loaded] = load_runs(run)
    scores = [(0, 900, -0.5), (0, 700, -0.75), (1, 600, -0.25), (1, 500, -1.0)]
    best = json.loads((run / "search.json").read_text())["best"]
    change(run / "search.json", history=[[*each, 1.0] for each in scores], best={**best, "score": -0.25})
    [loaded] = load_runs(run)
    progress, trade = search_figure(loaded).axes
    lines = {line.get_label(): line.get_xydata().tolist() for line in [*progress.lines, *trade.lines]}
    assert progress.get_ylabel() == "validation loss"
    assert lines["best so far"] == [[0, 0.5], [1, 0.25]]
    assert lines["front: none is smaller and as good"] == [[500, 1.0], [600, 0.25]]
    assert lines["chosen"][0][1] == 0.25
    assert f"loss {-loaded.search.best.score:.4f}" in write_report(run, progress=False).text


def test_a_search_of_an_earlier_version_is_read(tmp_path):
    """It said which share of children of Sequentials had not been run."""
    run = write_run(tmp_path / "run")
    search = load_runs(run)[0].search
    change(run / "search.json", reused=0.25)
    assert load_runs(run)[0].search == search


def test_hours_are_those_of_all_resumes(tmp_path):
    run = write_run(tmp_path / "run")
    change(run / "search.json", seconds=1800.0, hours=2.5)
    assert load_runs(run)[0].search.hours == 2.5


def test_running_mean():
    assert running_mean([1.0, 2.0, 6.0, 4.0], 2) == [1.5, 4.0, 5.0]


def test_classes_and_images_are_chosen_deterministically():
    labels = np.array([3, 1, 1, 0, 2, 2, 3, 5])
    assert choose_classes(labels, 3) == [1, 2, 3]
    assert choose_classes(labels, 4) == [0, 1, 2, 3]
    assert choose_images(labels, [1, 3], 1).tolist() == [0, 1]


def test_features_of_many_classes_and_of_few_images(tmp_path):
    run = write_run(tmp_path / "many", features=60, classes=12)
    [loaded] = load_runs(run)
    figure = features_figure(loaded)
    assert [axes.get_title() for axes in figure.axes] == ["frozen backbone", "adapted"]
    assert [len(axes.collections) for axes in figure.axes] == [10, 10]
    assert "(those with most of 12)" in " ".join(figure.get_suptitle().split())
    few = features_figure(load_runs(write_run(tmp_path / "few", features=5))[0])
    assert few == NotDrawn("t-SNE needs 8 test images, there are 5")
    none = features_figure(load_runs(write_run(tmp_path / "none", features=0))[0])
    assert none == NotDrawn("t-SNE needs 8 test images, there are 0")


def with_features(folder, **changed):
    """A run of 30 images; ``changed`` makes other features of its own."""
    run = write_run(folder)
    with np.load(run / "features.npz") as arrays:
        found = dict(arrays)
    np.savez(run / "features.npz", **{**found, **{name: make(found[name]) for name, make in changed.items()}})
    return run


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"adapted": lambda x: np.full_like(x, 0.1)}, "Features of the adapted model are all equal"),
        ({"frozen": lambda x: np.full(x.shape, 0.1)}, "Features of the frozen backbone model are all equal"),
        ({"adapted": lambda x: x[:, :1]}, "Features of the adapted model have 1 of at least 2 dimensions"),
        ({"adapted": lambda x: x[:, :0]}, "Features of the adapted model have 0 of at least 2 dimensions"),
        ({"adapted": lambda x: np.where(x > 1, np.inf, x)}, "Features of the adapted model are not all finite"),
    ],
)
def test_features_that_cannot_be_placed_are_said_to_be(changed, reason, tmp_path):
    run = with_features(tmp_path / "run", **changed)
    report = write_report(run, progress=False)
    assert not [file for file in report.files if "features" in file.name]
    assert f"(the paper's Figure 5): not drawn. {reason}" in report.files[0].read_text()


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_features_of_any_scale_are_placed(scale, tmp_path):
    run = with_features(tmp_path / "run", adapted=lambda x: x * np.float32(scale), frozen=nearly_equal)
    assert [len(axes.collections) for axes in features_figure(load_runs(run)[0]).axes] == [3, 3]


def nearly_equal(x):
    return 1000 + np.eye(*x.shape, dtype=x.dtype) * 1e-3


def test_vtab_figure_gives_our_average_only_of_all_data_sets(tmp_path):
    accuracies = vtab_study(tmp_path)
    bars, averages = vtab_figure(VIT_B, settings_of(tmp_path)).axes
    heights = [bar.get_height() for bar in bars.containers[-1]]
    assert heights == pytest.approx([fmean(values.values()) for values in accuracies.values()])
    assert len(averages.containers) == 1
    (tmp_path / "dtd-seed0" / "test.json").unlink()
    (tmp_path / "dtd-seed1" / "test.json").unlink()
    bars, averages = vtab_figure(VIT_B, settings_of(tmp_path)).axes
    assert "DTD" not in [label.get_text() for label in bars.get_xticklabels()]
    assert len(bars.get_xticklabels()) == 18
    assert len(averages.containers) == 0
    assert "GLoRA 0.86M\n(18 of 19 run)" in [label.get_text() for label in averages.get_yticklabels()]


def test_vtab_figure_has_no_empty_panel(tmp_path):
    vtab_study(tmp_path, names=("dtd", "kitti"), backbone="vit_tiny_patch16_224")
    [bars] = vtab_figure("vit_tiny_patch16_224", settings_of(tmp_path)).axes
    assert [label.get_text() for label in bars.get_xticklabels()] == ["DTD", "KITTI-Dist"]
    assert [text.get_text() for text in bars.texts] == ["Natural", "Structured"]


def test_few_shot_figure(tmp_path):
    figure = few_shot_figure(VIT_B, few_shot_study(tmp_path, left_out=("food-101", 4)))
    panels = {axes.get_title(): axes for axes in figure.axes}
    assert list(panels) == ["Average", *(about.title for about in FEW_SHOT.values())]
    drawn = {title: axes.containers[0].lines[0].get_xydata().tolist() for title, axes in panels.items()}
    assert drawn["Average"] == [[1, pytest.approx(52)]]  # of 4 shots, one data set was not run
    assert drawn["StanfordCars"] == [[1, pytest.approx(42)], [4, pytest.approx(48)]]
    labels = {line.get_label(): line for line in panels["Food101"].lines if "published" in str(line.get_label())}
    assert set(labels) == {"LoRA (published)", "NOAH (published)", "GLoRA (published)"}
    assert all(line.get_linestyle() == "--" for line in labels.values())
    assert labels["GLoRA (published)"].get_ydata().tolist() == [36.0, 54.8, 65.1, 71.3, 75.9]
