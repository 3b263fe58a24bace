"""A folder of one's own images: found, split, written down, and trained on to a report."""

import json
import shutil
from collections import Counter

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file

import glora
from glora.cli import main
from glora.protocols import OWN_IMAGES, ImageSettings, own_protocol, split_images
from glora.protocols.own import own_data_from_dict, read_own_data
from glora.runs import RunFolder, find_runs, load_own_recipe, plan_own_runs
from glora.runs.models import make_model
from glora.runs.spec import spec_from_dict
from tests.glora.runs.own_data import CLASSES, IMAGE_RECIPE, write_images, write_recipe

MODEL = "vit_tiny_patch16_224"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("data") / "animals")


@pytest.fixture
def own(folder, tmp_path):
    """A copy of the folder, to be changed."""
    return shutil.copytree(folder, tmp_path / "animals")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return write_recipe(tmp_path_factory.mktemp("recipe"), IMAGE_RECIPE)


def command(folder, recipe, out, *more):
    given = ["--images", folder, "--model", MODEL, "--recipe", recipe, "--weights", "none", "--out", out]
    return ["train", *map(str, given), *map(str, more), "--json"]


@pytest.fixture(scope="module")
def trained(folder, recipe, tmp_path_factory):
    study = tmp_path_factory.mktemp("studies") / "study"
    assert main(command(folder, recipe, study)) == 0
    return study


@pytest.fixture(scope="module")
def finished(trained, tmp_path_factory):
    study = shutil.copytree(trained, tmp_path_factory.mktemp("finished") / "study")
    for arguments in (["search"], ["merge", "--test"], ["report"]):
        assert main([arguments[0], str(study), *arguments[1:], "--json"]) == 0
    return study


def lists(study):
    split = study / "split"
    return {file.stem: [line.rpartition(" ") for line in file.read_text().splitlines()] for file in split.glob("*.txt")}


# -- the split -------------------------------------------------------------------------------------


def test_every_class_has_its_share_of_every_part(folder):
    split = split_images(folder)
    assert split.data.classes == CLASSES and split.data.name == "animals"
    counts = {part: Counter(label for _, label in entries) for part, entries in split.lists.items()}
    assert counts == {
        "train": {0: 8, 1: 8, 2: 8},  # 12 in all: 70, 15 and 15 per cent
        "validation": {0: 2, 1: 2, 2: 2},
        "test": {0: 2, 1: 2, 2: 2},
    }
    every = [entry for entries in split.lists.values() for entry in entries]
    assert sorted(every) == sorted(
        (f"{name}/{n:03d}.png", label) for label, name in enumerate(CLASSES) for n in range(12)
    )


def test_the_seed_decides(folder):
    assert split_images(folder) == split_images(folder)
    assert split_images(folder, seed=1).lists != split_images(folder).lists


@pytest.mark.parametrize(("each", "sizes"), [(3, (1, 1, 1)), (4, (2, 1, 1)), (7, (5, 1, 1))])
def test_small_classes_are_in_every_part(tmp_path, each, sizes):
    found = split_images(write_images(tmp_path / "few", each)).lists
    assert tuple(len(found[part]) for part in ("train", "validation", "test")) == tuple(3 * size for size in sizes)


def test_other_shares(folder):
    found = split_images(folder, (50, 50, 0))
    assert {part: len(entries) for part, entries in found.lists.items()} == {"train": 18, "validation": 18}
    even = split_images(folder, (2, 49, 49)).lists
    assert min(Counter(label for _, label in even["train"]).values()) == 1


@pytest.mark.parametrize("validation", ["val", "validation"])
def test_given_parts_are_taken_as_they_are(tmp_path, validation):
    for part in ("train", validation, "test"):
        write_images(tmp_path / "own" / part, 1 if part == "test" else 2)
    split = split_images(tmp_path / "own")
    assert split.data.shares == {} and split.data.classes == CLASSES
    assert split.sizes == {"train": 6, "validation": 6, "test": 3}
    assert ("val" + validation[3:] + "/cat/001.png", 1) in split.lists["validation"]


def test_a_missing_validation_part_is_split_off_the_training_part(tmp_path):
    write_images(tmp_path / "own" / "train", 12)
    write_images(tmp_path / "own" / "test", 2)
    split = split_images(tmp_path / "own")
    assert split.sizes == {"train": 30, "validation": 6, "test": 6}
    assert all(path.startswith("test/") for path, _ in split.lists["test"])


