"""Data sets: each one's own format on the disk, read by the real loaders; splits, indexes, and what is refused."""

import functools
import gzip
import hashlib
import http.server
import importlib
import json
import pickle
import shutil
import tarfile
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from dvc.utils.serialize import load_yaml
from PIL import Image

from conftest import REPOSITORY
from textguard.artifacts import read_classes
from textguard.errors import InvalidArtifact, InvalidParameter, UnknownName, UnreadableImage
from textguard.params import load_params
from textguard.runtime import import_torchvision
from textguard.vision.datasets import (
    SOURCES,
    Split,
    data_root,
    imagenet_classes,
    load_split,
    make_splits,
    read_source,
    save_splits,
    split_file,
)
from textguard.vision.transforms import evaluation_view, image_loader

import_torchvision()
from torchvision import datasets  # noqa: E402 (as import_torchvision imports it)

SPLIT = {"test_share": 0.2, "split_seed": 0, "limit_train": 0, "limit_test": 0}
CHECKS = {"checksum": False, "corrupt_share": 0.0, "orientation": "stored"}


def store(folder: Path, source: str, root: Path | None, **options: object) -> tuple[Split, Split]:
    """What the data stage does, and both splits as later stages get them."""
    split = {name: options.get(name, value) for name, value in SPLIT.items()}
    content = read_source(source, root)
    checks = {name: options.get(name, value) for name, value in CHECKS.items()}
    save_splits(folder, content, make_splits(content, source, **split), root, source=source, **checks)
    return load_split(folder, "train", root), load_split(folder, "test", root)


