"""Views of images: torchvision's presets value by value, and augmentation that depends on (seed, image, visit) alone."""

import random
import shutil
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from textguard.errors import InvalidParameter
from textguard.runtime import import_torchvision
from textguard.vision import transforms
from textguard.vision.datasets import IMAGENET_MEAN, IMAGENET_STD, PackedSplit, Split, load_split, read_source, save_splits
from textguard.vision.transforms import augmentation, evaluation_view, image_loader, training_view

import_torchvision()
from torchvision.transforms import InterpolationMode, v2  # noqa: E402 (as import_torchvision imports it)
from torchvision.transforms import functional as F  # noqa: E402


@dataclass(frozen=True)
class Images:
    """The fields of a recipe that concern images; everything on, as for Swin."""

    image_size: int = 24
    resize_size: int = 28
    interpolation: str = "bicubic"
    crop: str = "random_resized"
    crop_scale: tuple[float, float] = (0.08, 1.0)
    crop_padding: int = 4
    flip: float = 0.5
    auto_augment: str = "trivial_augment_wide"
    random_erasing: float = 0.25


PLAIN = Images(crop="none", flip=0, auto_augment="none", random_erasing=0)


def packed(channels: int, count: int = 40, size: int = 32) -> PackedSplit:
    images = torch.randint(0, 256, (count, channels, size, size), dtype=torch.uint8, generator=torch.manual_seed(channels))
    return PackedSplit(images, torch.arange(count) % 3, ["a", "b", "c"], list(IMAGENET_MEAN), list(IMAGENET_STD))


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Split:
    """24 JPEGs of different shapes, as an index."""
    root = tmp_path_factory.mktemp("photos")
    for number in range(24):
        folder = root / "train" / "ab"[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        shape = (30 + number, 60 - number, 3)
        Image.fromarray(np.random.default_rng(number).integers(0, 256, shape, np.uint8)).save(folder / f"{number}.jpg")
    shutil.copytree(root / "train", root / "test")
    content = read_source("folder", root)
    save_splits(
        root / "data", content, content.parts, root, source="folder", checksum=False, corrupt_share=0.0, orientation="stored"
    )
    return load_split(root / "data", "train", root)


def splits(photos: Split) -> dict[str, Split]:
    return {"grey": packed(1), "colour": packed(3), "photos": photos}


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("kind", ["grey", "colour", "photos"])
@pytest.mark.parametrize("prepared_bytes", [0, 2**28])
def test_evaluation_is_torchvisions_preset(kind, interpolation, prepared_bytes, photos, monkeypatch):
    monkeypatch.setattr(transforms, "PREPARED_BYTES", prepared_bytes)
    split = splits(photos)[kind]
    view = evaluation_view(split, 24, 28, interpolation)
    loaded = torch.cat([images for images, _ in image_loader(view, batches=torch.arange(len(view)).split(7))])
    how = InterpolationMode(interpolation)
    for number in range(len(split)):
        image, label = split[number]
        theirs = F.center_crop(v2.functional.resize(image, [28], interpolation=how, antialias=True), [24])
        theirs = F.normalize(F.convert_image_dtype(theirs, torch.float32), IMAGENET_MEAN, IMAGENET_STD)
        assert view[number][0].dtype == torch.float32
        torch.testing.assert_close(view[number][0], theirs, rtol=0, atol=1e-6)
        assert torch.equal(view[number][0], loaded[number])
        assert view[number][1] == label == int(split.labels[number])


def by_hand(image: Tensor, recipe: Images) -> Tensor:
    """Its training preset from torchvision's functions: drawn and applied one after the other."""
    size, how = recipe.image_size, InterpolationMode(recipe.interpolation)
    if recipe.crop == "random_resized":
        box = v2.RandomResizedCrop(size, scale=recipe.crop_scale).make_params([image])
        image = v2.functional.resized_crop(image, *box.values(), [size, size], interpolation=how, antialias=True)
    else:
        image = v2.functional.resize(image, [recipe.resize_size], interpolation=how, antialias=True)
        if recipe.crop == "padded":
            image = F.pad(image, [recipe.crop_padding] * 4)
            top, left = (int(torch.randint(0, length - size + 1, ())) for length in image.shape[1:])
            image = F.crop(image, top, left, size, size)
        else:
            image = F.center_crop(image, [size])
    if recipe.flip and torch.rand(1) < recipe.flip:
        image = F.hflip(image)
    if recipe.auto_augment == "trivial_augment_wide":
        image = F.pil_to_tensor(v2.TrivialAugmentWide(interpolation=how)(F.to_pil_image(image)))
    image = F.normalize(F.convert_image_dtype(image, torch.float32), IMAGENET_MEAN, IMAGENET_STD)
    return v2.RandomErasing(recipe.random_erasing)(image) if recipe.random_erasing else image


@pytest.mark.parametrize(
    "recipe",
    [
        Images(),
        Images(interpolation="bilinear", auto_augment="none", random_erasing=0),
        replace(PLAIN, crop="padded", flip=0.5, image_size=32, resize_size=32),
        PLAIN,
    ],
)
def test_training_is_torchvisions_preset_in_its_order(recipe, photos):
    augment = augmentation(recipe, IMAGENET_MEAN, IMAGENET_STD)
    for number in range(len(photos)):
        image, _ = photos[number]
        torch.manual_seed(number)
        ours = augment(image)
        torch.manual_seed(number)
        torch.testing.assert_close(ours, by_hand(image, recipe), rtol=0, atol=1e-6)
        assert ours.shape == (3, recipe.image_size, recipe.image_size)


def test_timms_policies_are_timms():
    from timm.data.auto_augment import rand_augment_transform

    recipe = replace(PLAIN, resize_size=32, image_size=32, auto_augment="rand-m9-mstd0.5-inc1")
    settings = {"translate_const": 14, "img_mean": (124, 116, 104), "interpolation": Image.Resampling.BICUBIC}
    theirs = rand_augment_transform("rand-m9-mstd0.5-inc1", settings)
    ours = augmentation(recipe, IMAGENET_MEAN, IMAGENET_STD)
    for image in packed(3).images:
        results = []
        for policy in (ours, lambda image: theirs(Image.fromarray(image.permute(1, 2, 0).numpy()))):
            random.seed(1)
            np.random.seed(1)
            results.append(policy(image))
        expected = F.normalize(F.to_tensor(results[1]), IMAGENET_MEAN, IMAGENET_STD)
        torch.testing.assert_close(results[0], expected, rtol=0, atol=1e-6)
    with pytest.raises(InvalidParameter, match=r"auto_augment is 'rand-x9'.*rand-m9"):
        augmentation(replace(recipe, auto_augment="rand-x9"), IMAGENET_MEAN, IMAGENET_STD)


@pytest.mark.parametrize("recipe", [Images(), Images(auto_augment="rand-m9-mstd0.5-inc1"), PLAIN])
@pytest.mark.parametrize("kind", ["grey", "photos"])
def test_augmentation_depends_on_seed_image_and_visit_alone(kind, recipe, photos, monkeypatch):
    split = splits(photos)[kind]
    keys = [(index, visit) for visit in (0, 3) for index in range(len(split))]
    expected = {key: training_view(split, recipe, 5)[key][0] for key in reversed(keys)}
    state = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    for workers in ("0", "2"):
        monkeypatch.setenv("TEXTGUARD_WORKERS", workers)
        order = [keys[position] for position in np.random.default_rng(1).permutation(len(keys))]
        batches = [order[start : start + 7] for start in range(0, len(order), 7)]
        loader = image_loader(training_view(split, recipe, 5), batches=batches)
        for batch, (images, labels) in zip(batches, loader, strict=True):
            assert labels.tolist() == [int(split.labels[index]) for index, _ in batch]
            assert all(torch.equal(image, expected[key]) for key, image in zip(batch, images, strict=True))
    assert torch.equal(torch.get_rng_state(), state[0])
    assert (np.random.get_state()[1].tolist(), random.getstate()) == state[1:]
    differ = [not torch.equal(expected[index, 0], expected[index, 3]) for index in range(len(split))]
    assert sum(differ) == 0 if recipe == PLAIN else sum(differ) > 0.8 * len(split)
    if recipe != PLAIN:
        other = training_view(split, recipe, 6)
        assert sum(not torch.equal(other[key][0], expected[key]) for key in keys) > 0.8 * len(keys)


def test_sizes_and_worker_counts_that_cannot_be(monkeypatch):
    with pytest.raises(InvalidParameter, match="resize_size is 20, below image_size, 24"):
        evaluation_view(packed(1), 24, 20, "bilinear")
    for wanted in ("-1", "many", "1e3"):
        monkeypatch.setenv("TEXTGUARD_WORKERS", wanted)
        with pytest.raises(InvalidParameter, match=f"TEXTGUARD_WORKERS='{wanted}'"):
            image_loader(evaluation_view(packed(1), 24, 24, "bilinear"), 8)


def test_small_packed_images_need_no_processes(photos, monkeypatch):
    monkeypatch.delenv("TEXTGUARD_WORKERS", raising=False)
    monkeypatch.setattr(transforms, "loading_processes", lambda: 3)
    assert image_loader(evaluation_view(packed(1), 24, 24, "bilinear"), 8).num_workers == 0
    assert image_loader(evaluation_view(photos, 24, 24, "bilinear"), 8).num_workers == 3
    assert image_loader(evaluation_view(packed(1), 224, 224, "bilinear"), 8).num_workers == 3
