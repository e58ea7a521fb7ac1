"""Mixup and CutMix: each image of a batch is mixed with the one before it, and so are their labels."""

import numpy as np
from torch import Tensor
from torch.nn import functional as F

from textguard.vision.recipe import Recipe


def mix(images: Tensor, labels: Tensor, classes: int, recipe: Recipe, generator: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Mix images [B, 3, H, W] and labels [B]. Returns mixed images and targets [B, C], float32 with rows that sum to 1.

    The recipe has mixup, CutMix, or both; of both, one is drawn for the whole batch. With neither, the images stay as they are
    and the labels become one-hot. An image's partner is the image before it; the first one's partner is the last.
    A process that holds a part of a batch gets its part of the whole batch's result like this: it hands in the image before its
    part too, with a generator of the same state as the other processes', and drops the first row of the result.

    Source: Zhang et al., "mixup", ICLR 2018; Yun et al., "CutMix", ICCV 2019; as in torchvision's references/classification.
    """
    targets = F.one_hot(labels, classes).float()
    alphas = {way: alpha for way, alpha in ((mixup, recipe.mixup), (cutmix, recipe.cutmix)) if alpha}
    if not alphas:
        return images, targets
    way = list(alphas)[generator.integers(len(alphas))]
    share = generator.beta(alphas[way], alphas[way])
    if way is mixup:
        return mixup(images, targets, share)
    height, width = images.shape[-2:]
    centre = int(generator.integers(height)), int(generator.integers(width))
    return cutmix(images, targets, box(height, width, centre, share))


def mixup(images: Tensor, targets: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Each image and target [B, C] times `share`, plus its partner times the rest."""
    return tuple(own * share + own.roll(1, 0) * (1 - share) for own in (images, targets))


def cutmix(images: Tensor, targets: Tensor, cut: tuple[slice, slice]) -> tuple[Tensor, Tensor]:
    """Each image with its partner's pixels inside the rows and columns `cut`. Targets [B, C] are mixed by area."""
    mixed = images.clone()
    mixed[..., *cut] = images.roll(1, 0)[..., *cut]
    share = 1 - mixed[0, 0, *cut].numel() / mixed[0, 0].numel()
    return mixed, targets * share + targets.roll(1, 0) * (1 - share)


def box(height: int, width: int, centre: tuple[int, int], share: float) -> tuple[slice, slice]:
    """Rows and columns around `centre` that have 1 - share of an image's area, or less where its edge cuts them off."""
    side = 0.5 * (1 - share) ** 0.5
    halves = int(side * height), int(side * width)
    return tuple(
        slice(max(middle - half, 0), min(middle + half, size))
        for middle, half, size in zip(centre, halves, (height, width), strict=True)
    )