def pixels(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


def write_jpeg(path: Path, seed: int = 0, size: tuple[int, int] = (24, 20)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels(size[1], size[0], 3, seed=seed)).save(path, "JPEG")


# Each writes a small data set in its format below a folder, and returns the images [N, C, H, W] and labels of both splits.


def write_cifar(name: str, root: Path, patch: pytest.MonkeyPatch) -> dict[str, tuple[np.ndarray, list[int]]]:
    kind = getattr(datasets, name)
    home = root / kind.base_folder
    home.mkdir(parents=True)
    names = [f"class_{number}" for number in range(4)]
    lists, expected = {}, {}
    for split, files in (("train", [file for file, _ in kind.train_list]), ("test", [file for file, _ in kind.test_list])):
        images = [pixels(4, 3, 32, 32, seed=len(split) + number) for number in range(len(files))]
        for file, part in zip(files, images, strict=True):
            key = "labels" if name == "CIFAR10" else "fine_labels"
            (home / file).write_bytes(pickle.dumps({"data": part.reshape(4, -1), key: [3, 2, 1, 0]}, protocol=2))
        lists[split] = [[file, md5(home / file)] for file in files]
        expected[split] = (np.concatenate(images), [3, 2, 1, 0] * len(files))
    key = kind.meta["key"]
    (home / kind.meta["filename"]).write_bytes(pickle.dumps({key: names}, protocol=2))
    # torchvision opens no file with another MD5 than that of the published one: the table is changed, the check stays.
    patch.setattr(kind, "train_list", lists["train"])
    patch.setattr(kind, "test_list", lists["test"])
    patch.setattr(kind, "meta", {**kind.meta, "md5": md5(home / kind.meta["filename"])})
    return expected


def write_stl10(root: Path, patch: pytest.MonkeyPatch) -> dict[str, tuple[np.ndarray, list[int]]]:
    home = root / "stl10_binary"
    home.mkdir(parents=True)
    expected = {}
    for split, count in (("train", 6), ("test", 3)):
        images, labels = pixels(count, 3, 96, 96, seed=count), [number % 3 for number in range(count)]
        images.transpose(0, 1, 3, 2).tofile(home / f"{split}_X.bin")  # column by column, as Matlab has it
        (np.array(labels, np.uint8) + 1).tofile(home / f"{split}_y.bin")
        expected[split] = (images, labels)
    pixels(1, 3, 96, 96).tofile(home / "unlabeled_X.bin")
    (home / "class_names.txt").write_text("airplane\nbird\ncar\n", encoding="utf-8")
    for listed in ("train_list", "test_list"):
        files = [file for file, _ in getattr(datasets.STL10, listed)]
        patch.setattr(datasets.STL10, listed, [[file, md5(home / file)] for file in files])
    return expected


def write_fashion(root: Path) -> dict[str, tuple[np.ndarray, list[int]]]:
    root.mkdir(parents=True)
    expected = {}
    for split, prefix, count in (("train", "train", 20), ("test", "t10k", 10)):
        images, labels = pixels(count, 28, 28, seed=count), [number % 10 for number in range(count)]
        shape = b"".join(size.to_bytes(4, "big") for size in images.shape)
        with gzip.open(root / f"{prefix}-images-idx3-ubyte.gz", "wb") as file:
            file.write(b"\0\0\x08\x03" + shape + images.tobytes())
        with gzip.open(root / f"{prefix}-labels-idx1-ubyte.gz", "wb") as file:
            file.write(b"\0\0\x08\x01" + count.to_bytes(4, "big") + bytes(labels))
        expected[split] = (images[:, None], labels)
    return expected


def write_food(root: Path) -> None:
    listed = {"train": {}, "test": {}}
    for number, dish in enumerate(("apple_pie", "hot_and_sour_soup")):
        for split, count in (("train", 3), ("test", 2)):
            photos = [f"{dish}/{1000 * number + photo + count}" for photo in range(count)]
            listed[split][dish] = photos
            for photo in photos:
                write_jpeg(root / "food-101" / "images" / f"{photo}.jpg", number)
    (root / "food-101" / "meta").mkdir()
    for split, photos in listed.items():
        (root / "food-101" / "meta" / f"{split}.json").write_text(json.dumps(photos), encoding="utf-8")


def write_folders(root: Path, parts: dict[str, int], folders: tuple[str, ...] = ("hot_dog", "no_hot_dog")) -> None:
    """root/PART/CLASS/NUMBER.jpg; parts: how many in each class."""
    for part, count in parts.items():
        for label, folder in enumerate(folders):
            for number in range(count):
                write_jpeg(root / part / folder / f"{number}.jpg", 10 * label + number, (16 + number, 20))


def same(split: Split, expected: tuple[np.ndarray, list[int]]) -> None:
    images, labels = expected
    assert split.labels.tolist() == labels
    for number, image in enumerate(images):
        found, label = split[number]
        assert found.dtype == torch.uint8
        assert label == labels[number]
        np.testing.assert_array_equal(found.numpy(), np.broadcast_to(image, (3, *image.shape[1:])))


@pytest.mark.parametrize("name", ["CIFAR10", "CIFAR100"])
def test_cifar_is_read_from_its_batches(name, tmp_path, monkeypatch):
    expected = write_cifar(name, tmp_path / "raw", monkeypatch)
    train, test = store(tmp_path / "data", name.lower(), tmp_path / "raw")
    same(train, expected["train"])
    same(test, expected["test"])
    assert train.classes == ["class 0", "class 1", "class 2", "class 3"]
    assert train.mean[0] == (0.4914 if name == "CIFAR10" else 0.5071)


def test_a_cifar_file_that_is_not_the_published_one_is_never_unpickled(tmp_path, monkeypatch):
    write_cifar("CIFAR10", tmp_path / "raw", monkeypatch)

    class Attack:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "executed",))

    (tmp_path / "raw" / "cifar-10-batches-py" / "data_batch_3").write_bytes(pickle.dumps(Attack()))
    with pytest.raises(InvalidArtifact, match=r"is no cifar10.*corrupted.*cifar-10-batches-py"):
        read_source("cifar10", tmp_path / "raw")
    assert not (tmp_path / "executed").exists()


def test_stl10_is_read_column_by_column(tmp_path, monkeypatch):
    expected = write_stl10(tmp_path / "raw", monkeypatch)
    train, test = store(tmp_path / "data", "stl10", tmp_path / "raw")
    same(train, expected["train"])
    same(test, expected["test"])
    assert train.classes == ["airplane", "bird", "car"]


