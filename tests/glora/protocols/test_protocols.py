"""VTAB-1K and few-shot: tables, opening, and what is read when."""

import shutil

import pytest
import torch

from glora.protocols import GROUPS, ImageSettings, average, group_averages, preload, protocol
from tests.glora.protocols.pictures import fewshot_data, vtab_data, write_list

VTAB, FEW_SHOT = protocol("vtab1k"), protocol("fewshot")
SMALL = ImageSettings(size=8)
FOLDERS = {
    "food-101": "images",
    "stanford_cars": ".",
    "oxford_flowers": "jpg",
    "fgvc_aircraft": "images",
    "oxford_pets": "images",
}


def names(images):
    return [path for path, _ in images.entries]


def test_protocols_are_found_by_name():
    assert [protocol(name).name for name in ("vtab1k", "fewshot", "imagenet")] == ["vtab1k", "fewshot", "imagenet"]
    with pytest.raises(ValueError, match=r"name: expected one of .*'imagenet'.*, got 'vtab'"):
        protocol("vtab")


def test_vtab_has_the_official_codes_folders_and_classes():
    assert {name: VTAB.classes(name) for name in VTAB.datasets} == {
        "cifar": 100,
        "caltech101": 102,
        "dtd": 47,
        "oxford_flowers102": 102,
        "oxford_iiit_pet": 37,
        "svhn": 10,
        "sun397": 397,
        "patch_camelyon": 2,
        "eurosat": 10,
        "resisc45": 45,
        "diabetic_retinopathy": 5,
        "clevr_count": 8,
        "clevr_dist": 6,
        "dmlab": 6,
        "kitti": 4,
        "dsprites_loc": 16,
        "dsprites_ori": 16,
        "smallnorb_azi": 18,
        "smallnorb_ele": 9,
    }
    groups = [VTAB.group(name) for name in VTAB.datasets]
    assert [groups.count(group) for group in GROUPS] == [7, 4, 8]
    assert len({VTAB.about(name).title for name in VTAB.datasets}) == 19


def test_few_shot_has_the_five_data_sets():
    classes = {name: FEW_SHOT.classes(name) for name in FEW_SHOT.datasets}
    assert classes == {
        "food-101": 101,
        "stanford_cars": 196,
        "oxford_flowers": 102,
        "fgvc_aircraft": 100,
        "oxford_pets": 37,
    }
    assert {FEW_SHOT.group(name) for name in classes} == {"Fine-grained"}


def test_unknown_data_sets_are_refused():
    for call in (VTAB.classes, VTAB.group, lambda name: VTAB.open("data", name)):
        with pytest.raises(ValueError, match=r"dataset: expected one of .*'cifar'.*, got 'mnist'"):
            call("mnist")


def test_the_originals_images_are_the_default(tmp_path):
    assert VTAB.images == ImageSettings(224, augment=False, resize="squash")
    assert FEW_SHOT.images == protocol("imagenet").images == ImageSettings(224, augment=True, resize="squash_crop")
    vtab_data(tmp_path)
    assert VTAB.open(tmp_path, "cifar").train[0][0].shape == (3, 224, 224)


def test_vtab_splits(tmp_path):
    vtab_data(tmp_path)
    splits = VTAB.open(tmp_path, "cifar", seed=7, images=SMALL)
    for images, name in (
        (splits.train, "train800"),
        (splits.validation, "val200"),
        (splits.train_and_validation, "train800val200"),
        (splits.test(), "test"),
    ):
        assert names(images) == [f"images/{name}/{n:06d}.jpg" for n in range(3)]
        assert [label for _, label in images] == [0, 1, 99]
    assert splits.targets == {}
    assert len(preload(splits.train, progress=False)) == 3


@pytest.mark.parametrize("dataset", FOLDERS)
def test_few_shot_splits(tmp_path, dataset):
    fewshot_data(tmp_path, dataset, FOLDERS[dataset], shots=1, seed=2)
    splits = FEW_SHOT.open(tmp_path, dataset, shots=1, seed=2, images=SMALL)
    draws = 2 if dataset == "oxford_pets" else 1  # NOAH's one-shot lists of pets have every line twice
    assert names(splits.train) == ["a b/one.jpg", "two.jpg"] * draws
    assert names(splits.train_and_validation) == names(splits.train)
    assert names(splits.validation) == ["three.jpg"] and names(splits.test()) == ["four.jpg", "five.jpg"]
    assert [label for _, label in splits.test()] == [1, 2] and splits.train[0][0].shape == (3, 8, 8)


def test_flowers_are_found_where_the_official_code_has_them_too(tmp_path):
    fewshot_data(tmp_path, "oxford_flowers", "images")
    assert FEW_SHOT.open(tmp_path, "oxford_flowers", shots=1, images=SMALL).validation[0][1] == 0