def test_shares_of_what_is_split_already_are_refused(tmp_path, recipe, capsys):
    for part in ("train", "val"):
        write_images(tmp_path / "own" / part, 2)
    assert main(command(tmp_path / "own", recipe, tmp_path / "study", "--split", 70, 20, 10)) == 2
    assert "--split: expected none for" in capsys.readouterr().err


def test_train_beside_folders_of_classes_is_refused(own):
    (own / "train" / "steam").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"train/ in .* holds folders, and beside it are 'bird', 'cat', 'small dog'"):
        split_images(own)


def test_a_class_called_train_is_a_class(tmp_path):
    assert split_images(write_images(tmp_path / "own", 3, ("plane", "ship", "train"))).data.classes[2] == "train"


def test_other_files_and_hidden_folders_are_passed_over(own):
    (own / ".cache").mkdir()
    (own / "cat" / "notes.txt").write_text("not an image")
    (own / "readme.md").write_text("not a class")
    assert split_images(own).sizes == {"train": 24, "validation": 6, "test": 6}


def remove(*names):
    return lambda folder: [shutil.rmtree(folder / name) for name in names]


def keep_two(folder):
    for file in sorted((folder / "cat").iterdir())[2:]:
        file.unlink()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (remove(*CLASSES), r"images: expected one folder for each class.*at least two classes, got 0"),
        (remove(*CLASSES[1:]), r"at least two classes, got 1"),
        (keep_two, r"classes: expected at least 3 images of each, for train, validation, test; 'cat' has 2"),
        (lambda folder: (folder / "empty").mkdir(), r"'empty' has 0"),
        (shutil.rmtree, r"images: expected a folder with one folder for each class"),
        (lambda folder: (folder / "cat").rename(folder / " cat"), r"without spaces at the ends"),
    ],
    ids=["none", "one", "few", "empty", "no-folder", "space"],
)
def test_what_cannot_be_split_is_refused(own, change, message):
    change(own)
    with pytest.raises(ValueError, match=message):
        split_images(own)


@pytest.mark.parametrize("shares", [(70, 15), (70, 15, 16), (100, 0, 0), (0, 50, 50), (120, -10, -10)])
def test_shares_that_are_no_split_are_refused(folder, shares):
    with pytest.raises(ValueError, match=r"split: expected per cent"):
        split_images(folder, shares)


def test_a_class_without_training_images_is_refused(tmp_path):
    write_images(tmp_path / "own" / "train", 2)
    write_images(tmp_path / "own" / "val", 1, (*CLASSES, "wolf"))
    with pytest.raises(ValueError, match=r"expected folders of the classes of train/ in .*val, got 'wolf' too"):
        split_images(tmp_path / "own")
    shutil.rmtree(tmp_path / "own" / "val" / "wolf")
    shutil.rmtree(tmp_path / "own" / "train" / "cat")
    (tmp_path / "own" / "train" / "cat").mkdir()
    with pytest.raises(ValueError, match=r"classes: expected images of each in .*train, found none of 'cat'"):
        split_images(tmp_path / "own")


def test_it_is_written_once_and_read_back(folder, tmp_path):
    split = split_images(folder)
    split.write(tmp_path / "split")
    assert read_own_data(tmp_path / "split") == split.data == own_data_from_dict(split.data.to_dict())
    opened = own_protocol(split.data).open(tmp_path / "split", "animals", images=ImageSettings(size=8))
    assert (opened.train.entries, opened.validation.entries) == (split.lists["train"], split.lists["validation"])
    assert opened.test().entries == split.lists["test"]
    assert opened.train[0][0].shape == (3, 8, 8)
    before = {file: file.read_bytes() for file in (tmp_path / "split").iterdir()}
    split.write(tmp_path / "split")
    assert {file: file.read_bytes() for file in (tmp_path / "split").iterdir()} == before


# -- the recipe ------------------------------------------------------------------------------------


