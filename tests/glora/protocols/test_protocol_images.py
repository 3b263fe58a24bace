import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from glora.protocols import ImageList, ImageSettings, preload, transform_for
from tests.glora.protocols.pictures import picture


def image(width=40, height=30, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def by_hand(resized, settings):
    """(pixels / 255 - mean) / std, of a PIL image that has its size already."""
    x = torch.from_numpy(np.array(resized)).permute(2, 0, 1).float() / 255
    return (x - torch.tensor(settings.mean)[:, None, None]) / torch.tensor(settings.std)[:, None, None]


@pytest.mark.parametrize("train", [True, False])
def test_vtab_squashes_by_bicubic_interpolation_and_normalises_in_training_too(train):
    settings = ImageSettings(size=16)
    expected = by_hand(image().resize((16, 16), Image.Resampling.BICUBIC), settings)
    torch.testing.assert_close(transform_for(settings, train)(image()), expected)


def test_few_shot_tests_squash_to_256_of_224_and_cut_out_the_centre():
    settings = ImageSettings(size=28, resize="squash_crop", augment=True)
    centre = image().resize((32, 32), Image.Resampling.BICUBIC).crop((2, 2, 30, 30))
    torch.testing.assert_close(transform_for(settings, train=False)(image()), by_hand(centre, settings))


def test_the_defaults_are_the_official_ones():
    timm_constants = pytest.importorskip("timm.data.constants")
    settings = ImageSettings()
    assert (settings.size, settings.interpolation, settings.resize, settings.augment) == (
        224,
        "bicubic",
        "squash",
        False,
    )
    assert settings.mean == timm_constants.IMAGENET_DEFAULT_MEAN
    assert settings.std == timm_constants.IMAGENET_DEFAULT_STD


def test_augmentation_is_timms_and_for_training_alone():
    settings = ImageSettings(size=16, augment=True)
    augmented, plain = transform_for(settings, train=True), transform_for(settings, train=False)
    names = [type(step).__name__ for step in augmented.transforms]
    assert names == [
        "RandomResizedCropAndInterpolation",
        "RandomHorizontalFlip",
        "RandAugment",
        "MaybeToTensor",
        "Normalize",
        "RandomErasing",
    ]
    draws = [augmented(image()) for _ in range(4)]
    assert all(draw.shape == (3, 16, 16) for draw in draws)
    assert not all(torch.equal(draws[0], draw) for draw in draws)
    assert torch.equal(plain(image()), plain(image()))


@pytest.mark.parametrize("magnitude", [0, 5, 9, 10])
def test_every_magnitude_of_every_operation(magnitude):
    """At 10, which one draw in fifty reaches, timm posterizes to 0 bits: Pillow 13 raises there, and a run ended."""
    transform = transform_for(ImageSettings(size=16, augment=True), train=True)
    [operations] = [step.ops for step in transform.transforms if hasattr(step, "ops")]
    picture = Image.effect_noise((16, 16), 64).convert("RGB")
    assert any("Posterize" in operation.name for operation in operations)
    for operation in operations:
        operation.prob, operation.magnitude, operation.magnitude_std = 1.0, magnitude, 0
        found = operation(picture)
        assert (found.size, found.mode) == (picture.size, picture.mode)
        if "Posterize" in operation.name and magnitude == 10:
            assert not any(high for _, high in found.getextrema())


def test_augmentation_normalises_by_the_settings():
    settings = ImageSettings(size=16, augment=True, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
    normalise = transform_for(settings, train=True).transforms[4]
    assert normalise.mean.tolist() == [0.5] * 3 and normalise.std.tolist() == [0.25] * 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 0}, "size: expected an integer from 1, got 0"),
        ({"size": 2.0}, "size"),
        ({"mean": (0.5, 0.5)}, "mean: expected three numbers"),
        ({"mean": "abc"}, "mean: expected three numbers"),
        ({"std": (1, 1, 0)}, "std: expected numbers above 0"),
        ({"interpolation": "cubic"}, "interpolation: expected one of"),
        ({"resize": "crop"}, "resize: expected one of"),
        ({"augment": 1}, "augment: expected True or False"),
    ],
)
def test_wrong_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ImageSettings(**options)


def test_settings_from_json_are_equal():
    assert ImageSettings(mean=[0.5, 0.5, 0.5]) == ImageSettings(mean=(0.5, 0.5, 0.5))


def some_images(folder, count=5, **options):
    entries = []
    for number in range(count):
        name, mode = (f"images/{number} x.png", "RGB") if number % 2 else (f"images/{number}.jpg", "L")
        picture(folder / name, seed=number, mode=mode)
        entries.append((name, count - number))
    return ImageList(folder, entries, transform_for(ImageSettings(size=8), train=True), **options)


def test_a_list_gives_tensors_and_classes_and_makes_grey_images_rgb(tmp_path):
    images = some_images(tmp_path)
    assert len(images) == 5
    for (x, label), number in zip(images, range(5)):
        assert x.shape == (3, 8, 8) and x.dtype == torch.float32 and label == 5 - number
    grey = images[0][0] * torch.tensor(ImageSettings().std)[:, None, None]
    grey = grey + torch.tensor(ImageSettings().mean)[:, None, None]
    torch.testing.assert_close(grey[0], grey[2])


def test_preloading_equals_streaming_bit_for_bit(tmp_path):
    images = some_images(tmp_path)
    streamed = next(iter(DataLoader(images, batch_size=5)))
    preloaded = next(iter(DataLoader(preload(images, progress=False), batch_size=5)))
    for one, other in zip(streamed, preloaded):
        assert one.dtype == other.dtype and torch.equal(one, other)


def test_preloading_decodes_no_more(tmp_path):
    images = some_images(tmp_path)
    preloaded = preload(images, progress=False)
    for file in (tmp_path / "images").iterdir():
        file.unlink()
    assert len(preloaded) == 5 and preloaded[4][1] == 1


def test_random_and_empty_lists_are_not_preloaded(tmp_path):
    with pytest.raises(ValueError, match="dataset: expected a deterministic transform"):
        preload(some_images(tmp_path, random=True), progress=False)
    with pytest.raises(ValueError, match="dataset: expected at least one image"):
        preload(ImageList(tmp_path, [], transform_for(ImageSettings(), False)), progress=False)


@pytest.mark.parametrize("content", [None, b"", b"not an image", "cut"])
def test_images_that_cannot_be_read_are_named(tmp_path, content):
    images = some_images(tmp_path, 2)
    file = tmp_path / "images/1 x.png"
    whole = file.read_bytes()
    file.unlink()
    if content is not None:
        file.write_bytes(whole[: len(whole) // 2] if content == "cut" else content)
    with pytest.raises(ValueError, match=r"1 x\.png: expected an image that can be read"):
        images[1]
