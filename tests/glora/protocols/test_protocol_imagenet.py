import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import glora
from glora.protocols import AmongClasses, ImageSettings, imagenet_synsets, protocol, subset_classes
from tests.glora.protocols.pictures import imagenet_data, picture, target_trees, write_list

IMAGENET = protocol("imagenet")
SMALL = ImageSettings(size=8)
SYNSETS = imagenet_synsets()


def open_(root, **options):
    return IMAGENET.open(root, "imagenet", images=SMALL, **options)


def test_the_synsets_are_imagenets_in_the_order_of_labels():
    assert len(SYNSETS) == len(set(SYNSETS)) == 1000 and list(SYNSETS) == sorted(SYNSETS)
    assert (SYNSETS[0], SYNSETS[361], SYNSETS[999]) == ("n01440764", "n02445715", "n15075141")


@pytest.mark.parametrize(
    ("target", "known"),
    [
        # NOAH's lists of A and R name these labels for these folders
        ("A", {"n07753592": 954, "n07697537": 934, "n02325366": 330, "n04270147": 813, "n02119022": 277}),
        ("R", {"n04522168": 883, "n07753592": 954, "n02092339": 178}),
    ],
)
def test_a_and_r_have_200_of_the_1000_classes(target, known):
    classes = subset_classes(target)
    assert len(set(classes)) == 200 and list(classes) == sorted(classes) and set(classes) <= set(range(1000))
    assert {synset: SYNSETS.index(synset) for synset in known} == known and set(known.values()) <= set(classes)


def test_a_and_r_are_not_the_same_classes():
    assert subset_classes("A")[:3] == (6, 11, 13) and subset_classes("R")[:3] == (1, 2, 4)
    with pytest.raises(ValueError, match="target: expected 'A' or 'R', got 'V2'"):
        subset_classes("V2")


def test_splits_from_lists_and_folders_of_synsets(tmp_path):
    imagenet_data(tmp_path)
    splits = open_(tmp_path)
    assert [label for _, label in splits.train.entries] == [0, 0, 999, 999]
    assert splits.train_and_validation.entries == splits.train.entries
    assert splits.test().entries == (
        (f"{SYNSETS[0]}/ILSVRC2012_val_00000000.JPEG", 0),
        (f"{SYNSETS[3]}/ILSVRC2012_val_00000003.JPEG", 3),
    )
    assert splits.test()[1][0].shape == (3, 8, 8)
    assert open_(tmp_path, shots=16, seed=0).train.entries == splits.train.entries


def test_the_validation_list_loses_what_is_trained_on(tmp_path):
    imagenet_data(tmp_path)
    assert [label for _, label in open_(tmp_path).validation.entries] == [5]


def test_coops_layout_is_found(tmp_path):
    home = imagenet_data(tmp_path)
    (home / "images").mkdir()
    for name in ("train", "val"):
        (home / name).rename(home / "images" / name)
    splits = open_(tmp_path)
    assert splits.train[0][1] == 0 and splits.test()[1][1] == 3


def test_flat_validation_images_are_labelled_by_their_list(tmp_path):
    home = imagenet_data(tmp_path)
    (home / "val").rename(home / "elsewhere")
    picture(home / "val" / "ILSVRC2012_val_00000001.JPEG")
    write_list(home / "annotations/val_meta.list", [("ILSVRC2012_val_00000001.JPEG", 65)])
    assert open_(tmp_path).test()[0][1] == 65


def test_the_other_draws_have_lists_of_their_own(tmp_path):
    imagenet_data(tmp_path, seed=2)
    assert len(open_(tmp_path, seed=2).train) == 4
    with pytest.raises(FileNotFoundError, match=r"num_shot_16\.seed_0: not there"):
        open_(tmp_path)


