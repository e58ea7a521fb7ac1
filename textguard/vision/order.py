"""In which order an epoch sees the images."""

import hashlib

import torch
from torch import Tensor

from textguard.vision.recipe import Recipe


def steps_per_epoch(samples: int, recipe: Recipe) -> int:
    """Batches of one epoch over `samples` images; see `epoch_order`."""
    return max(1, samples // recipe.batch_size)


def epoch_order(samples: int, recipe: Recipe, seed: int, epoch: int) -> Tensor:
    """What an epoch, counted from 0, looks at: int64 [steps * B, 2] of (image, visit), with B = min(batch_size, samples).

    B rows are the batch of one step, for all processes together; a process takes a part of each batch. A visit is the number
    of a look at an image, on which augmentation depends. Images that do not fill a last batch are left out, since the learning
    rate is meant for whole batches; every epoch leaves out others. The order depends on (seed, epoch) and the sizes alone.

    With repeated augmentation, an epoch has as many steps, but fewer images, each repeated_augmentation times. The visits of an
    image are in one batch, unless the batch ends between them. A batch has all first visits before all second ones, so that
    neighbours are different images: mixing mixes neighbours. Source: Hoffer et al., "Augment your batch", CVPR 2020, as the
    RASampler of torchvision's references.
    """
    times, steps = recipe.repeated_augmentation, steps_per_epoch(samples, recipe)
    digest = hashlib.sha256(f"textguard order {seed} {epoch}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7]))
    images = torch.randperm(samples, generator=generator).repeat_interleave(times)
    visits = torch.arange(times).repeat(samples) + epoch * times
    looks = torch.stack([images, visits], dim=1)[: steps * min(recipe.batch_size, samples)].view(steps, -1, 2)
    return looks.take_along_dim(looks[..., 1:].argsort(dim=1, stable=True), dim=1).flatten(0, 1)