@pytest.mark.parametrize("layout", [".", "raw", "FashionMNIST/raw"])
def test_fashion_mnist_is_read_from_debians_folder_and_from_torchvisions(layout, tmp_path):
    expected = write_fashion(tmp_path / "there" / layout)
    before = sorted((tmp_path / "there").rglob("*"))
    train, test = store(tmp_path / "data", "fashion_mnist", tmp_path / "there")
    same(train, expected["train"])
    same(test, expected["test"])
    assert sorted((tmp_path / "there").rglob("*")) == before, "a folder of the user is only read"
    assert len(set(train.classes)) == 10
    values = expected["train"][0] / 255
    assert (train.mean, train.std) == ([pytest.approx(values.mean())] * 3, [pytest.approx(values.std(ddof=1))] * 3)


def test_food101_is_indexed_by_its_lists(tmp_path):
    write_food(tmp_path / "raw")
    train, test = store(tmp_path / "data", "food101", tmp_path / "raw")
    assert train.classes == ["apple pie", "hot and sour soup"]
    assert (train.labels.tolist(), test.labels.tolist()) == ([0, 0, 0, 1, 1, 1], [0, 0, 1, 1])
    photo = tmp_path / "raw" / "food-101" / "images" / "hot_and_sour_soup" / "1003.jpg"
    np.testing.assert_array_equal(train[3][0].permute(1, 2, 0), np.array(Image.open(photo)))


def test_imagenet_is_indexed_in_the_order_of_its_wnids(tmp_path):
    from timm.data import ImageNetInfo
    from torchvision.models import ResNet18_Weights

    wnids = ImageNetInfo().label_names()
    write_jpeg(tmp_path / "one.JPEG")
    for wnid in wnids:
        for part, photo in (("train", f"{wnid}_7.JPEG"), ("val", "ILSVRC2012_val_00000001.JPEG")):
            (tmp_path / "raw" / part / wnid).mkdir(parents=True)
            (tmp_path / "raw" / part / wnid / photo).hardlink_to(tmp_path / "one.JPEG")
    train, test = store(tmp_path / "data", "imagenet", tmp_path / "raw")
    assert (train.labels.tolist(), test.labels.tolist()) == ([*range(1000)], [*range(1000)])
    assert train.paths[3] == "train/n01491361/n01491361_7.JPEG"
    assert (train.classes[3], train.classes[999]) == ("tiger shark", "toilet paper")
    # Another source of names has them in the same order: most are spelt alike, and none of these stands elsewhere.
    others = [name.lower() for name in ResNet18_Weights.DEFAULT.meta["categories"]]
    alike = [ours == theirs for ours, theirs in zip(map(str.lower, train.classes), others, strict=True)]
    assert sum(alike) > 690
    assert read_classes(tmp_path / "data" / "classes.json") == imagenet_classes()

    shutil.rmtree(tmp_path / "raw" / "val" / wnids[5])
    (tmp_path / "raw" / "val" / "n99999999").mkdir()
    with pytest.raises(InvalidArtifact, match=f"val holds 1000 class folders.*{wnids[5]}, n99999999"):
        read_source("imagenet", tmp_path / "raw")


def test_imagenets_names_are_a_thousand_different_ones():
    names = imagenet_classes()
    assert len(set(names)) == len(names) == 1000
    assert [names[number] for number in (657, 744, 836, 837)] == ["missile", "projectile", "sunglass", "sunglasses"]