def test_images_are_prepared_as_timm_says():
    images = load_own_recipe(OWN_IMAGES, "vit_small_patch16_224").images
    assert (images.size, images.mean, images.std) == (224, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    tagged = load_own_recipe(OWN_IMAGES, "deit_small_patch16_224").images
    assert tagged.mean == (0.485, 0.456, 0.406)
    changed = load_own_recipe(OWN_IMAGES, "vit_small_patch16_224", changes=["images.mean=[0.1, 0.2, 0.3]"]).images
    assert (changed.mean, changed.std) == ((0.1, 0.2, 0.3), (0.5, 0.5, 0.5))


def test_the_defaults():
    recipe = load_own_recipe(OWN_IMAGES, "vit_small_patch16_224")
    assert recipe.size(None) == "small" and recipe.sizes["small"].ranks == (8, 4)
    assert recipe.search == glora.SearchSettings.quick() and recipe.metric == "loss"
    assert recipe.training.validate and recipe.model.bias_free


def test_a_file_changes_entries_and_a_change_goes_before_it(recipe, tmp_path):
    found = load_own_recipe(OWN_IMAGES, MODEL, recipe, ["training.epochs=7"])
    assert (found.training.epochs, found.training.batch_size, found.training.clip_norm) == (7, 8, 1.0)
    assert found.images.size == 32  # that of the model's options
    sized = tmp_path / "sized.toml"
    sized.write_text('[model]\nname = "vit_tiny_patch16_224"\n[sizes.mini]\nranks = [2]\nlimit = 900\n')
    sizes = load_own_recipe(OWN_IMAGES, None, sized).sizes
    assert {name: (size.ranks, size.limit) for name, size in sizes.items()} == {"mini": ((2,), 900)}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((None, None, []), r"model: expected the name of a model"),
        (("no_such_model", None, []), r"name: expected a model of timm"),
        ((MODEL, "vtab1k", []), r"recipe: expected a TOML file beside --images"),
        ((MODEL, None, ['protocol="vtab1k"']), r"protocol: expected 'own_images'"),
        ((MODEL, None, ["sizes.small.limit=median"]), r"limit: expected a number of parameters or 'mean'"),
        ((MODEL, None, ["texts.max_length=3"]), r"own_images: expected the table 'images'"),
        ((MODEL, None, ["training.validate=1"]), r"validate: expected true or false"),
        ((MODEL, None, ["training.lr_of.cifar=1e-3"]), r"training.lr_of: expected data sets out of \[\]"),
    ],
)
def test_recipes_that_are_none_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        load_own_recipe(OWN_IMAGES, *given)


# -- the runs --------------------------------------------------------------------------------------


def test_a_plan_goes_through_json(folder, recipe, tmp_path):
    own = split_images(folder)
    specs = plan_own_runs(load_own_recipe(OWN_IMAGES, MODEL, recipe), own.data, tmp_path, seeds=[0, 1], weights="none")
    assert [spec.name for spec in specs] == ["animals-seed0", "animals-seed1"]
    assert [spec_from_dict(json.loads(json.dumps(spec.to_dict()))) for spec in specs] == specs


