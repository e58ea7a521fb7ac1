"""From raw images to what a network sees: the order and the building blocks of torchvision's reference presets."""

import hashlib
import os
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from textguard.errors import InvalidParameter
from textguard.runtime import import_torchvision, loading_processes
from textguard.vision.datasets import PackedSplit, Split

import_torchvision()
from torchvision.transforms import InterpolationMode, v2  # noqa: E402 (as import_torchvision imports it)
from torchvision.transforms.v2 import functional as F  # noqa: E402

PREPARED_BYTES = 2**28  # a split's resized images are kept in memory up to this size
SMALL = 64  # pixels a side; smaller packed images are prepared faster than another process could send them


class ImageRecipe(Protocol):
    """The fields of a recipe that concern images; see textguard.vision.recipe.Recipe."""

    image_size: int
    resize_size: int
    interpolation: str
    crop: str
    crop_scale: Sequence[float]
    crop_padding: int
    flip: float
    auto_augment: str
    random_erasing: float


class EvaluationView(Dataset):
    """See `evaluation_view`."""

    def __init__(self, split: Split, image_size: int, resize_size: int, interpolation: str) -> None:
        _check_sizes(image_size, resize_size)
        self.split, self.image_size, self.resize_size = split, image_size, resize_size
        self.interpolation = InterpolationMode(interpolation)
        self.prepared: Tensor | None = None
        if isinstance(split, PackedSplit) and len(split) * split.images.shape[1] * image_size**2 <= PREPARED_BYTES:
            self.prepared = torch.cat([self._fit(images) for images in split.images.split(1024)])

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[Tensor, int]]:
        indices = [int(index) for index in indices]  # from a list, range, array or tensor
        if self.prepared is not None:
            images = self._normalise(self.prepared[indices])
        elif isinstance(self.split, PackedSplit):
            images = self._normalise(self._fit(self.split.images[indices]))
        else:
            images = [self._normalise(self._fit(self.split[index][0])) for index in indices]
        return list(zip(images, self.split.labels[indices].tolist(), strict=True))

    def _fit(self, images: Tensor) -> Tensor:
        images = F.resize(images, [self.resize_size], interpolation=self.interpolation, antialias=True)
        return F.center_crop(images, [self.image_size])

    def _normalise(self, images: Tensor) -> Tensor:
        images = F.to_dtype(images, torch.float32, scale=True).expand(*images.shape[:-3], 3, -1, -1)
        return F.normalize(images, self.split.mean, self.split.std)


class TrainingView(Dataset):
    """See `training_view`."""

    def __init__(self, split: Split, recipe: ImageRecipe, seed: int) -> None:
        _check_sizes(recipe.image_size, recipe.resize_size)
        self.split, self.image_size, self.seed = split, recipe.image_size, seed
        self.augment = augmentation(recipe, split.mean, split.std)
        self.plain: EvaluationView | None = None
        if (recipe.crop, recipe.flip, recipe.auto_augment, recipe.random_erasing) == ("none", 0, "none", 0):
            self.plain = EvaluationView(split, recipe.image_size, recipe.resize_size, recipe.interpolation)

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int]:
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: Sequence[tuple[int, int]]) -> list[tuple[Tensor, int]]:
        if self.plain:
            return self.plain.__getitems__([index for index, _ in keys])
        views = []
        for index, visit in keys:
            image, label = self.split[index]
            with _seeded(self.seed, index, visit):
                views.append((self.augment(image), label))
        return views


def _check_sizes(image_size: int, resize_size: int) -> None:
    if resize_size < image_size:
        raise InvalidParameter(
            f"resize_size is {resize_size}, below image_size, {image_size}: images would get a black frame; "
            "change params.yaml backbones"
        )


def evaluation_view(split: Split, image_size: int, resize_size: int, interpolation: str) -> EvaluationView:
    """A split as networks are tested: [i] is (float32 [3, image_size, image_size], label).

    The shorter side is resized to resize_size with antialiasing, the centre cropped, the channels normalised. interpolation:
    bilinear, bicubic. Source: torchvision's references/classification, ClassificationPresetEval.
    """
    return EvaluationView(split, image_size, resize_size, interpolation)


def training_view(split: Split, recipe: ImageRecipe, seed: int) -> TrainingView:
    """A split as networks are trained: [(i, visit)] is (float32 [3, image_size, image_size], label).

    Augmentation depends on (seed, i, visit) alone, whatever the order and the process, and leaves all global generators as they
    were. visit: the number of this look at the image.
    """
    return TrainingView(split, recipe, seed)