def test_training_images_alone_are_augmented(tmp_path):
    fewshot_data(tmp_path, "food-101", "images")
    splits = FEW_SHOT.open(tmp_path, "food-101", shots=1)
    assert [images.random for images in (splits.train, splits.train_and_validation)] == [True, True]
    for images in (splits.validation, splits.test()):
        assert not images.random
        assert [type(step).__name__ for step in images.transform.transforms][:2] == ["Resize", "CenterCrop"]
    plain = FEW_SHOT.open(tmp_path, "food-101", shots=1, images=SMALL)
    assert not plain.train.random and torch.equal(plain.train[0][0], plain.train[0][0])


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({}, r"shots: expected one of \(1, 2, 4, 8, 16\) for fewshot, got None"),
        ({"shots": 3}, "shots: expected one of .* got 3"),
        ({"shots": 1, "seed": 3}, r"seed: expected one of \(0, 1, 2\) for fewshot, got 3"),
    ],
)
def test_shots_and_seeds_without_lists_are_refused(choice, message):
    with pytest.raises(ValueError, match=message):
        FEW_SHOT.open("data", "food-101", **choice)


def test_images_that_are_no_settings_are_refused():
    with pytest.raises(TypeError, match="images: expected ImageSettings or None, got dict"):
        VTAB.open("data", "cifar", images={"size": 8})


def test_vtab_has_no_shots():
    with pytest.raises(ValueError, match=r"shots: expected one of .*None.* for vtab1k, got 16"):
        VTAB.open("data", "cifar", shots=16)


@pytest.mark.parametrize("content", [None, "this is no list\n"])
def test_the_test_list_is_not_read_before_it_is_asked_for(tmp_path, content):
    home = vtab_data(tmp_path)
    shutil.rmtree(home / "images" / "test")
    (home / "test.txt").unlink()
    if content is not None:
        (home / "test.txt").write_text(content)
    splits = VTAB.open(tmp_path, "cifar", images=SMALL)
    preload(splits.train_and_validation, progress=False)
    with pytest.raises((ValueError, FileNotFoundError), match=r"test\.txt"):
        splits.test()


def test_a_list_that_is_not_there_is_named_with_what_to_do(tmp_path):
    (vtab_data(tmp_path) / "val200.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"val200\.txt: not there\. Make the 19 folders with get_vtab1k\.py"):
        VTAB.open(tmp_path, "cifar")


def test_a_list_with_a_class_too_many_is_refused(tmp_path):
    write_list(vtab_data(tmp_path) / "train800.txt", [("images/train800/000000.jpg", 100)])
    with pytest.raises(ValueError, match=r"train800\.txt, line 1: expected a class from 0 to 99, got 100"):
        VTAB.open(tmp_path, "cifar")


def test_repeats_are_refused_but_in_few_shot_training_lists(tmp_path):
    twice = [("images/val200/000000.jpg", 0)] * 2
    write_list(vtab_data(tmp_path) / "val200.txt", twice)
    with pytest.raises(ValueError, match=r"val200\.txt, line 2: expected every image once"):
        VTAB.open(tmp_path, "cifar")
    write_list(fewshot_data(tmp_path, "food-101", "images") / "annotations/val_meta.list", [("three.jpg", 0)] * 2)
    with pytest.raises(ValueError, match=r"val_meta\.list, line 2: expected every image once"):
        FEW_SHOT.open(tmp_path, "food-101", shots=1)


def test_validation_never_holds_what_is_trained_on(tmp_path):
    file = fewshot_data(tmp_path, "food-101", "images") / "annotations/val_meta.list"
    write_list(file, [("two.jpg", 1), ("three.jpg", 0)])
    assert names(FEW_SHOT.open(tmp_path, "food-101", shots=1).validation) == ["three.jpg"]
    write_list(file, [("two.jpg", 1)])
    with pytest.raises(ValueError, match="expected validation images that are not trained on"):
        FEW_SHOT.open(tmp_path, "food-101", shots=1)


def test_the_average_is_of_the_three_groups():
    accuracies = {
        name: {"Natural": 0.2, "Specialized": 0.5, "Structured": 0.8}[VTAB.group(name)] for name in VTAB.datasets
    }
    assert group_averages(accuracies) == pytest.approx({"Natural": 0.2, "Specialized": 0.5, "Structured": 0.8})
    assert average(accuracies) == pytest.approx(0.5)
    assert sum(accuracies.values()) / 19 != pytest.approx(0.5)


def test_no_average_of_fewer_data_sets():
    accuracies = dict.fromkeys(VTAB.datasets, 0.5)
    del accuracies["dtd"], accuracies["kitti"]
    for function in (average, group_averages):
        with pytest.raises(ValueError, match="each of the 19 data sets, got 17; missing: dtd, kitti; unknown: none"):
            function(accuracies)
        with pytest.raises(ValueError, match="missing: none; unknown: mnist"):
            function({**dict.fromkeys(VTAB.datasets, 0.5), "mnist": 0.9})