def test_a_dry_run_writes_nothing(folder, recipe, tmp_path, capsys):
    assert main([*command(folder, recipe, tmp_path / "study"), "--dry-run"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert (plan["missing"], plan["split"]) == ([], {"train": 24, "validation": 6, "test": 6})
    assert not (tmp_path / "study").exists()
    assert main([*command(folder, recipe, tmp_path / "study")[:-1], "--dry-run"]) == 0
    assert "split: train 24, validation 6, test 6\n" in capsys.readouterr().out


def test_the_study_holds_its_split_and_validates_each_epoch(trained):
    found = lists(trained)
    assert {part: len(lines) for part, lines in found.items()} == {"train": 24, "validation": 6, "test": 6}
    assert json.loads((trained / "split" / "data.json").read_text())["classes"] == list(CLASSES)
    rows = np.genfromtxt(trained / "animals-seed0" / "log.csv", delimiter=",", names=True)
    assert rows["step"][np.isfinite(rows["validation_loss"])].tolist() == [3, 6, 9]
    told = json.loads((trained / "animals-seed0" / "train.json").read_text())
    assert told["validation"]["samples"] == 6
    assert told["validation"]["loss"] == pytest.approx(rows["validation_loss"][-1], rel=1e-4)


def test_the_supernet_is_validated_under_its_largest_path(trained):
    [run] = find_runs(trained)
    model = glora.load_adapter(make_model(run.spec), run / "supernet.safetensors")
    assert set(glora.get_paths(model).values()) == {glora.PathConfig("lora_8", "lora_8", "lora_8", "vector", "vector")}
    images = run.spec.recipe.images
    validation = run.spec.protocol.open(run.spec.data, "animals", images=images).validation
    told = json.loads((run / "train.json").read_text())["validation"]
    assert glora.evaluate(model, validation).loss == pytest.approx(told["loss"], rel=1e-4)


def test_the_limit_is_the_mean_of_random_paths(finished):
    [run] = find_runs(finished)
    layers = json.loads((run / "run.json").read_text())["layers"]
    shapes = {name: glora.LayerShape(*shape) for name, *shape in layers}
    generator, space = torch.Generator().manual_seed(0), run.spec.space
    drawn = [sum(space.sample(generator, shape.bias).count(shape) for shape in shapes.values()) for _ in range(2000)]
    searched = json.loads((run / "search.json").read_text())
    assert searched["limit"] == pytest.approx(np.mean(drawn), rel=0.02)
    assert searched["best"]["parameters"] <= searched["limit"]


def test_the_merged_file_is_a_plain_model_with_the_tested_accuracy(finished, folder):
    """Nothing but timm, torch and the written list: what a user of the files does."""
    images = load_own_recipe(OWN_IMAGES, MODEL).images
    options = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    model = timm.create_model(MODEL, num_classes=3, **options).eval()
    model.load_state_dict(load_file(finished / "animals-seed0" / "merged.safetensors"))
    right = []
    for path, _, label in lists(finished)["test"]:
        pixels = torch.tensor(np.asarray(Image.open(folder / path)) / 255, dtype=torch.float32)
        x = (pixels - torch.tensor(images.mean)) / torch.tensor(images.std)
        with torch.no_grad():
            right.append(int(model(x.permute(2, 0, 1)[None]).argmax()) == int(label))
    tested = json.loads((finished / "animals-seed0" / "test.json").read_text())
    assert (tested["samples"], tested["accuracy"]) == (6, pytest.approx(np.mean(right)))
    assert json.loads((finished / "animals-seed0" / "merge.json").read_text())["created_biases"] == []


def test_the_report(finished):
    page = (finished / "report" / "report.md").read_text()
    tested = json.loads((finished / "animals-seed0" / "test.json").read_text())["accuracy"]
    assert f"| animals | {100 * tested:.1f} (1 seed) |" in page
    assert "animals-seed0-training.png" in page and "t-SNE needs 8 test images" in page.replace("T-SNE", "t-SNE")


def test_called_again_it_changes_nothing(finished, folder, recipe, capsys):
    before = {file: file.read_bytes() for file in finished.rglob("*") if file.is_file()}
    assert main(command(folder, recipe, finished)) == 0
    assert {file: file.read_bytes() for file in finished.rglob("*") if file.is_file()} == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda own: (own / "cat" / "003.png").unlink(), "1 are gone: 'cat/003.png'"),
        (lambda own: shutil.copy(own / "cat" / "003.png", own / "cat" / "new.png"), "1 are new: 'cat/new.png'"),
        (lambda own: shutil.move(own / "cat" / "003.png", own / "bird" / "x.png"), "gone: 'cat/003.png'; 1 are new"),
        (lambda own: (own / "cat" / "003.png").write_bytes(b"other"), "the same files with other contents"),
        (lambda own: shutil.copytree(own / "cat", own / "wolf"), "classes"),
    ],
    ids=["gone", "new", "moved", "contents", "class"],
)
def test_changed_images_are_refused(trained, own, recipe, tmp_path, capsys, change, message):
    study = tmp_path / "study"
    split_images(own).write(study / "split")
    before = {file: file.read_bytes() for file in study.rglob("*") if file.is_file()}
    change(own)
    assert main(command(own, recipe, study)) == 2
    err = capsys.readouterr().err
    assert "holds the split of other data" in err and message in err and "another --out" in err
    assert {file: file.read_bytes() for file in study.rglob("*") if file.is_file()} == before


def test_a_changed_list_is_refused(trained, tmp_path, capsys):
    study = shutil.copytree(trained, tmp_path / "study")
    lines = (study / "split" / "validation.txt").read_text().splitlines()
    (study / "split" / "validation.txt").write_text("\n".join(lines[1:]))
    assert main(["search", str(study), "--json"]) == 2
    assert "expected the validation images that it was trained with" in capsys.readouterr().err


def test_training_and_searching_read_no_test_list(folder, recipe, tmp_path, capsys):
    study = tmp_path / "study"
    split_images(folder).write(study / "split")
    (study / "split" / "test.txt").unlink()
    assert main(command(folder, recipe, study, "--preset", "lora")) == 0
    assert main(["merge", str(study), "--json"]) == 0
    assert main(["merge", str(study), "--test", "--json"]) == 2
    assert "test.txt: not there" in capsys.readouterr().err


def test_a_preset(folder, recipe, tmp_path):
    assert (
        main(command(folder, recipe, tmp_path, "--preset", "lora", "--seeds", "3", "--set", "training.epochs=1")) == 0
    )
    run = RunFolder(tmp_path / "animals-seed3")
    assert (run.spec.preset, run.spec.limit, run.has("adapter.safetensors")) == ("lora", None, True)
