"""Image classification data sets: where they come from, their splits, and how one picture is read.

Small data sets are packed: all images of a split in one safetensors file, at their own size. Large ones stay where they are: a
split is then an index of their files, in Parquet. Nothing is resized or normalised here; `textguard.vision.transforms` does.
"""

import gzip
import hashlib
import io
import json
import math
import os
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pandas as pd
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from textguard.artifacts import (
    expanded,
    locked,
    parse_json,
    read_json,
    read_safetensors,
    reading,
    write_json,
    write_parquet,
    write_safetensors,
)
from textguard.errors import InvalidArtifact, InvalidParameter, TextguardError, UnknownName, UnreadableImage, printable
from textguard.runtime import announce, import_torchvision, loading_processes, progress

SPLITS = ("train", "test")
DOWNLOADS = Path("data") / "downloads"
PACKED, INDEX = "images.safetensors", "index.parquet"
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Split(Dataset):
    """One split, as a map-style data set of raw images: split[i] is (uint8 [3, H, W], label).

    labels: int64 [N]. classes: C names a language model can read. mean, std: of the three channels, for values from 0 to 1.
    """

    def __init__(self, labels: Tensor, classes: list[str], mean: list[float], std: list[float]) -> None:
        self.labels, self.classes, self.mean, self.std = labels, classes, mean, std

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        raise NotImplementedError


class PackedSplit(Split):
    """A split whose images lie in memory: uint8 [N, 1 or 3, H, W]."""

    def __init__(self, images: Tensor, *described: object) -> None:
        super().__init__(*described)
        self.images = images

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index].expand(3, -1, -1), int(self.labels[index])


class IndexedSplit(Split):
    """A split whose images are files below `root`, decoded when they are asked for."""

    def __init__(self, index: pd.DataFrame, root: Path, *described: object) -> None:
        super().__init__(*described)
        # Arrays of Arrow and numpy, because a list's objects would be copied one by one to every process that loads images.
        self.paths, self.checksums = (index[name].astype("string[pyarrow]").array for name in ("path", "sha256"))
        self.sizes, self.root = index["bytes"].to_numpy(), root

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path, checksum = self.root / self.paths[index], self.checksums[index]
        try:
            content = path.read_bytes()
            if len(content) != self.sizes[index] or (checksum and hashlib.sha256(content).hexdigest() != checksum):
                raise ValueError("it is not the file that the index was made from")
            pixels = np.array(Image.open(io.BytesIO(content)).convert("RGB"))
        except Exception as error:
            raise UnreadableImage(f"{path} cannot be read ({error}); put it back, or run stage 'data' again") from error
        return torch.from_numpy(pixels).permute(2, 0, 1), int(self.labels[index])


def split_file(folder: Path, split: str) -> Path:
    """The file of data/DATASET/SPLIT that holds its images or their index."""
    index = folder / split / INDEX
    return index if index.exists() else folder / split / PACKED


def load_split(folder: Path, split: str, root: Path | None) -> Split:
    """Read one split from data/DATASET. root: where the indexed files lie (see `data_root`). Raises InvalidArtifact."""
    path = split_file(folder, split)
    with reading(path, "data"):
        if path.name == PACKED:
            tensors, metadata = read_safetensors(path, "data")
            images, labels = tensors["images"], tensors["labels"]
        else:
            import pyarrow.parquet as pq

            table = pq.read_table(path)
            metadata = {name.decode(): text.decode() for name, text in table.schema.metadata.items()}
            images = table.to_pandas()
            labels = torch.tensor(images["label"].to_numpy(), dtype=torch.int64)
        described = (labels, *(parse_json(metadata[name]) for name in ("classes", "mean", "std")))
        if isinstance(images, Tensor):
            return PackedSplit(images, *described)
        split_of_files = IndexedSplit(images, root or Path(), *described)
    if root is None or not root.is_dir():
        raise InvalidParameter(f"{path} names files below {root}, which is no folder; {WHERE}")
    return split_of_files


