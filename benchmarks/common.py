"""Models, plans and clocks that the benchmarks share."""

import os
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

os.environ.setdefault("GOMP_SPINCOUNT", "20000")  # as stages/__main__.py does, and before torch is loaded

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from textguard.faults.damage import SINGLE_FLIP, Faults
from textguard.faults.engines import Engine, ReplayEngine
from textguard.faults.profiling import largest_outputs, profile_ranges
from textguard.runtime import pick_device
from textguard.vision.backbones import build_backbone
from textguard.vision.datasets import load_split, make_splits, read_source, save_splits
from textguard.vision.transforms import EvaluationView, evaluation_view, image_loader

SEED = 0
DETECTOR_LIMIT = 100.0


@dataclass(frozen=True)
class Classifier:
    """A network for the digits, 32 x 32 pixels, and what it takes to train it to some 90 % top-1 in seconds."""

    make: Callable[[], nn.Module]
    epochs: int
    optimizer: Callable[..., torch.optim.Optimizer]


class DigitsViT(nn.Module):
    """A vision transformer of six blocks on 64 patches of 4 x 4 pixels."""

    def __init__(self, width: int = 64, heads: int = 4, blocks: int = 6) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, stride=4)
        self.places = nn.Parameter(torch.randn(64, width) * 0.02)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(blocks)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.patches(images).flatten(2).transpose(1, 2) + self.places
        return self.head(self.norm(self.blocks(tokens)).mean(dim=1))


class Block(nn.Module):
    """Attention and an MLP, each behind a LayerNorm and round a residual connection."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.qkv, self.projection = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.norm2, self.fc1, self.fc2 = nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.activation = nn.GELU()

    def forward(self, tokens: Tensor) -> Tensor:
        parts = self.qkv(self.norm1(tokens)).chunk(3, dim=2)
        query, key, value = (parts[place].unflatten(2, (self.heads, -1)).transpose(1, 2) for place in range(3))
        attended = nn.functional.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        tokens = tokens + self.projection(attended)
        return tokens + self.fc2(self.activation(self.fc1(self.norm2(tokens))))


CLASSIFIERS = {
    "resnet18": Classifier(partial(build_backbone, "resnet18", 10, 32), 2, partial(torch.optim.SGD, lr=0.05, momentum=0.9)),
    "mobilenet_v2": Classifier(
        partial(build_backbone, "mobilenet_v2", 10, 32), 8, partial(torch.optim.SGD, lr=0.05, momentum=0.9)
    ),
    "vit": Classifier(DigitsViT, 12, partial(torch.optim.AdamW, lr=1e-3)),
}


def trained_digits(seed: int = SEED, network: str = "resnet18") -> tuple[nn.Module, EvaluationView, EvaluationView]:
    """One of CLASSIFIERS, trained on the demo's data; its training data and its test data: 360 images of 32 x 32 pixels.

    seed: of the training; the split is always the same.
    """
    content = read_source("digits", None)
    splits = make_splits(content, "digits", test_share=0.2, split_seed=SEED, limit_train=0, limit_test=0)
    with TemporaryDirectory() as folder:
        save_splits(
            Path(folder), content, splits, None, source="digits", checksum=False, corrupt_share=0.0, orientation="stored"
        )
        train, test = (evaluation_view(load_split(Path(folder), split, None), 32, 32, "bilinear") for split in splits)
    torch.manual_seed(seed)
    known = CLASSIFIERS[network]
    model = known.make().train()
    optimizer = known.optimizer(model.parameters())
    for _ in range(known.epochs):
        order = torch.randperm(len(train))
        for images, labels in image_loader(train, batches=order.split(64)):
            loss = nn.functional.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.eval().to(pick_device()), train, test


def digits_classifier() -> tuple[nn.Module, Tensor]:
    """The classifier and its test images: masking depends on trained weights."""
    model, _, test = trained_digits()
    return model, next(iter(image_loader(test, len(test))))[0].to(pick_device())


@dataclass(frozen=True)
class DigitsCampaign:
    """All that a campaign on the trained classifier needs. limits: of the profiled detector, by layer."""

    model: nn.Module
    engine: ReplayEngine
    loader: DataLoader
    limits: dict[str, float]


def digits_campaign(batch_size: int = 256, seed: int = SEED, network: str = "resnet18") -> DigitsCampaign:
    """A campaign on a trained classifier and its test images, with ranges from its training images."""
    model, train, test = trained_digits(seed, network)
    limits = largest_outputs(profile_ranges(model, image_loader(train, 256)))
    return DigitsCampaign(model, ReplayEngine(model, test[0][0], batch_size), image_loader(test, 256), limits)


def random_classifier(backbone: str, image_size: int, images: int) -> tuple[nn.Module, Tensor]:
    """A backbone with random weights, BatchNorm's statistics taken from random images, and such images [N, 3, S, S]."""
    torch.manual_seed(SEED)
    model = build_backbone(backbone, 1000, image_size)
    pictures = torch.randn(images, 3, image_size, image_size)
    model.train()
    with torch.no_grad():
        for _ in range(3):
            model(pictures[:8])
    return model.eval().to(pick_device()), pictures.to(pick_device())


def draw_faults(engine: Engine, images: int, count: int) -> Faults:
    """Single bit flips, uniform over images, neurons and bits, evenly spread over the layers."""
    draw = torch.Generator().manual_seed(SEED)
    position = torch.arange(count) * len(engine.sites) // count
    neurons = torch.tensor([site.neurons for site in engine.sites])[position]
    columns = {
        "position": position,
        "image": torch.randint(images, (count,), generator=draw),
        "limit": torch.full((count,), DETECTOR_LIMIT),
        "row": torch.arange(count),
        "neuron": (torch.rand(count, generator=draw, dtype=torch.float64) * neurons).long(),
        "mask": 1 << torch.randint(32, (count,), generator=draw),
    }
    return Faults(SINGLE_FLIP, **{name: column.to(engine.device) for name, column in columns.items()})


def seconds(run: Callable[[], object]) -> float:
    """How long one run takes, on GPUs until it is really done."""
    start = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def alternating(runs: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """The median seconds of each run, after one round that does not count; alternating, so that a slow phase hits all."""
    for run in runs.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            times[name].append(seconds(run))
    return {name: statistics.median(found) for name, found in times.items()}
