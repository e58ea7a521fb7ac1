"""Image classification data sets: where they come from, their splits, and how one picture is read.

Small data sets are packed: all images of a split in one safetensors file, at their own size. Large ones stay where they are: a
split is then an index of their files, in Parquet. Nothing is resized or normalised here; `textguard.vision.transforms` does.
"""

import gzip
import hashlib
import json
import math
import os
import re
import shutil
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.utils.data import Dataset

from textguard import modules
from textguard.artifacts import (
    beside_copy,
    expanded,
    lasting,
    locked,
    misnamed,
    parse_json,
    read_classes,
    read_json,
    read_regular,
    read_safetensors,
    reading,
    write_json,
    write_parquet,
    write_safetensors,
)
from textguard.errors import InvalidArtifact, InvalidParameter, TextguardError, UnknownName, UnreadableImage, printable
from textguard.runtime import announce, import_torchvision, loading_processes, progress
from textguard.vision.image_files import (
    EXTENSIONS,
    ORIENTATIONS,
    ClassFolders,
    announce_left_out,
    decode,
    reason,
    shown,
)

SPLITS = ("train", "test")
DOWNLOADS = Path("data") / "downloads"
PACKED, INDEX = "images.safetensors", "index.parquet"
OUTSIDE = r"^/|^$|(^|/)\.\.(/|$)"  # what no path below a root looks like
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Split(Dataset, ABC):
    """One split, as a map-style data set of raw images: split[i] is (uint8 [3, H, W], label).

    labels: int64 [N]. classes: C names a language model can read. mean, std: of the three channels, for values from 0 to 1.
    """

    def __init__(self, labels: Tensor, classes: list[str], mean: list[float], std: list[float]) -> None:
        self.labels, self.classes, self.mean, self.std = labels, classes, mean, std

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def __getitem__(self, index: int) -> tuple[Tensor, int]: ...


class PackedSplit(Split):
    """A split whose images lie in memory: uint8 [N, 1 or 3, H, W]."""

    def __init__(self, images: Tensor, *described: object) -> None:
        super().__init__(*described)
        self.images = images

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index].expand(3, -1, -1), int(self.labels[index])


class IndexedSplit(Split):
    """A split whose images are files below `root`, decoded when they are asked for. orientation: see image_files.decode."""

    def __init__(self, index: pd.DataFrame, root: Path, orientation: str, *described: object) -> None:
        super().__init__(*described)
        self.orientation = orientation
        # Arrays of Arrow and numpy, because a list's objects would be copied one by one to every process that loads images.
        self.paths, self.checksums = (index[name].astype("string[pyarrow]").array for name in ("path", "sha256"))
        self.sizes, self.root = index["bytes"].to_numpy(), root

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path, checksum = self.root / self.paths[index], self.checksums[index]
        try:
            content = read_regular(path)
            if len(content) != self.sizes[index] or (checksum and hashlib.sha256(content).hexdigest() != checksum):
                raise ValueError("it is not the file that the index was made from")
            pixels = np.array(decode(content, self.orientation).image)
        except Exception as error:
            raise UnreadableImage(
                f"{shown(path)} cannot be read ({reason(error)}); put it back, or run stage 'data' again"
            ) from error
        return torch.from_numpy(pixels).permute(2, 0, 1), int(self.labels[index])


def split_file(folder: Path, split: str) -> Path:
    """The file of data/DATASET/SPLIT that holds its images or their index."""
    index = folder / split / INDEX
    return index if index.exists() else folder / split / PACKED


def load_split(folder: Path, split: str, root: Path | None) -> Split:
    """Read one split from data/DATASET. root: where the indexed files lie (see `data_root`). Raises InvalidArtifact."""
    return _load(folder, split, root)[0]


class Wanted(Protocol):
    """What params.yaml says of a data set, as far as it shows in its files; see textguard.params.DatasetParams."""

    source: str
    folder: str | None
    test_share: float
    limit_train: int
    limit_test: int
    orientation: str


def read_split(folder: Path, split: str, wanted: Wanted, repository: Path) -> Split:
    """`load_split`, of a data set that must be what params.yaml says.

    Raises InvalidArtifact for files that were made of another source, in another way, or with another number of images.
    """
    root = data_root(wanted.source, wanted.folder, repository)
    found, described = _load(folder, split, root)
    limits = {"train": wanted.limit_train, "test": wanted.limit_test}
    with reading(split_file(folder, split), "data"):
        if described["source"] != wanted.source:
            raise InvalidArtifact(f"was made of {printable(described['source'])!r}, and params.yaml says {wanted.source!r}")
        if is_own(wanted.source):
            if described.get("split") != split:
                raise InvalidArtifact(f"holds no {split}ing images, or those of an older version")
            fits = len(found) <= (limits[split] or len(found))
        elif isinstance(found, IndexedSplit):
            if found.orientation != wanted.orientation:
                raise InvalidArtifact(
                    f"was made with orientation {found.orientation!r}, and params.yaml says {wanted.orientation!r}"
                )
            fits = len(found) <= (limits[split] or len(found))  # unreadable images were left out
        else:
            sizes = dict(zip(SPLITS, _sizes_of(wanted), strict=True))
            (other,) = set(SPLITS) - {split}
            fits = len(found) == sizes[split] or not (limits[split] or len(found) == sizes[other])
        if not fits:
            raise InvalidArtifact(f"holds {len(found)} images, which is not what params.yaml asks for as {split}ing images")
    return found