def data_root(source: str, folder: str | None, repository: Path) -> Path | None:
    """The folder that holds a data set's own files; None for a source without files. Raises InvalidParameter.

    It is `folder` (from the repository's root) where that is given, else TEXTGUARD_DATA/SOURCE where that is set, else, for a
    data set that can be downloaded, data/downloads/SOURCE of the repository.
    """
    if source not in SOURCES:
        raise UnknownName("data set", source, SOURCES, "params.yaml datasets.*.source")
    if folder:
        return repository / expanded(folder, "params.yaml datasets.*.folder")
    if SOURCES[source].files == "none":
        return None
    if shared := os.environ.get("TEXTGUARD_DATA"):
        return expanded(shared, "TEXTGUARD_DATA in the environment") / source
    if SOURCES[source].files == "local":
        raise InvalidParameter(f"data set {source!r} cannot be downloaded; {WHERE}; it must hold {SOURCES[source].layout}")
    return repository / DOWNLOADS / source


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

    wnids = ImageNetInfo().label_names()
    parts = {"train": _image_folder(root, "train", wnids), "test": _image_folder(root, "val", wnids)}
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


def _own_folder(root: Path) -> Content:
    """train/CLASS/* and test/CLASS/* (or val), or CLASS/* alone. classes.json may map folders to names."""
    test = next((name for name in ("test", "val") if (root / name).is_dir()), None)
    if test and (root / "train").is_dir():
        folders = _class_folders(root / "train")
        parts = {"train": _image_folder(root, "train", folders), "test": _image_folder(root, test, folders)}
    else:
        folders = _class_folders(root)
        parts = {"all": _image_folder(root, "", folders)}
    names = read_json(root / "classes.json", "") if (root / "classes.json").exists() else {}
    if not isinstance(names, dict) or not names.keys() <= set(folders):
        raise InvalidArtifact(f"{root / 'classes.json'} must map folders ({', '.join(folders[:3])}, ...) to class names")
    return Content(parts, [names.get(folder, spoken(folder)) for folder in folders], IMAGENET_MEAN, IMAGENET_STD)


def spoken(folder: str) -> str:
    """A folder's name as a person would say it: `apple_pie` is "apple pie"."""
    return folder.replace("_", " ").strip()


def _class_folders(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _image_folder(root: Path, part: str, folders: list[str]) -> Part:
    """The images of root/part/CLASS. Raises InvalidArtifact where the class folders are others than `folders`."""
    import_torchvision()
    from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset

    where = root / part
    found = _class_folders(where) if where.is_dir() else []
    if found != sorted(folders):
        wrong = sorted(set(found) ^ set(folders))
        raise InvalidArtifact(
            f"{where} holds {len(found)} class folders, not the {len(folders)} that it must; it has no, or should have no: "
            f"{', '.join(wrong[:5])}{' ...' if len(wrong) > 5 else ''}"
        )
    labels = {folder: label for label, folder in enumerate(folders)}
    samples = make_dataset(where, labels, IMG_EXTENSIONS)
    paths = [Path(path).relative_to(root).as_posix() for path, _ in samples]
    return Part(np.array(paths, object), np.array([label for _, label in samples], np.int64))


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
    "folder": Source(_own_folder, "local", "train/CLASS/ and test/CLASS/ (or val), or CLASS/ alone"),
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
    """Training images, test images and classes that a standard data set will have, without reading it. Raises UnknownName."""
    if source not in STANDARD_SIZES:
        raise UnknownName("data set of known size", source, STANDARD_SIZES, "params.yaml datasets.*.source")
    train, test, classes = STANDARD_SIZES[source]
    if not test:
        train, test = (whole := train) - math.ceil(whole * test_share), math.ceil(whole * test_share)
    return limit_train or train, limit_test or test, classes


def read_source(source: str, root: Path | None) -> Content:
    """Read a data set. One that belongs in data/downloads and is missing there is downloaded first.

    Raises InvalidArtifact for files that are missing or damaged, InvalidParameter for a folder that does not exist.
    """
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
    except TextguardError:
        raise
    except Exception as error:  # torchvision and the libraries that unpack have errors of their own
        raise InvalidArtifact(f"{root} is no {source} ({error}); it must hold {known.layout}, complete") from error
    if len(set(content.classes)) < max(2, len(content.classes)) or not all(content.classes):
        twice = sorted({name for name in content.classes if content.classes.count(name) > 1})
        raise InvalidArtifact(f"{source} in {root} needs two or more classes with different names; more than once: {twice}")
    return content


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
        kept = np.sort(choose(part.labels, rows[name], limit)[0] if limit else rows[name])
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
) -> None:
    """Write train/, test/ and classes.json below data/DATASET. Raises InvalidArtifact where too many images are unreadable."""
    tables = {
        name: index_files(part, root, checksum=checksum, corrupt_share=corrupt_share, label=f"data {folder.name} {name}")
        for name, part in splits.items()
        if not part.packed
    }
    mean, std = content.mean, content.std
    if mean is None:
        pixels = splits["train"].images.double() / 255
        mean, std = (values.expand(3).tolist() for values in (pixels.mean(dim=(0, 2, 3)), pixels.std(dim=(0, 2, 3))))
    described = {"mean": json.dumps(mean), "std": json.dumps(std), "classes": json.dumps(content.classes), "source": source}
    for name, part in splits.items():
        if part.packed:
            tensors = {"images": part.images, "labels": torch.from_numpy(part.labels)}
            write_safetensors(folder / name / PACKED, tensors, described)
        else:
            write_parquet(folder / name / INDEX, tables[name], described)
        (folder / name / (INDEX if part.packed else PACKED)).unlink(missing_ok=True)
    write_json(folder / "classes.json", content.classes)