def test_own_folders_with_and_without_test_images(tmp_path):
    write_folders(tmp_path / "split", {"train": 3, "val": 2})
    train, test = store(tmp_path / "a", "folder", tmp_path / "split")
    assert (len(train), len(test)) == (6, 4)
    assert train.paths[0] == "train/hot_dog/0.jpg"
    write_folders(tmp_path / "whole", {"": 10})
    train, test = store(tmp_path / "b", "folder", tmp_path / "whole")
    assert (torch.bincount(train.labels).tolist(), torch.bincount(test.labels).tolist()) == ([8, 8], [2, 2])
    assert not set(train.paths) & set(test.paths)
    assert train.classes == ["hot dog", "no hot dog"]
    (tmp_path / "whole" / "classes.json").write_text('{"no_hot_dog": "anything else"}', encoding="utf-8")
    assert store(tmp_path / "b", "folder", tmp_path / "whole")[0].classes == ["hot dog", "anything else"]
    for names in ('{"no_hot_dog": "hot dog"}', '{"cat": "cat"}', "[1]"):
        (tmp_path / "whole" / "classes.json").write_text(names, encoding="utf-8")
        with pytest.raises(InvalidArtifact, match=r"names|classes\.json must map"):
            read_source("folder", tmp_path / "whole")
    write_folders(tmp_path / "split", {"val": 1}, ("cat",))
    with pytest.raises(InvalidArtifact, match="cat"):
        read_source("folder", tmp_path / "split")


def test_digits_are_split_by_class_once_and_for_all(tmp_path):
    train, test = store(tmp_path, "digits", None)
    assert (len(train), len(test)) == (1437, 360)
    assert train.images.shape == (1437, 1, 8, 8)
    assert int(train.images.max()) == 255
    shares = [torch.bincount(split.labels) / len(split.labels) for split in (train, test)]
    torch.testing.assert_close(*shares, atol=0.003, rtol=0)
    assert torch.equal(store(tmp_path, "digits", None)[0].images, train.images)
    assert not torch.equal(store(tmp_path, "digits", None, split_seed=1)[0].labels, train.labels)
    assert read_classes(tmp_path / "classes.json")[3] == "three"
    (tmp_path / "classes.json").write_text('["only one"]', encoding="utf-8")
    with pytest.raises(InvalidArtifact, match="at least two"):
        read_classes(tmp_path / "classes.json")


def test_limits_keep_the_classes_balanced(tmp_path):
    train, test = store(tmp_path, "digits", None, limit_train=100, limit_test=50)
    assert torch.bincount(train.labels).tolist() == pytest.approx([10] * 10, abs=1)
    assert len(test) == 50
    with pytest.raises(InvalidParameter, match="digits cannot be split"):
        store(tmp_path, "digits", None, limit_test=5)


def test_an_index_does_not_depend_on_where_the_files_lie(tmp_path, monkeypatch):
    write_folders(tmp_path / "here", {"train": 3, "test": 2})
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    for place, workers in (("here", "0"), ("there", "2")):
        monkeypatch.setenv("TEXTGUARD_WORKERS", workers)
        store(tmp_path / f"data-{place}", "folder", tmp_path / place, checksum=True)
    files = [split_file(tmp_path / f"data-{place}", "train").read_bytes() for place in ("here", "there")]
    assert files[0] == files[1]


def test_photos_of_the_real_world_become_rgb(tmp_path):
    write_folders(tmp_path / "raw", {"train": 1, "test": 1})
    home, picture = tmp_path / "raw" / "train" / "hot_dog", Image.fromarray(pixels(20, 24, 3))
    picture.convert("CMYK").save(home / "a.JPEG", "JPEG")
    picture.convert("L").save(home / "b.JPEG", "JPEG")
    picture.convert("RGBA").save(home / "c.JPEG", "PNG")
    picture.convert("P").save(home / "d.png")
    train, _ = store(tmp_path / "data", "folder", tmp_path / "raw")
    for number, name in enumerate(("0.jpg", "a.JPEG", "b.JPEG", "c.JPEG", "d.png")):
        theirs = datasets.folder.default_loader(str(home / name))
        np.testing.assert_array_equal(train[number][0].permute(1, 2, 0), np.array(theirs))


