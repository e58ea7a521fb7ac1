"""Image classification data sets, stored as safetensors: one file per split, images as 8-bit RGB."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from textguard.artifacts import read_safetensors, reading, write_json, write_safetensors
from textguard.errors import InvalidParameter, UnknownName

SPLITS = ("train", "test")


@dataclass(frozen=True)
class Source:
    """A data set as it comes. images: uint8 [N, 3, S, S]; labels: int64 [N]; classes: C names a language model can read."""

    images: Tensor
    labels: Tensor
    classes: list[str]


@dataclass(frozen=True)
class Split:
    """One split, ready for a network. images: float32 [N, 3, S, S], normalised by the training set's mean and std."""

    images: Tensor
    labels: Tensor
    classes: list[str]


def _digits(image_size: int) -> Source:
    """1,797 handwritten digits, 8 x 8 with 17 grey levels, that ship with scikit-learn (Alpaydin and Kaynak, UCI, 1998)."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    grey = torch.from_numpy(digits.images).float()[:, None] * (255 / 16)
    large = F.interpolate(grey, size=(image_size, image_size), mode="bilinear", align_corners=False)
    classes = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    return Source(large.round().to(torch.uint8).expand(-1, 3, -1, -1), torch.from_numpy(digits.target).long(), classes)


SOURCES: dict[str, Callable[[int], Source]] = {"digits": _digits}


def make_splits(
    source: str, *, image_size: int, test_share: float, split_seed: int, limit_train: int, limit_test: int
) -> tuple[Source, Source]:
    """Read a data set and split it into training and test images, stratified by class.

    limit_train, limit_test: keep that many images of each split, stratified; 0 keeps all.
    Raises UnknownName for the source, InvalidParameter for a split or limit that leaves a class without an image.
    """
    from sklearn.model_selection import train_test_split

    if source not in SOURCES:
        raise UnknownName("data set", source, SOURCES, "params.yaml datasets.*.source")
    whole = SOURCES[source](image_size)

    def choose(rows: np.ndarray, count: int | float) -> tuple[np.ndarray, np.ndarray]:
        labels = whole.labels[rows].numpy()
        try:
            return tuple(train_test_split(rows, train_size=count, stratify=labels, random_state=split_seed))
        except ValueError as error:
            raise InvalidParameter(f"{source} cannot be split as params.yaml datasets asks: {error}") from error

    train, test = choose(np.arange(len(whole.labels)), 1 - test_share)
    splits = []
    for rows, limit in ((train, limit_train), (test, limit_test)):
        kept = np.sort(choose(rows, limit)[0] if limit else rows)
        splits.append(Source(whole.images[kept], whole.labels[kept], whole.classes))
    return splits[0], splits[1]


def save_splits(folder: Path, train: Source, test: Source) -> None:
    """Write train.safetensors, test.safetensors and classes.json. Both splits carry the training set's mean and std."""
    pixels = train.images.double() / 255
    statistics = {
        "mean": json.dumps(pixels.mean(dim=(0, 2, 3)).tolist()),
        "std": json.dumps(pixels.std(dim=(0, 2, 3)).tolist()),
        "classes": json.dumps(train.classes),
    }
    for name, split in zip(SPLITS, (train, test), strict=True):
        write_safetensors(folder / f"{name}.safetensors", {"images": split.images, "labels": split.labels}, statistics)
    write_json(folder / "classes.json", train.classes)


def load_split(folder: Path, split: str) -> Split:
    """Read one split and normalise it. Raises InvalidArtifact."""
    path = folder / f"{split}.safetensors"
    tensors, metadata = read_safetensors(path, "data")
    with reading(path, "data"):
        images, labels = tensors["images"], tensors["labels"]
        mean, std, classes = (json.loads(metadata[name]) for name in ("mean", "std", "classes"))
    scale, offset = torch.tensor(std).view(3, 1, 1), torch.tensor(mean).view(3, 1, 1)
    return Split((images.float() / 255 - offset) / scale, labels, classes)