def index_files(part: Part, root: Path, *, checksum: bool, corrupt_share: float, label: str) -> pd.DataFrame:
    """Open every image and list them: path, label, width, height (pixels), bytes, sha256 (empty without `checksum`).

    Images that PIL cannot read to their end are named and left out. Raises InvalidArtifact for more than `corrupt_share` of
    them, and where a class is left without any.
    """
    look, processes = partial(_look, root, checksum), max(1, loading_processes())
    found = []
    with ProcessPoolExecutor(processes) as pool:
        results = pool.map(look, part.images, chunksize=64)
        # The bar comes after the start of the processes, because they would copy the locks of the bar's thread.
        with progress(total=len(part.images), label=label, unit="img") as bar:
            for result in results:
                found.append(result)
                bar.update(1)
    table = pd.DataFrame(found, columns=["width", "height", "bytes", "sha256", "problem"])
    table.insert(0, "path", part.images)
    table.insert(1, "label", part.labels)
    bad = table[table["problem"] != ""]
    if len(bad):
        named = "; ".join(f"{path}: {problem}" for path, problem in bad[["path", "problem"]].head(5).itertuples(index=False))
        said = f"{label}: {len(bad)} of {len(table)} images below {root} are corrupt ({named}{'; ...' if len(bad) > 5 else ''})"
        if len(bad) > corrupt_share * len(table):
            raise InvalidArtifact(f"{said}; replace them, or raise params.yaml datasets.*.corrupt_share")
        announce(f"{said}; left out")
    table = table[table["problem"] == ""].drop(columns="problem").reset_index(drop=True)
    if empty := set(part.labels) - set(table["label"]):
        raise InvalidArtifact(f"{label}: no image of {len(empty)} classes can be read; replace the files below {root}")
    return table


def _look(root: Path, checksum: bool, path: str) -> tuple[int, int, int, str, str]:
    """Width, height, bytes, SHA-256 or "", and what is wrong with the image, if anything."""
    try:
        content = (root / path).read_bytes()
        image = Image.open(io.BytesIO(content))
        width, height = image.size
        image.draft("RGB", (1, 1))  # a JPEG is read to its end, but decoded at an eighth of its size
        image.load()
    except Exception as error:
        return 0, 0, 0, "", printable(f"{type(error).__name__}: {error}", 100)
    return width, height, len(content), hashlib.sha256(content).hexdigest() if checksum else "", ""