def test_corrupt_images_are_named_counted_left_out_or_refused(tmp_path, capsys):
    write_folders(tmp_path / "raw", {"train": 10, "test": 2})
    damaged = [tmp_path / "raw" / "train" / "hot_dog" / f"{number}.jpg" for number in (2, 5, 7)]
    damaged[0].write_bytes(damaged[0].read_bytes()[:-200])
    damaged[1].write_bytes(b"")
    damaged[2].write_text("<html>404</html>", encoding="utf-8")
    with pytest.raises(InvalidArtifact, match=r"3 of 20 images.*hot_dog/2\.jpg.*truncated.*5\.jpg.*7\.jpg.*corrupt_share"):
        store(tmp_path / "data", "folder", tmp_path / "raw", corrupt_share=0.1)
    assert not (tmp_path / "data").exists()
    train, _ = store(tmp_path / "data", "folder", tmp_path / "raw", corrupt_share=0.15)
    assert len(train) == 17
    assert not {f"train/hot_dog/{number}.jpg" for number in (2, 5, 7)} & set(train.paths)
    assert "3 of 20 images" in capsys.readouterr().err
    for photo in (tmp_path / "raw" / "train" / "hot_dog").iterdir():
        photo.write_bytes(b"")
    with pytest.raises(InvalidArtifact, match="no image of 1 classes"):
        store(tmp_path / "data", "folder", tmp_path / "raw", corrupt_share=0.9)


@pytest.mark.parametrize(("harm", "workers"), [("gone", "0"), ("longer", "0"), ("changed", "0"), ("gone", "1")])
def test_a_file_that_is_not_the_indexed_one_is_named(harm, workers, tmp_path, monkeypatch):
    write_folders(tmp_path / "raw", {"train": 2, "test": 2})
    train, _ = store(tmp_path / "data", "folder", tmp_path / "raw", checksum=True)
    photo = tmp_path / "raw" / "train" / "no_hot_dog" / "1.jpg"
    content = photo.read_bytes()
    photo.unlink()
    if harm != "gone":
        photo.write_bytes(content + b"\0" if harm == "longer" else content[:-9] + b"\0" + content[-8:])
    monkeypatch.setenv("TEXTGUARD_WORKERS", workers)
    with pytest.raises(UnreadableImage) as raised:
        list(image_loader(evaluation_view(train, 8, 8, "bilinear"), 2))
    assert str(raised.value).startswith(f"{photo} cannot be read (")
    assert "Traceback" not in str(raised.value)


@pytest.mark.parametrize("checksum", [False, True])
def test_checksums_are_stored_when_asked_for(checksum, tmp_path):
    write_folders(tmp_path / "raw", {"train": 2, "test": 2})
    train, _ = store(tmp_path / "data", "folder", tmp_path / "raw", checksum=checksum)
    content = (tmp_path / "raw" / train.paths[1]).read_bytes()
    assert train.checksums[1] == (hashlib.sha256(content).hexdigest() if checksum else "")
    assert train.sizes[1] == len(content)


@pytest.fixture
def server(tmp_path):
    """The URL of an HTTP server on loopback that serves tmp_path/server."""
    (tmp_path / "server").mkdir()
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path / "server")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


def test_a_download_is_whole_or_done_again(server, tmp_path, monkeypatch):
    expected = write_cifar("CIFAR10", tmp_path / "original", monkeypatch)
    with tarfile.open(tmp_path / "server" / "cifar.tar.gz", "w:gz") as tar:
        tar.add(tmp_path / "original" / "cifar-10-batches-py", "cifar-10-batches-py")
    root = data_root("cifar10", None, tmp_path)
    assert root == tmp_path / "data" / "downloads" / "cifar10"
    monkeypatch.setattr(datasets.CIFAR10, "url", "http://127.0.0.1:9/cifar.tar.gz")
    with pytest.raises(InvalidArtifact, match=r"'cifar10' cannot be downloaded.*TEXTGUARD_DATA"):
        read_source("cifar10", root)
    assert not root.exists()
    leftover = root.with_name(".cifar10.partial") / "cifar-10-python.tar.gz"
    leftover.parent.mkdir(exist_ok=True)
    leftover.write_bytes(b"half a download")
    monkeypatch.setattr(datasets.CIFAR10, "url", f"{server}/cifar.tar.gz")
    monkeypatch.setattr(datasets.CIFAR10, "tgz_md5", md5(tmp_path / "server" / "cifar.tar.gz"))
    train, _ = store(tmp_path / "stored", "cifar10", root)
    same(train, expected["train"])
    assert not leftover.parent.exists()