def _sizes_of(wanted: Wanted) -> tuple[int, int]:
    limits = {"limit_train": wanted.limit_train, "limit_test": wanted.limit_test}
    return expected_sizes(wanted.source, test_share=wanted.test_share, **limits)[:2]


def _load(folder: Path, split: str, root: Path | None) -> tuple[Split, dict[str, str]]:
    """One split, and what its file says of how it was made."""
    path, names = split_file(folder, split), folder / "classes.json"
    stated = read_classes(names) if names.exists() else None
    packed = read_safetensors(path, "data") if path.name == PACKED else None
    with reading(path, "data"):
        if packed:
            tensors, metadata = packed
            images, labels = _checked_pixels(tensors)
        else:
            import pyarrow.parquet as pq

            table = pq.read_table(path)
            metadata = {name.decode(): text.decode() for name, text in (table.schema.metadata or {}).items()}
            images = _checked_index(table)
            labels = torch.tensor(images["label"].to_numpy(), dtype=torch.int64)
        classes, mean, std = _checked_description(metadata)
        if not 0 <= int(labels.min()) <= int(labels.max()) < len(classes):
            raise InvalidArtifact(f"holds a label that is none of 0 to {len(classes) - 1}, its classes")
        if stated and classes != stated:
            raise InvalidArtifact(f"holds other classes than {names}")
        if isinstance(images, Tensor):
            return PackedSplit(images, labels, classes, mean, std), metadata
        # Files of pixels say no split: theirs can be told by their numbers of images, which are known.
        if metadata.get("split") != split or metadata.get("orientation") not in ORIENTATIONS:
            raise InvalidArtifact(f"is no index of {split}ing images, or one of an older version")
        split_of_files = IndexedSplit(images, root or Path(), metadata["orientation"], labels, classes, mean, std)
    if root is None or not root.is_dir():
        raise InvalidParameter(f"{path} names files below {root}, which is no folder; {WHERE}")
    return split_of_files, metadata


