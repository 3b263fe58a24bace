import shutil

import pytest

from glora.protocols import describe_missing, protocol
from tests.glora.protocols.pictures import fewshot_data, imagenet_data, target_trees, vtab_data, write_list

VTAB, FEW_SHOT, IMAGENET = protocol("vtab1k"), protocol("fewshot"), protocol("imagenet")


def test_nothing_is_missing_of_what_is_whole(tmp_path):
    vtab_data(tmp_path, "cifar")
    vtab_data(tmp_path, "kitti")
    assert VTAB.check(tmp_path, ["cifar", "kitti"]) == []
    fewshot_data(tmp_path, "oxford_pets", "images", shots=1, seed=1)
    assert FEW_SHOT.check(tmp_path, ["oxford_pets"], [1], [1]) == []
    assert describe_missing([]) == ""


def test_images_are_not_decoded(tmp_path):
    home = vtab_data(tmp_path)
    (home / "images/test/000000.jpg").write_bytes(b"")
    assert VTAB.check(tmp_path, ["cifar"]) == []


def test_a_data_set_without_a_folder_is_one_entry(tmp_path):
    vtab_data(tmp_path, "cifar")
    missing = VTAB.check(tmp_path)
    assert [entry.dataset for entry in missing] == [name for name in VTAB.datasets if name != "cifar"]
    assert [entry.file for entry in missing] == [tmp_path / entry.dataset for entry in missing]
    text = describe_missing(missing)
    assert text.count("get_vtab1k.py of NOAH (https://github.com/ZhangYuanhan-AI/NOAH#data-preparation)") == 1
    assert f"put them into {tmp_path}." in text and all(str(tmp_path / name) in text for name in VTAB.datasets[1:])


def test_everything_is_found_at_once(tmp_path):
    home = vtab_data(tmp_path, "cifar", per_split=6)
    (home / "val200.txt").unlink()
    write_list(home / "train800.txt", [("images/train800/000000.jpg", 0), ("images/train800/000001.jpg", 100)])
    for number in range(1, 6):
        (home / f"images/test/{number:06d}.jpg").unlink()
    (home / "images/train800val200/000005.jpg").unlink()
    found = {(entry.file.name, entry.problem) for entry in VTAB.check(tmp_path, ["cifar", "dtd"])}
    first = ", ".join(f"images/test/{number:06d}.jpg" for number in (1, 2, 3))
    assert found == {
        ("val200.txt", "not there"),
        ("train800.txt", "line 2: expected a class from 0 to 99, got 100"),
        ("cifar", f"5 of the 6 images of test.txt are not there: {first}, ..."),
        ("cifar", "1 of the 6 images of train800val200.txt are not there: images/train800val200/000005.jpg"),
        ("dtd", "not there"),
    }


def test_repeated_lines_are_one_image_and_shared_lists_are_checked_once(tmp_path):
    home = fewshot_data(tmp_path, "oxford_pets", "images")
    (home / "images/two.jpg").unlink()
    fewshot_data(tmp_path, "oxford_pets", "images", seed=1)
    (home / "images/five.jpg").unlink()
    problems = [entry.problem for entry in FEW_SHOT.check(tmp_path, ["oxford_pets"], [1], [0, 1])]
    assert problems == ["1 of the 2 images of test_meta.list are not there: five.jpg"]
    (home / "images/two.jpg").unlink()
    problems = [entry.problem for entry in FEW_SHOT.check(tmp_path, ["oxford_pets"], [1], [0])]
    assert problems[0] == "1 of the 2 images of train_meta.list.num_shot_1.seed_0 are not there: two.jpg"


def test_few_shot_checks_the_draws_asked_for_and_says_where_the_lists_are(tmp_path):
    fewshot_data(tmp_path, "stanford_cars", ".", shots=4, seed=0)
    assert FEW_SHOT.check(tmp_path, ["stanford_cars"], [4], [0]) == []
    missing = FEW_SHOT.check(tmp_path, ["stanford_cars"], [4, 8])
    assert [entry.file.name for entry in missing] == [
        "train_meta.list.num_shot_4.seed_1",
        "train_meta.list.num_shot_4.seed_2",
        *(f"train_meta.list.num_shot_8.seed_{seed}" for seed in range(3)),
    ]
    remedy = "NOAH/tree/main/data/few-shot/standford-cars/annotations into "
    assert f"{remedy}{tmp_path}/stanford_cars/annotations" in describe_missing(missing)


def test_what_there_is_no_list_for_is_refused():
    with pytest.raises(ValueError, match="dataset"):
        FEW_SHOT.check("data", ["cifar"])
    with pytest.raises(ValueError, match="shots"):
        FEW_SHOT.check("data", shots=[3])
    with pytest.raises(ValueError, match="seed"):
        FEW_SHOT.check("data", seeds=[9])


def test_imagenet_names_each_target_by_its_folder(tmp_path):
    missing = IMAGENET.check(tmp_path)
    folders = ["imagenet", "imagenetv2", "imagenet-sketch", "imagenet-adversarial", "imagenet-rendition"]
    assert [entry.dataset for entry in missing] == folders
    for page in ("image-net.org", "modestyachts/ImageNetV2", "hendrycks/natural-adv-examples", "hendrycks/imagenet-r"):
        assert page in describe_missing(missing)


def test_folders_of_classes_that_are_not_there_or_empty_are_summarised(tmp_path):
    imagenet_data(tmp_path)
    target_trees(tmp_path)
    (tmp_path / "imagenet-rendition/imagenet-r/n01443537").mkdir()
    problems = {entry.dataset: entry.problem for entry in IMAGENET.check(tmp_path, seeds=[0])}
    assert problems["imagenet-rendition"].startswith(
        "199 of the 200 folders of classes are not there or empty: n01443537"
    )
    assert problems["imagenet"].startswith("998 of the 1,000 folders of classes are not there or empty: n01443537, ")
    assert problems["imagenet-adversarial"].startswith("199 of the 200 folders of classes")
    assert problems["imagenetv2"] == "999 of the 1,000 folders of classes are not there or empty: 0, 1, 2, ..."


def test_a_list_of_a_target_is_checked_image_by_image(tmp_path):
    imagenet_data(tmp_path)
    target_trees(tmp_path)
    home = tmp_path / "imagenetv2"
    folder = "imagenetv2-matched-frequency-format-val/361"
    write_list(home / "annotations/val_meta.list", [(f"{folder}/0f.jpeg", 361), (f"{folder}/1f.jpeg", 361)])
    problems = {entry.dataset: entry.problem for entry in IMAGENET.check(tmp_path, seeds=[0])}
    assert problems["imagenetv2"] == f"1 of the 2 images of val_meta.list are not there: {folder}/1f.jpeg"


def test_without_validation_images_of_imagenet_the_remedy_names_both_layouts(tmp_path):
    shutil.rmtree(imagenet_data(tmp_path) / "val")
    missing = [entry for entry in IMAGENET.check(tmp_path, seeds=[0]) if entry.dataset == "imagenet"]
    assert [entry.file.name for entry in missing] == ["val_meta.list"]
    assert "a folder a synset, or val flat" in missing[0].what_to_do


def test_a_folder_of_images_that_is_not_there_is_one_entry(tmp_path):
    shutil.rmtree(vtab_data(tmp_path) / "images" / "test")
    problems = [entry.problem for entry in VTAB.check(tmp_path, ["cifar"])]
    assert len(problems) == 1 and problems[0].startswith("3 of the 3 images of test.txt are not there")