def test_where_data_sets_are_looked_for(tmp_path, monkeypatch):
    monkeypatch.delenv("TEXTGUARD_DATA", raising=False)
    assert data_root("digits", None, tmp_path) is None
    assert data_root("imagenet", "photos", tmp_path) == tmp_path / "photos"
    assert data_root("imagenet", "/data/photos", tmp_path) == Path("/data/photos")
    with pytest.raises(InvalidParameter, match=r"'imagenet' cannot be downloaded.*TEXTGUARD_DATA.*train/WNID"):
        data_root("imagenet", None, tmp_path)
    monkeypatch.setenv("TEXTGUARD_DATA", str(tmp_path))
    assert data_root("imagenet", None, Path("/repository")) == tmp_path / "imagenet"
    with pytest.raises(InvalidParameter, match=f"{tmp_path}/imagenet is no folder.*must hold train/WNID"):
        read_source("imagenet", tmp_path / "imagenet")
    with pytest.raises(UnknownName, match="known: cifar10"):
        data_root("mnist", None, tmp_path)


@pytest.mark.parametrize("source", sorted(set(SOURCES) - {"digits"}))
def test_an_empty_folder_is_no_data_set(source, tmp_path):
    with pytest.raises(InvalidArtifact, match=f"{tmp_path}"):
        read_source(source, tmp_path)


def test_an_index_without_its_files_says_where_they_are_looked_for(tmp_path):
    write_folders(tmp_path / "raw", {"train": 2, "test": 2})
    store(tmp_path / "data", "folder", tmp_path / "raw")
    with pytest.raises(InvalidParameter, match=r"index\.parquet names files below .*gone.*datasets\.\*\.folder"):
        load_split(tmp_path / "data", "train", tmp_path / "gone")
    split_file(tmp_path / "data", "test").write_bytes(b"PAR1")
    with pytest.raises(InvalidArtifact, match="stage 'data' writes it"):
        load_split(tmp_path / "data", "test", tmp_path / "raw")


def test_stages_read_photos_the_same_with_any_number_of_processes(tmp_path, monkeypatch):
    write_folders(tmp_path / "photos", {"train": 8, "val": 6})
    params = load_yaml(str(REPOSITORY / "grids" / "smoke" / "params.yaml"))
    params |= {"root": str(REPOSITORY), "variants": ["baseline"]}
    params["datasets"]["digits"] |= {"source": "folder", "limit_train": 0, "limit_test": 0, "checksum": True}
    params["backbones"]["resnet18"] |= {"batch_size": 8, "image_size": 16, "resize_size": 18, "epochs": 1, "warmup_epochs": 0}
    params["inject"] |= {"injections_per_layer": 2, "image_batch": 4}
    monkeypatch.setenv("TEXTGUARD_DATA", str(tmp_path))
    (tmp_path / "folder").symlink_to(tmp_path / "photos")
    key = "digits-resnet18-baseline-0"
    for workers in ("0", "2"):
        monkeypatch.setenv("TEXTGUARD_WORKERS", workers)
        home = tmp_path / workers
        home.mkdir()
        monkeypatch.chdir(home)
        (home / "params.yaml").write_text(yaml.safe_dump(params), encoding="utf-8")
        loaded = load_params()
        for stage in ("data", "heads"):
            importlib.import_module(f"stages.{stage}").main(loaded, "digits")
        for stage in ("train", "evaluate", "ranges", "inject"):
            importlib.import_module(f"stages.{stage}").main(loaded, key)
    files = [{path.name: path.read_bytes() for path in (tmp_path / n / "metrics").glob("r*/*/*.*")} for n in ("0", "2")]
    assert len(files[0]) == 11
    assert files[0] == files[1]