def _checked_pixels(tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Images and labels of a packed split. Raises InvalidArtifact."""
    images, labels = (tensors.get(name, torch.empty(0)) for name in ("images", "labels"))
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3) or not images.numel():
        raise InvalidArtifact(f"holds images {list(images.shape)}, {images.dtype}, and not uint8 [N, 1 or 3, H, W]")
    if labels.dtype != torch.int64 or list(labels.shape) != [len(images)]:
        raise InvalidArtifact(
            f"holds labels {list(labels.shape)}, {labels.dtype}, and not int64 [{len(images)}], one per image"
        )
    return images, labels


def _checked_index(index: Any) -> pd.DataFrame:
    """The index of a split's files, from its Arrow table. Raises InvalidArtifact."""
    import pyarrow as pa
    import pyarrow.compute as pc

    index.validate(full=True)  # damaged texts would come to light only where one is used
    if index.column_names != COLUMNS or not len(index):
        raise InvalidArtifact(f"must have rows, and the columns {', '.join(COLUMNS)}")
    for name in COLUMNS:
        kind, text = index[name].type, name in ("path", "sha256")
        fits = pa.types.is_string(kind) or pa.types.is_large_string(kind) if text else pa.types.is_int64(kind)
        if not fits or index[name].null_count:
            raise InvalidArtifact(f"must hold {'texts' if text else 'whole numbers'} as {name}")
    if any(pc.min(index[name]).as_py() < 1 for name in ("width", "height", "bytes")):
        raise InvalidArtifact("holds an image without a size")
    if not pc.all(pc.match_substring_regex(index["sha256"], "^([0-9a-f]{64})?$")).as_py():
        raise InvalidArtifact("holds a sha256 that is none")
    outside = pc.any(pc.match_substring_regex(index["path"], OUTSIDE)).as_py()
    if outside or pc.count_distinct(index["path"]).as_py() < len(index):
        raise InvalidArtifact("holds a path twice, or one that leads out of the data set")
    return index.to_pandas()


def _checked_description(metadata: Mapping[str, Any]) -> tuple[list[str], list[float], list[float]]:
    """Classes, mean and standard deviation, as a split's file states them. Raises InvalidArtifact."""
    if missing := [name for name in ("source", "classes", "mean", "std") if not isinstance(metadata.get(name), str)]:
        raise InvalidArtifact(f"does not state its {', '.join(missing)}")
    classes, mean, std = (parse_json(metadata[name]) for name in ("classes", "mean", "std"))
    if problem := misnamed(classes):
        raise InvalidArtifact(f"has bad class names: {problem}")
    for name, values in (("mean", mean), ("std", std)):
        numbers = isinstance(values, list) and len(values) == 3 and all(type(value) in (int, float) for value in values)
        if not numbers or not all(0 <= value <= 1 for value in values) or (name == "std" and not all(values)):
            raise InvalidArtifact(f"states as its {name} {printable(str(values), 60)}, and not three numbers from 0 to 1")
    return classes, mean, std


def data_root(source: str, folder: str | None, repository: Path) -> Path | None:
    """The folder that holds a data set's own files; None for a source without files. Raises InvalidParameter.

    It is `folder` (from the repository's root) where that is given, else TEXTGUARD_DATA/SOURCE where that is set, else, for a
    data set that can be downloaded, data/downloads/SOURCE of the repository. What git does not know is not in the copy of a
    repository in which DVC runs an experiment: it is read from where the copy was made.
    """
    if is_own(source):
        if folder:
            raise InvalidParameter(f"params.yaml datasets.*.folder must be empty: {source} knows where its images lie")
        return None
    if source not in SOURCES:
        raise UnknownName("data set", source, [*SOURCES, "module:PACKAGE.FILE:NAME"], OWN_WHERE)
    if folder:
        return beside_copy(repository / expanded(folder, "params.yaml datasets.*.folder"))
    if SOURCES[source].files == "none":
        return None
    if shared := os.environ.get("TEXTGUARD_DATA"):
        return beside_copy(expanded(shared, "TEXTGUARD_DATA in the environment") / source)
    if SOURCES[source].files == "local":
        raise InvalidParameter(f"data set {source!r} cannot be downloaded; {WHERE}; it must hold {SOURCES[source].layout}")
    return lasting(repository / DOWNLOADS / source)


@dataclass(frozen=True)
class Part:
    """Images and labels, int64 [N]. images: pixels, uint8 [N, 1 or 3, H, W], or paths below the data set's root, str [N]."""

    images: Tensor | np.ndarray
    labels: np.ndarray

    @property
    def packed(self) -> bool:
        """Whether `images` holds pixels, and not paths."""
        return isinstance(self.images, Tensor)


@dataclass(frozen=True)
class Content:
    """A data set as its files hold it.

    parts: `train` and `test`, or `all`. mean, std: the published ones; with None, those of the training images are used.
    """

    parts: dict[str, Part]
    classes: list[str]
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None


def _digits(root: Path | None) -> Content:
    """1,797 handwritten digits, 8 x 8 with 17 grey levels, that ship with scikit-learn (Alpaydin and Kaynak, UCI, 1998)."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    grey = (torch.from_numpy(digits.images)[:, None] * (255 / 16)).round().to(torch.uint8)
    classes = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    return Content({"all": Part(grey, digits.target.astype(np.int64))}, classes)


def _torchvision(name: str, root: Path) -> dict[str, Dataset]:
    """Both splits of one of torchvision's data sets."""
    import_torchvision()
    from torchvision import datasets

    kind = getattr(datasets, name)
    if name == "STL10":
        return {split: kind(root, split=split) for split in SPLITS}
    return {split: kind(root, train=split == "train") for split in SPLITS}


def _cifar(name: str, root: Path) -> Content:
    """32 x 32 pixels (Krizhevsky, 2009). The files are pickles: torchvision opens none but those with the published MD5."""
    mean, std = {
        "CIFAR10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
        "CIFAR100": ((0.5071, 0.4866, 0.4409), (0.2673, 0.2564, 0.2762)),
    }[name]
    splits = _torchvision(name, root)
    parts = {
        split: Part(torch.from_numpy(found.data).permute(0, 3, 1, 2), np.array(found.targets, np.int64))
        for split, found in splits.items()
    }
    return Content(parts, [spoken(folder) for folder in splits["train"].classes], mean, std)


def _stl10(root: Path) -> Content:
    """96 x 96 pixels, 5,000 labelled for training and 8,000 for testing (Coates, Ng and Lee, AISTATS 2011)."""
    splits = _torchvision("STL10", root)
    parts = {
        split: Part(torch.from_numpy(np.ascontiguousarray(found.data)), found.labels.astype(np.int64))
        for split, found in splits.items()
    }
    return Content(parts, splits["train"].classes, (0.4469, 0.4400, 0.4068), (0.2184, 0.2157, 0.2182))


FASHION_FILES = [f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]
FASHION_CLASSES = [
    "t-shirt or top",
    "pair of trousers",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
]


def _fashion_mnist(root: Path) -> Content:
    """28 x 28 grey pixels (Xiao, Rasul and Vollgraf, 2017), from torchvision's download or Debian's dataset-fashion-mnist."""
    raw = next((path for path in (root / "FashionMNIST" / "raw", root / "raw") if path.is_dir()), root)
    with TemporaryDirectory() as folder:  # torchvision wants them unpacked, and `root` may be read-only
        there = Path(folder) / "FashionMNIST" / "raw"
        there.mkdir(parents=True)
        for name in FASHION_FILES:
            if (raw / name).is_file():
                (there / name).symlink_to((raw / name).resolve())
            elif (raw / f"{name}.gz").is_file():
                with gzip.open(raw / f"{name}.gz") as packed, (there / name).open("wb") as file:
                    shutil.copyfileobj(packed, file)
        splits = _torchvision("FashionMNIST", Path(folder))
        parts = {split: Part(found.data[:, None].clone(), found.targets.numpy()) for split, found in splits.items()}
    return Content(parts, FASHION_CLASSES)


def _food101(root: Path) -> Content:
    """750 photos per dish for training, 250 for testing, at most 512 pixels a side (Bossard et al., ECCV 2014)."""
    home = root / "food-101"
    listed = {split: read_json(home / "meta" / f"{split}.json", "") for split in SPLITS}
    folders = sorted(listed["train"])
    parts = {}
    for split, photos in listed.items():
        paths = [f"food-101/images/{photo}.jpg" for folder in folders for photo in photos[folder]]
        labels = np.repeat(np.arange(len(folders)), [len(photos[folder]) for folder in folders])
        parts[split] = Part(np.array(paths, object), labels)
    classes = [spoken(folder) for folder in folders]
    return Content(parts, classes, (0.5507, 0.4451, 0.3405), (0.2282, 0.2395, 0.2373))


def _imagenet(root: Path) -> Content:
    """ILSVRC 2012 (Russakovsky et al., IJCV 2015): train/WNID/*.JPEG and val/WNID/*.JPEG, labels in the order of the WNIDs."""
    import_torchvision()
    from timm.data import ImageNetInfo

    wnids, tree = ImageNetInfo().label_names(), ClassFolders(root)
    parts = {"train": _image_folder(tree, "train", wnids), "test": _image_folder(tree, "val", wnids)}
    return Content(parts, imagenet_classes(), IMAGENET_MEAN, IMAGENET_STD)


def imagenet_classes() -> list[str]:
    """ImageNet's 1,000 class names in the order of their WNIDs: OpenCLIP's, which are Radford et al.'s (2021).

    Two of these names stand for two classes each (`missile`, `sunglasses`). These classes get WordNet's first word instead.
    """
    import_torchvision()
    from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES as NAMES
    from timm.data import ImageNetInfo

    words = [words.split(",")[0] for words in ImageNetInfo().label_descriptions(detailed=False)]
    return [word if NAMES.count(name) > 1 else name for name, word in zip(NAMES, words, strict=True)]


# What people and exporters call the folders of the splits, in any case.
ROLES = {"train": ("train", "training"), "test": ("test", "testing"), "val": ("val", "valid", "validation")}


def _own_folder(root: Path) -> Content:
    """train/CLASS/* and test/CLASS/* (or val), or CLASS/* alone. classes.json may map folders to names."""
    tree = ClassFolders(root)
    top = tree.names()
    found = {role: [name for name in top if name.lower() in names] for role, names in ROLES.items()}
    testing = found["test"] or found["val"]
    if found["train"] and testing:
        if twice := next((names for names in found.values() if len(names) > 1), None):
            raise InvalidArtifact(f"{root} holds {' and '.join(twice)}, which mean the same; rename or remove one")
        (train,), (test,) = found["train"], testing
        if others := sorted(set(top) - {train, test}):
            announce(f"{shown(root)}: {test}/ holds the test images; not used: {printable(', '.join(others))}")
        folders = tree.names(train)
        parts = {"train": _image_folder(tree, train, folders), "test": _image_folder(tree, test, folders)}
    else:
        folders = top
        for folder in folders:
            if inner := tree.names(folder):
                raise InvalidArtifact(
                    f"{shown(root / folder)} holds folders ({printable(', '.join(inner), 60)}); a class must hold images; "
                    f"{root} must hold {SOURCES['folder'].layout}"
                )
        parts = {"all": _image_folder(tree, "", folders)}
    return Content(parts, _own_classes(root / "classes.json", folders), IMAGENET_MEAN, IMAGENET_STD)


def _own_classes(path: Path, folders: list[str]) -> list[str]:
    """The folders' names, as a person would say them or as the file has them. Raises InvalidArtifact."""
    names = {}
    if os.path.lexists(path):
        if not path.is_file():
            raise InvalidArtifact(f"{path} is no regular file; it must map folders to class names, or not be there")
        with reading(path, ""):
            names = parse_json(path.read_text(encoding="utf-8"))
    known = f"it must map folders ({printable(', '.join(folders), 60)}) to class names"
    if not isinstance(names, dict):
        raise InvalidArtifact(f"{path} holds a {type(names).__name__}; {known}")
    for folder, name in names.items():
        if folder not in folders:
            raise InvalidArtifact(f"{path} names {printable(ascii(folder), 60)}, which is no class folder; {known}")
        if not isinstance(name, str):
            said = printable(ascii(name), 60)
            raise InvalidArtifact(f"{path} gives {printable(folder, 60)!r} the name {said}; it must be one text, in quotes")
    return [names.get(folder, spoken(folder)) for folder in folders]


def spoken(folder: str) -> str:
    """A folder's name as a person would say it: `apple_pie` is "apple pie"."""
    return folder.replace("_", " ").strip()


def _image_folder(tree: ClassFolders, part: str, folders: list[str]) -> Part:
    """The images of root/part/CLASS. Raises InvalidArtifact where the class folders are others than `folders`."""
    where = tree.root / part
    found = tree.names(part) if where.is_dir() else []
    others: Counter[str] = Counter()
    if outside := sum(name.lower().endswith(EXTENSIONS) for name in os.listdir(where)) if where.is_dir() else 0:
        others["images outside of class folders"] = outside
    if found != sorted(folders):
        wrong = sorted(set(found) ^ set(folders))
        raise InvalidArtifact(
            f"{where} holds {len(found)} class folders{f' and {outside} images outside of them' if outside else ''}, not the "
            f"{len(folders)} that it must; it has no, or should have no: "
            f"{printable(', '.join(wrong[:5]))}{' ...' if len(wrong) > 5 else ''}"
        )
    tree.mark(part or ".")
    paths, labels, example = [], [], ""
    for label, folder in sorted(enumerate(folders), key=lambda entry: entry[1]):
        images, left_out, named = tree.images(part, folder)
        paths += images
        labels += [label] * len(images)
        others += left_out
        example = example or named
    announce_left_out(where, others, example)
    return Part(np.array(paths, object), np.array(labels, np.int64))


def is_own(source: str) -> bool:
    """Whether a data set comes from a function of the user's, as `module:PACKAGE.FILE:NAME`."""
    return source.startswith(modules.PREFIX)


OWN_WHERE = "params.yaml datasets.*.source"
OWN_RETURN = "it must return {'train': PART, 'test': PART, 'classes': [NAME, ...]}, or 'all' in place of train and test"
OWN_PART = "a part must be a tuple (images, labels), or a map-style data set of (image, label)"
OWN_PIXELS = "images must be uint8, or floats from 0 to 1, of 1 or 3 channels and one size"


def own_parts(source: str) -> tuple[dict[str, Any], list[str]]:
    """The parts that a user's function returns, as they are, and the class names. Raises InvalidParameter."""
    made, named = modules.find(source, OWN_WHERE), f"{source} in {OWN_WHERE}"
    if not callable(made):
        raise InvalidParameter(f"{named} is a {type(made).__name__}; it must be a function: {OWN_RETURN}")
    found = modules.call(made, named)
    if not isinstance(found, Mapping) or set(found) - {"classes"} not in ({"train", "test"}, {"all"}):
        keys = f" of {printable(', '.join(map(str, found)), 80) or 'nothing'}" if isinstance(found, Mapping) else ""
        raise InvalidParameter(f"{named} returns a {type(found).__name__}{keys}; {OWN_RETURN}")
    parts = {name: found[name] for name in ("train", "test", "all") if name in found}
    for name, part in parts.items():
        if not _is_pair(part) and not (hasattr(part, "__getitem__") and hasattr(part, "__len__")):
            raise InvalidParameter(f"{named} returns as {name!r} a {type(part).__name__}; {OWN_PART}")
    classes = found.get("classes", getattr(next(iter(parts.values())), "classes", None))
    classes = list(classes) if isinstance(classes, tuple) else classes
    if problem := misnamed(classes):
        raise InvalidParameter(f"{named} returns bad class names as 'classes': {problem}")
    return parts, classes


def _is_pair(part: Any) -> bool:
    return isinstance(part, tuple) and len(part) == 2 and all(hasattr(each, "__len__") for each in part)


def _own_content(source: str) -> Content:
    """What a user's function returns, as pixels. Raises InvalidParameter."""
    parts, classes = own_parts(source)
    made = {}
    for name, part in parts.items():
        named = f"{source} in {OWN_WHERE}, {name}"
        pair = part
        if not _is_pair(part):
            pairs = modules.call(lambda part=part: [part[index] for index in range(len(part))], named)
            if not all(isinstance(each, tuple | list) and len(each) == 2 for each in pairs):
                raise InvalidParameter(f"{named}: its items are no pairs; {OWN_PART}")
            pair = [image for image, _ in pairs], [label for _, label in pairs]
        labels = modules.call(lambda pair=pair: np.asarray(pair[1]), f"{named}: its labels")
        if labels.dtype.kind not in "iu" or labels.ndim != 1 or len(labels) != len(pair[0]) or not len(labels):
            raise InvalidParameter(
                f"{named} has labels {list(labels.shape)}, {labels.dtype}, for {len(pair[0])} images; each needs one whole "
                f"number, from 0 to {len(classes) - 1}"
            )
        if not 0 <= labels.min() <= labels.max() < len(classes):
            raise InvalidParameter(
                f"{named} has labels from {labels.min()} to {labels.max()}, and {len(classes)} classes; count from 0"
            )
        made[name] = Part(_own_pixels(pair[0], named), labels.astype(np.int64))
    return Content(made, classes)


def _own_pixels(images: Any, named: str) -> Tensor:
    """Images of a user's, as uint8 [N, 1 or 3, H, W]. Raises InvalidParameter."""
    try:
        found = np.asarray(images) if hasattr(images, "shape") else np.stack([np.asarray(image) for image in images])
    except Exception as error:  # of whatever the images are
        raise InvalidParameter(f"{named}: its images make no array ({printable(str(error))}); {OWN_PIXELS}") from error
    found = found[:, None] if found.ndim == 3 else found
    if found.ndim == 4 and found.shape[1] not in (1, 3) and found.shape[3] in (1, 3):
        found = found.transpose(0, 3, 1, 2)
    if found.ndim != 4 or found.shape[1] not in (1, 3) or not found.size or found.dtype.kind not in "uf":
        raise InvalidParameter(f"{named} has images {list(found.shape)}, {found.dtype}; {OWN_PIXELS}")
    if found.dtype.kind == "f":
        if not (found.min() >= 0 and found.max() <= 1):
            raise InvalidParameter(
                f"{named} has images with values from {found.min():.4g} to {found.max():.4g}; {OWN_PIXELS}, which are "
                "normalised later"
            )
        found = np.rint(found * 255)
    elif found.dtype != np.uint8:
        raise InvalidParameter(f"{named} has images of {found.dtype}; {OWN_PIXELS}")
    return torch.from_numpy(np.ascontiguousarray(found).astype(np.uint8, copy=True))


@dataclass(frozen=True)
class Source:
    """read: its content from a root. files: `none`, `local` (cannot be downloaded) or torchvision's class that downloads it.

    layout: what the root must hold.
    """

    read: Callable[[Path], Content]
    files: str
    layout: str


SOURCES = {
    "digits": Source(_digits, "none", "nothing"),
    "cifar10": Source(partial(_cifar, "CIFAR10"), "CIFAR10", "cifar-10-batches-py/"),
    "cifar100": Source(partial(_cifar, "CIFAR100"), "CIFAR100", "cifar-100-python/"),
    "stl10": Source(_stl10, "STL10", "stl10_binary/"),
    "fashion_mnist": Source(_fashion_mnist, "FashionMNIST", "train-images-idx3-ubyte.gz and its three companions"),
    "food101": Source(_food101, "Food101", "food-101/images/ and food-101/meta/"),
    "imagenet": Source(_imagenet, "local", "train/WNID/*.JPEG and val/WNID/*.JPEG"),
    "folder": Source(_own_folder, "local", "train/CLASS/ and test/CLASS/ (or val, valid, validation), or CLASS/ alone"),
}
# Images for training, images for testing and classes, as published: for plans made before the data set is there.
STANDARD_SIZES = {
    "digits": (1797, 0, 10),  # all in one
    "cifar10": (50_000, 10_000, 10),
    "cifar100": (50_000, 10_000, 100),
    "stl10": (5_000, 8_000, 10),
    "fashion_mnist": (60_000, 10_000, 10),
    "food101": (75_750, 25_250, 101),
    "imagenet": (1_281_167, 50_000, 1000),
}
WHERE = "name its folder in params.yaml datasets.*.folder, or put it into SOURCE/ of a folder that TEXTGUARD_DATA names"


def expected_sizes(source: str, *, test_share: float, limit_train: int, limit_test: int) -> tuple[int, int, int]:
    """Training images, test images and classes that a data set will have: a standard one, unread, or a user's own.

    Raises UnknownName for others, InvalidParameter where the user's function fails.
    """
    if is_own(source):
        parts, names = own_parts(source)
        sizes = {name: len(part[1] if _is_pair(part) else part) for name, part in parts.items()}
        train, test, classes = sizes.get("train", sizes.get("all")), sizes.get("test", 0), len(names)
    elif source in STANDARD_SIZES:
        train, test, classes = STANDARD_SIZES[source]
    else:
        raise UnknownName("data set of known size", source, STANDARD_SIZES, "params.yaml datasets.*.source")
    if not test:
        train, test = (whole := train) - math.ceil(whole * test_share), math.ceil(whole * test_share)
    return limit_train or train, limit_test or test, classes


def read_source(source: str, root: Path | None) -> Content:
    """Read a data set. One that belongs in data/downloads and is missing there is downloaded first.

    Raises InvalidArtifact for files that are missing or damaged, InvalidParameter for a folder that does not exist, and for
    what is wrong with a user's own.
    """
    if is_own(source):
        return _own_content(source)
    known = SOURCES[source]
    if root and not root.is_dir():
        if known.files == "local" or root.parts[-3:] != (*DOWNLOADS.parts, source):
            raise InvalidParameter(f"data set {source!r}: {root} is no folder; {WHERE}; it must hold {known.layout}")
        _download(source, known.files, root)
    try:
        content = known.read(root)
        for name, part in content.parts.items():
            if not len(part.images) == len(part.labels) > 0 or not 0 <= part.labels.min() <= part.labels.max() < len(
                content.classes
            ):
                raise ValueError(
                    f"{name}: {len(part.images)} images, {len(part.labels)} labels of {len(content.classes)} classes"
                )
            if not part.packed:
                _check_paths(part.images)
    except TextguardError:
        raise
    except Exception as error:  # torchvision and the libraries that unpack have errors of their own
        why = printable(str(error), 400)
        raise InvalidArtifact(f"{root} is no {source} ({why}); it must hold {known.layout}, complete") from error
    if problem := misnamed(content.classes):
        rename = f"rename the folder, or give it a name in {root / 'classes.json'}; " if source == "folder" else ""
        raise InvalidArtifact(f"{source} in {root} has bad class names: {problem}; {rename}it must hold {known.layout}")
    return content


def _check_paths(paths: np.ndarray) -> None:
    """Raises ValueError for a path that no index takes: data sets list their files, and such a list may hold anything."""
    if bad := next((path for path in paths if re.search(OUTSIDE, path) or not _is_text(path)), None):
        raise ValueError(f"{ascii(bad)[:80]} is listed, which is no path below it")
    if len(set(paths)) < len(paths):
        raise ValueError(f"{Counter(paths).most_common(1)[0][0]} is listed twice")


def _is_text(path: str) -> bool:
    return path.encode(errors="replace").decode() == path


def _download(source: str, name: str, root: Path) -> None:
    """Download with torchvision, which compares MD5s. The folder gets its name when it is complete."""
    import_torchvision()
    from torchvision import datasets

    partial_root = root.with_name(f".{source}.partial")
    with locked(root.with_name(f".{source}.lock"), f"download of {source}"):
        if root.is_dir():
            return
        shutil.rmtree(partial_root, ignore_errors=True)
        announce(f"data {source}: downloading to {root}")
        try:
            getattr(datasets, name)(partial_root, download=True)
        except (OSError, RuntimeError) as error:
            raise InvalidArtifact(f"data set {source!r} cannot be downloaded ({error}); {WHERE}") from error
        partial_root.replace(root)


def make_splits(
    content: Content, source: str, *, test_share: float, split_seed: int, limit_train: int, limit_test: int
) -> dict[str, Part]:
    """Training and test images: the published split, or one that is drawn from all images, stratified by class.

    limit_train, limit_test: keep that many images of each split, stratified; 0 keeps all. Raises InvalidParameter for a split
    or limit that leaves a class without an image.
    """
    from sklearn.model_selection import train_test_split

    def choose(labels: np.ndarray, rows: np.ndarray, count: int | float) -> tuple[np.ndarray, np.ndarray]:
        try:
            return tuple(train_test_split(rows, train_size=count, stratify=labels[rows], random_state=split_seed))
        except ValueError as error:
            raise InvalidParameter(f"{source} cannot be split as params.yaml datasets asks: {error}") from error

    rows = {name: np.arange(len(part.labels)) for name, part in content.parts.items()}
    parts = content.parts
    if "all" in parts:
        parts = dict.fromkeys(SPLITS, parts["all"])
        rows = dict(zip(SPLITS, choose(parts["train"].labels, rows["all"], 1 - test_share), strict=True))
    splits = {}
    for (name, part), limit in zip(parts.items(), (limit_train, limit_test), strict=True):
        some = limit and limit != len(rows[name])
        kept = np.sort(choose(part.labels, rows[name], limit)[0] if some else rows[name])
        if lost := sorted(set(part.labels) - set(part.labels[kept])):
            raise InvalidParameter(
                f"{source} cannot be split as params.yaml datasets asks: no {name}ing image of {content.classes[lost[0]]!r} "
                f"(and {len(lost) - 1} other classes) would be left; change test_share or the limits, or add images"
            )
        splits[name] = Part(part.images[kept], part.labels[kept])
    return splits


def save_splits(
    folder: Path,
    content: Content,
    splits: Mapping[str, Part],
    root: Path | None,
    *,
    source: str,
    checksum: bool,
    corrupt_share: float,
    orientation: str,
) -> None:
    """Write train/, test/ and classes.json below data/DATASET.

    checksum: whether an index keeps the SHA-256 of its files. orientation: see image_files.decode. Raises InvalidArtifact where
    too many images are unreadable, and where a split that is drawn here has the same image on both sides.
    """
    tables = {
        name: index_files(part, root, corrupt_share=corrupt_share, orientation=orientation, label=f"data {folder.name} {name}")
        for name, part in splits.items()
        if not part.packed
    }
    if tables:
        _compare(tables, root, drawn="all" in content.parts, label=f"data {folder.name}")
    mean, std = content.mean, content.std
    if mean is None:
        pixels = splits["train"].images.double() / 255
        mean, std = (values.expand(3).tolist() for values in (pixels.mean(dim=(0, 2, 3)), pixels.std(dim=(0, 2, 3))))
    described = {"mean": json.dumps(mean), "std": json.dumps(std), "classes": json.dumps(content.classes), "source": source}
    for name, part in splits.items():
        if part.packed:
            tensors = {"images": part.images, "labels": torch.from_numpy(part.labels)}
            write_safetensors(folder / name / PACKED, tensors, described | ({"split": name} if is_own(source) else {}))
        else:
            table = tables[name] if checksum else tables[name].assign(sha256="")
            write_parquet(folder / name / INDEX, table, described | {"split": name, "orientation": orientation})
        (folder / name / (INDEX if part.packed else PACKED)).unlink(missing_ok=True)
    write_json(folder / "classes.json", content.classes)


def _compare(tables: Mapping[str, pd.DataFrame], root: Path, *, drawn: bool, label: str) -> None:
    """Find images that both splits hold, byte for byte. Raises InvalidArtifact where the split was drawn here.

    A split that comes with the data set is taken as it is, as others take it, and what it shares is announced.
    """
    first = dict(zip(tables["train"]["sha256"], tables["train"]["path"], strict=True))
    both = tables["test"][tables["test"]["sha256"].isin(first.keys())]
    if both.empty:
        return
    path, checksum = both.iloc[0][["path", "sha256"]]
    said = (
        f"{label}: {len(both)} of the test images are training images as well, byte for byte (as {printable(path)} and "
        f"{printable(first[checksum])})"
    )
    if drawn:
        raise InvalidArtifact(f"{said}; remove the copies below {root}, or split the images into train/ and test/ yourself")
    announce(f"{said}; they are kept")


def index_files(part: Part, root: Path, *, corrupt_share: float, orientation: str, label: str) -> pd.DataFrame:
    """Open every image and list them: path, label, width, height (pixels), bytes, sha256.

    Images that PIL cannot read to their end are named and left out. Raises InvalidArtifact for more than `corrupt_share` of
    them, and where a class is left without any.
    """
    look, processes = partial(_look, root, orientation), max(1, loading_processes())
    found = []
    with ProcessPoolExecutor(processes) as pool:
        results = pool.map(look, part.images, chunksize=64)
        # The bar comes after the start of the processes, because they would copy the locks of the bar's thread.
        with progress(total=len(part.images), label=label, unit="img") as bar:
            try:
                for result in results:
                    found.append(result)
                    bar.update(1)
            except BrokenProcessPool as error:
                raise InvalidArtifact(
                    f"{label}: a process that reads images was killed, maybe for want of memory, soon after it began with "
                    f"{root / part.images[len(found)]}; remove the image that did it, or lower TEXTGUARD_WORKERS"
                ) from error
    table = pd.DataFrame(found, columns=["width", "height", "bytes", "sha256", "problem", *ODDITIES])
    table.insert(0, "path", part.images)
    table.insert(1, "label", part.labels)
    bad = table[table["problem"] != ""]
    if len(bad):
        named = "; ".join(
            f"{printable(path)}: {problem}" for path, problem in bad[["path", "problem"]].head(5).itertuples(index=False)
        )
        said = f"{label}: {len(bad)} of {len(table)} images below {root} are corrupt ({named}{'; ...' if len(bad) > 5 else ''})"
        if len(bad) > corrupt_share * len(table):
            raise InvalidArtifact(f"{said}; replace them, or raise params.yaml datasets.*.corrupt_share")
        announce(f"{said}; left out")
    table = table[table["problem"] == ""].reset_index(drop=True)
    if empty := set(part.labels) - set(table["label"]):
        raise InvalidArtifact(f"{label}: no image of {len(empty)} classes can be read; replace the files below {root}")
    for oddity, said in ODDITIES.items():
        if (count := int(table[oddity].sum())) > 0:
            announce(f"{label}: {count} of {len(table)} images {said} (as {printable(table['path'][table[oddity].idxmax()])})")
    return table[COLUMNS]


COLUMNS = ["path", "label", "width", "height", "bytes", "sha256"]
# See image_files.Decoded.
ODDITIES = {
    "turned": "are to be turned, says their EXIF, and are not; datasets.*.orientation: exif in params.yaml turns them",
    "transparent": "have transparent pixels, whose colours are used",
    "deep": "have 16 bits per channel, of which the upper 8 are used",
}


def _look(root: Path, orientation: str, path: str) -> tuple[int, int, int, str, str, bool, bool, bool]:
    """Width, height, bytes, SHA-256, what is wrong with the image, if anything, and its oddities."""
    try:
        content = read_regular(root / path)
        found = decode(content, orientation, small=True)
    except Exception as error:
        return 0, 0, 0, "", reason(error), False, False, False
    oddities = found.turned, found.transparent, found.deep
    return *found.size, len(content), hashlib.sha256(content).hexdigest(), "", *oddities
