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

    B rows are the batch of one step, for all processes together; a process takes a part of each batch. A visit is the number of
    the look at an image, as augmentation needs it. A rest smaller than a batch is left out, other images in each epoch: every
    step has the batch that the learning rate is meant for. The order depends on (seed, epoch) and the sizes alone.

    With repeated augmentation the epoch is as long, over fewer images: each is in it repeated_augmentation times, all in one
    batch unless that ends in between. In a batch all first visits come before all second ones, so that neighbours, which are
    mixed, are different images. Source: Hoffer et al., "Augment your batch", CVPR 2020, as torchvision's references' RASampler.
    """
    times, steps = recipe.repeated_augmentation, steps_per_epoch(samples, recipe)
    digest = hashlib.sha256(f"textguard order {seed} {epoch}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7]))
    images = torch.randperm(samples, generator=generator).repeat_interleave(times)
    visits = torch.arange(times).repeat(samples) + epoch * times
    looks = torch.stack([images, visits], dim=1)[: steps * min(recipe.batch_size, samples)].view(steps, -1, 2)
    return looks.take_along_dim(looks[..., 1:].argsort(dim=1, stable=True), dim=1).flatten(0, 1)