def augmentation(recipe: ImageRecipe, mean: Sequence[float], std: Sequence[float]) -> Callable[[Tensor], Tensor]:
    """A function from uint8 [3, H, W] to float32 [3, S, S] that draws from the global generators.

    Its steps have the order of ClassificationPresetTrain in torchvision's references/classification: crop, flip, automatic
    augmentation, normalisation, random erasing. crop: `none` resizes and crops as for evaluation; `padded` resizes in the same
    way, adds crop_padding black pixels on each side, and crops at random. auto_augment: `trivial_augment_wide`, or a policy of
    timm such as `rand-m9-mstd0.5-inc1`. Raises InvalidParameter for a policy that timm does not know.
    """
    how, size = InterpolationMode(recipe.interpolation), recipe.image_size
    steps: list[Callable[[Tensor], Tensor]] = []
    if recipe.crop == "random_resized":
        steps.append(v2.RandomResizedCrop(size, scale=tuple(recipe.crop_scale), interpolation=how, antialias=True))
    else:
        steps.append(v2.Resize(recipe.resize_size, interpolation=how, antialias=True))
        padded = recipe.crop == "padded"
        steps.append(v2.RandomCrop(size, padding=recipe.crop_padding) if padded else v2.CenterCrop(size))
    if recipe.flip:
        steps.append(v2.RandomHorizontalFlip(recipe.flip))
    if recipe.auto_augment != "none":
        # Through PIL: on tensors, torchvision rotates and shears without bicubic interpolation, and timm does nothing.
        trivial = recipe.auto_augment == "trivial_augment_wide"
        policy = v2.TrivialAugmentWide(interpolation=how) if trivial else _timm_policy(recipe, mean)
        steps += [v2.ToPILImage(), policy, v2.PILToTensor()]
    steps += [v2.ToDtype(torch.float32, scale=True), v2.Normalize(list(mean), list(std))]
    if recipe.random_erasing:
        steps.append(v2.RandomErasing(recipe.random_erasing))
    return v2.Compose(steps)


def _timm_policy(recipe: ImageRecipe, mean: Sequence[float]) -> Callable:
    """Timm's augmentation of this name, with the settings that timm's own pipeline gives it."""
    from PIL import Image
    from timm.data.auto_augment import auto_augment_transform, rand_augment_transform

    settings = {
        "translate_const": int(recipe.image_size * 0.45),
        "img_mean": tuple(min(255, round(255 * channel)) for channel in mean),
        "interpolation": Image.Resampling[recipe.interpolation.upper()],
    }
    make = rand_augment_transform if recipe.auto_augment.startswith("rand") else auto_augment_transform
    try:
        return make(recipe.auto_augment, settings)
    except (AssertionError, KeyError, ValueError) as error:
        raise InvalidParameter(
            f"auto_augment is {recipe.auto_augment!r}; it must be none, trivial_augment_wide, or a policy of timm, "
            "as in rand-m9-mstd0.5-inc1; change it in params.yaml backbones"
        ) from error


@contextmanager
def _seeded(seed: int, index: int, visit: int) -> Iterator[None]:
    """Seed torch's, numpy's and Python's global generators with these three numbers, and put them back afterwards."""
    digest = hashlib.sha256(f"textguard image {seed} {index} {visit}".encode()).digest()
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    # Not torch.manual_seed, which would reseed every GPU as well.
    torch.default_generator.manual_seed(int.from_bytes(digest[:7]))
    np.random.seed(int.from_bytes(digest[7:11]))
    random.seed(digest[11:])
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])
        random.setstate(states[2])


def image_loader(
    view: EvaluationView | TrainingView,
    batch_size: int | None = None,
    *,
    batches: Iterable[Sequence] | None = None,
    pin_memory: bool = False,
) -> DataLoader:
    """Batches of a view: `batch_size` images each, in their order, or those that `batches` lists, as keys of the view.

    TEXTGUARD_WORKERS processes read ahead; by default none do for small images that lie in memory. Loading draws nothing from
    torch's global generator.
    """
    at_hand = isinstance(view.split, PackedSplit) and view.image_size <= SMALL
    order = {"batch_size": batch_size} if batches is None else {"batch_sampler": batches}
    return DataLoader(
        view,
        **order,
        num_workers=0 if at_hand and "TEXTGUARD_WORKERS" not in os.environ else loading_processes(),
        generator=torch.Generator(),
        pin_memory=pin_memory,
    )
