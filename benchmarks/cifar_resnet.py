"""CIFAR's ResNets as dnn-benchmarks has them, with its weights, and the images that go with them.

Nothing of it comes with the repository. TEXTGUARD_FAULT_LISTS names a folder with ResNet20.th, ResNet20_FL.csv.xz and so on,
from github.com/cad-polito-it/dnn-benchmarks. TEXTGUARD_CIFAR10 names one with CIFAR-10's test images in class folders.
"""

import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from textguard.artifacts import read_pth

MEAN, DEVIATION = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)


class ResNet(nn.Module):
    """He et al., Deep Residual Learning, CVPR 2016, section 4.2, with shortcuts that subsample and pad (option A)."""

    def __init__(self, layers: int, classes: int = 10) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        blocks = (layers - 2) // 6
        self.layer1 = nn.Sequential(*(_Block(16, 16) for _ in range(blocks)))
        self.layer2 = nn.Sequential(_Block(16, 32), *(_Block(32, 32) for _ in range(blocks - 1)))
        self.layer3 = nn.Sequential(_Block(32, 64), *(_Block(64, 64) for _ in range(blocks - 1)))
        self.linear = nn.Linear(64, classes)

    def forward(self, images: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(F.relu(self.bn1(self.conv1(images))))))
        return self.linear(F.avg_pool2d(x, x.shape[3]).flatten(1))


class _Block(nn.Module):
    def __init__(self, inputs: int, channels: int) -> None:
        super().__init__()
        self.stride, self.padding = channels // inputs, (channels - inputs) // 2
        self.conv1 = nn.Conv2d(inputs, channels, 3, self.stride, 1, bias=False)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.padding:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.padding, self.padding))
        return F.relu(y + x)


def folder(variable: str) -> Path | None:
    """The folder that an environment variable names, where there is one."""
    named = os.environ.get(variable, "")
    return Path(named) if named and Path(named).is_dir() else None


def published(layers: int, files: Path) -> ResNet:
    """The published network."""
    model = ResNet(layers)
    weights = read_pth(files / f"ResNet{layers}.th")["state_dict"]
    model.load_state_dict({name.removeprefix("module."): value for name, value in weights.items()})
    return model.eval()


def some_images(files: Path, count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """So many test images, drawn at random, as the networks take them [N, 3, 32, 32]; and labels."""
    test = files / "test" if (files / "test").is_dir() else files
    named = [
        (image, label)
        for label, of_class in enumerate(sorted(part for part in test.iterdir() if part.is_dir()))
        for image in sorted(of_class.iterdir())
    ]
    chosen = np.random.default_rng(seed).permutation(len(named))[:count]
    pixels = np.stack([np.asarray(Image.open(named[place][0]).convert("RGB"), dtype=np.float32) / 255 for place in chosen])
    mean, deviation = (torch.tensor(values)[:, None, None] for values in (MEAN, DEVIATION))
    images = (torch.from_numpy(pixels).permute(0, 3, 1, 2) - mean) / deviation
    return images.contiguous(), torch.tensor([named[place][1] for place in chosen])