def test_targets_from_folders_of_classes(tmp_path):
    imagenet_data(tmp_path)
    target_trees(tmp_path)
    targets = open_(tmp_path).targets
    assert {name: target()[0][1] for name, target in targets.items()} == {
        "V2": 361,
        "Sketch": 653,
        "A": subset_classes("A")[0],
        "R": subset_classes("R")[-1],
    }
    kept = {name: target.classes for name, target in targets.items()}
    assert kept == {"V2": None, "Sketch": None, "A": subset_classes("A"), "R": subset_classes("R")}


def test_targets_from_noahs_lists(tmp_path):
    imagenet_data(tmp_path)
    path = "imagenet-a/n07753592/0.003773_soap dispenser _ soap dispenser_0.28588653.jpg"
    picture(tmp_path / "imagenet-adversarial" / path)
    write_list(tmp_path / "imagenet-adversarial/annotations/val_meta.list", [(path, 954)])
    images = open_(tmp_path).targets["A"]()
    assert images.entries == ((path, 954),) and images[0][0].shape == (3, 8, 8)


def test_a_label_that_a_target_has_not_is_refused(tmp_path):
    imagenet_data(tmp_path)
    write_list(tmp_path / "imagenet-rendition/annotations/val_meta.list", [("imagenet-r/n01440764/a.jpg", 0)])
    with pytest.raises(ValueError, match=r"line 1: expected a class of the 200 between 1 and 988, got 0"):
        open_(tmp_path).targets["R"]()


def test_neither_test_nor_targets_are_read_before_they_are_asked_for(tmp_path):
    home = imagenet_data(tmp_path)
    (home / "val").rename(home / "elsewhere")
    for folder in ("imagenet", "imagenetv2", "imagenet-sketch", "imagenet-adversarial", "imagenet-rendition"):
        (tmp_path / folder / "annotations").mkdir(parents=True, exist_ok=True)
        (tmp_path / folder / "annotations" / "val_meta.list").write_text("this is no list\n")
    splits = open_(tmp_path)
    for opened in (splits.test, *splits.targets.values()):
        with pytest.raises(ValueError, match=r"val_meta\.list, line 1"):
            opened()


def test_a_target_that_is_not_there_is_named_when_it_is_asked_for(tmp_path):
    imagenet_data(tmp_path)
    with pytest.raises(
        FileNotFoundError, match=r"imagenet-r: expected folders such as 'n01443537'.*hendrycks/imagenet-r"
    ):
        open_(tmp_path).targets["R"]()


def test_an_empty_folder_of_a_class_is_no_data_set(tmp_path):
    imagenet_data(tmp_path)
    (tmp_path / "imagenet-rendition/imagenet-r" / SYNSETS[1]).mkdir(parents=True)
    with pytest.raises(ValueError, match="imagenet-r: expected images in the folders of the classes"):
        open_(tmp_path).targets["R"]()


def test_choosing_among_classes_is_the_argmax_and_the_softmax_over_them():
    torch.manual_seed(0)
    logits, classes = torch.randn(64, 10), (1, 4, 7)
    masked = AmongClasses(nn.Identity(), classes)(logits)
    index = torch.tensor(classes)
    few = logits[:, index]
    assert torch.equal(masked.argmax(-1), index[few.argmax(-1)])
    assert not torch.equal(masked.argmax(-1), logits.argmax(-1))
    target = torch.randint(3, (64,))
    torch.testing.assert_close(F.cross_entropy(masked, index[target]), F.cross_entropy(few, target))


@pytest.mark.parametrize("classes", [(), (1, 1), (-1, 2), (0.5,)])
def test_choosing_among_no_classes_is_refused(classes):
    with pytest.raises(ValueError, match="classes: expected distinct integers from 0"):
        AmongClasses(nn.Identity(), classes)


def test_choosing_among_classes_is_evaluated_as_any_model():
    torch.manual_seed(0)
    model, classes = nn.Linear(4, 10), (1, 4, 7)
    data = TensorDataset(torch.randn(64, 4), torch.tensor(classes)[torch.randint(3, (64,))])
    everything, among = glora.evaluate(model, data), glora.evaluate(AmongClasses(model, classes), data)
    assert among.accuracy > everything.accuracy and among.loss < everything.loss
