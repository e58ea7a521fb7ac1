"""Training: images per second of ResNet-50 at 224 x 224, from JPEGs on the disk, beside a plain loop.

The plain loop is what torchvision's references describe for ResNet-50: ImageFolder, RandomResizedCrop and flips of PIL images,
DataLoader, SGD with momentum. Both read with the same processes, and the time is that of steps, without the start of the
readers and the checkpoint at an epoch's end.
"""

import itertools
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader

from benchmarks.common import SEED
from textguard.runtime import import_torchvision, loading_processes, pick_device
from textguard.vision.backbones import build_backbone
from textguard.vision.datasets import load_split, make_splits, read_source, save_splits
from textguard.vision.recipe import load_recipe
from textguard.vision.training import train
from textguard.vision.transforms import training_view

BATCH, STEPS, CLASSES = 16, 6, 4
ROUNDS = 6


def measure() -> dict[str, Any]:
    """Images per second of the plain loop, of ours, and of ours with channels-last memory; and ours as times the plain one.

    The times are the median of those of the rounds, and the smallest and the largest: a shared machine's speed varies.
    """
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        _write_images(folder / "images")
        loops: dict[str, Callable[[], list[float]]] = {
            "plain": lambda: _plain(folder / "images" / "train"),
            "ours": lambda: _ours(folder, channels_last=False),
            "ours_channels_last": lambda: _ours(folder, channels_last=True),
        }
        speeds: dict[str, list[float]] = {name: [] for name in loops}
        for number in range(ROUNDS):
            for name in list(loops)[:: -1 if number % 2 else 1]:
                steps = [later - earlier for earlier, later in itertools.pairwise(loops[name]())]
                speeds[name].append(BATCH / statistics.median(steps))
    found: dict[str, Any] = {"batch": BATCH, "readers": loading_processes()}
    for name, own in speeds.items():
        found[name] = statistics.median(own)
        if name != "plain":
            times = [ours / plain for ours, plain in zip(own, speeds["plain"], strict=True)]
            found[f"times_{name}"] = [statistics.median(times), min(times), max(times)]
    return found


def _write_images(root: Path) -> None:
    """A folder per class with JPEGs of 500 x 375 pixels, smooth as photos are."""
    draw = np.random.default_rng(SEED)
    for part, count in (("train", BATCH * STEPS), ("val", CLASSES)):
        for number in range(count):
            path = root / part / f"class{number % CLASSES}" / f"{number}.jpeg"
            path.parent.mkdir(parents=True, exist_ok=True)
            coarse = Image.fromarray(draw.integers(0, 256, (12, 16, 3), dtype=np.uint8))
            coarse.resize((500, 375), Image.Resampling.BICUBIC).save(path, quality=90)


def _plain(folder: Path) -> list[float]:
    import_torchvision()
    from torchvision import datasets
    from torchvision.transforms import v2

    augmented = v2.Compose(
        [
            v2.RandomResizedCrop(224, antialias=True),
            v2.RandomHorizontalFlip(),
            v2.PILToTensor(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )
    torch.manual_seed(SEED)
    device = pick_device()
    model = build_backbone("resnet50", CLASSES, 224).to(device).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    loader = DataLoader(
        datasets.ImageFolder(str(folder), augmented), BATCH, shuffle=True, num_workers=loading_processes(), drop_last=True
    )
    ends = []
    for images, labels in loader:
        loss = nn.functional.cross_entropy(model(images.to(device)), labels.to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss.item()
        ends.append(time.perf_counter())
    return ends


def _ours(folder: Path, *, channels_last: bool) -> list[float]:
    recipe = load_recipe("resnet", {"epochs": 1, "batch_size": BATCH, "base_batch_size": BATCH})
    root, data = folder / "images", folder / "data"
    if not data.exists():
        content = read_source("folder", root)
        splits = make_splits(content, "folder", test_share=0.5, split_seed=0, limit_train=0, limit_test=0)
        save_splits(data, content, splits, root, source="folder", checksum=False, corrupt_share=0.0, orientation="stored")
    torch.manual_seed(SEED)
    model = build_backbone("resnet50", CLASSES, 224).to(pick_device())
    view, ends = training_view(load_split(data, "train", root), recipe, SEED), []
    os.environ["TEXTGUARD_CHANNELS_LAST"] = str(int(channels_last))
    try:
        with TemporaryDirectory() as work:
            train(
                model,
                view,
                CLASSES,
                recipe,
                seed=SEED,
                work=Path(work),
                label="train",
                after_step=lambda _: ends.append(time.perf_counter()),
            )
    finally:
        del os.environ["TEXTGUARD_CHANNELS_LAST"]
    return ends
