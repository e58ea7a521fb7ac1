"""Bad input: folders of images and what lies in them, class names, copies, and files of splits that are not what they say."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from textguard.artifacts import (
    beside_copy,
    lasting,
    misnamed,
    read_classes,
    read_safetensors,
    write_json,
    write_parquet,
    write_safetensors,
)
from textguard.errors import InvalidArtifact, InvalidParameter
from textguard.vision import datasets, image_files
from textguard.vision.datasets import (
    Content,
    data_root,
    imagenet_classes,
    load_split,
    make_splits,
    read_source,
    read_split,
    save_splits,
)

OPTIONS = {"source": "folder", "checksum": False, "corrupt_share": 0.0, "orientation": "stored"}
SPLIT = {"test_share": 0.5, "split_seed": 0, "limit_train": 0, "limit_test": 0}


def put(root: Path, *names: str) -> Path:
    """Files below a folder, each with a picture of its own."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        shade = np.frombuffer(name.encode()[-24:].ljust(24), np.uint8).reshape(4, 6)
        Image.fromarray(shade).save(path, "PNG")
    return root


def classes_in(root: Path, *parts: str) -> Path:
    """Two images of cats and of dogs below each of these folders."""
    return put(root, *(f"{part}/{folder}/{number}.png" for part in parts for folder in ("cat", "dog") for number in range(2)))


def paths(content: Content) -> dict[str, list[str]]:
    return {name: list(part.images) for name, part in content.parts.items()}


def store(folder: Path, root: Path, **split: object) -> None:
    content = read_source("folder", root)
    save_splits(folder, content, make_splits(content, "folder", **SPLIT | split), root, **OPTIONS)


LAYOUTS = [
    ("train", "test"),
    ("train", "val"),
    ("train", "valid"),
    ("train", "validation"),
    ("Train", "Test"),
    ("training", "testing"),
    ("TRAINING", "VALIDATION"),
]


@pytest.mark.parametrize(("train", "test"), LAYOUTS)
def test_exporters_layouts_are_known(train, test, tmp_path, capsys):
    content = read_source("folder", classes_in(tmp_path, train, test))
    assert content.classes == ["cat", "dog"]
    assert paths(content) == {
        "train": [f"{train}/cat/0.png", f"{train}/cat/1.png", f"{train}/dog/0.png", f"{train}/dog/1.png"],
        "test": [f"{test}/cat/0.png", f"{test}/cat/1.png", f"{test}/dog/0.png", f"{test}/dog/1.png"],
    }
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("third", ["val", "Validation", "unlabelled"])
def test_a_third_split_is_said_not_to_be_used(third, tmp_path, capsys):
    content = read_source("folder", classes_in(tmp_path, "train", "Test", third))
    assert paths(content)["test"][0] == "Test/cat/0.png"
    assert f"Test/ holds the test images; not used: {third}\n" in capsys.readouterr().err


def test_a_class_may_be_called_train(tmp_path):
    root = put(tmp_path, *(f"{name}/{number}.png" for name in ("bus", "train") for number in range(2)))
    assert read_source("folder", root).classes == ["bus", "train"]


MISPLACED = {
    "two trainings": (["train", "Train", "test"], "Train and train, which mean the same"),
    "two validations": (["train", "val", "valid"], "val and valid, which mean the same"),
    "splits of other names": (["images_1", "images_2"], "images_1 holds folders (cat, dog)"),
    "only training images": (["train"], "train holds folders (cat, dog)"),
    "only test images": (["test"], "test holds folders (cat, dog)"),
    "an archive in a folder": (["pets/train", "pets/test"], "pets holds folders (test, train)"),
}


@pytest.mark.parametrize(("parts", "said"), MISPLACED.values(), ids=MISPLACED)
def test_folders_of_folders_are_no_classes(parts, said, tmp_path):
    with pytest.raises(InvalidArtifact) as raised:
        read_source("folder", classes_in(tmp_path, *parts))
    assert said in str(raised.value)


def test_images_and_labels_side_by_side_are_no_classes(tmp_path):
    for part in ("train", "valid"):
        put(tmp_path, f"{part}/images/0.png")
        (tmp_path / part / "labels").mkdir()
        (tmp_path / part / "labels" / "0.txt").write_text("0 0.5 0.5 1 1\n", encoding="utf-8")
    with pytest.raises(InvalidArtifact, match=r"train/labels holds only 1 \.txt; it must hold images"):
        read_source("folder", tmp_path)


def link(root: Path, name: str, target: str) -> None:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).symlink_to(target)


LOOPS = {  # links, each as its name and where it leads
    "to its own folder": ({"train/cat/loop": "."}, "train/cat/loop is the same folder as"),
    "to its class's neighbour": ({"train/cat/other": "../dog"}, "is the same folder as"),
    "to the split": ({"train/cat/up": ".."}, "is the same folder as"),
    "to the root": ({"train/cat/up": "../.."}, "is the same folder as"),
    "to a folder that holds the root": ({"train/cat/up": "../../.."}, "is the same folder as"),
    "to the whole machine": ({"train/cat/all": "/"}, "is the same folder as"),
    "crosswise": ({"train/cat/a": "../dog", "train/dog/b": "../cat"}, "is the same folder as"),
    "two to one": ({"train/cat/a": "../../../out", "train/dog/b": "../../../out"}, "is the same folder as"),
    "two through each other": ({"train/cat/a": "../dog/b", "train/dog/b": "../cat/a"}, "only"),
    "a class twice": ({"train/eel": "cat", "val/eel": "cat"}, "is the same folder as"),
}


@pytest.mark.parametrize(("links", "said"), LOOPS.values(), ids=LOOPS)
def test_no_folder_is_walked_twice(links, said, tmp_path, capsys):
    root = classes_in(tmp_path / "own", "train", "val")
    put(tmp_path / "out", "x.png")
    for name, target in links.items():
        link(root, name, target)
    if said == "only":  # such links lead nowhere: they are names without an extension of images
        assert len(read_source("folder", root).parts["train"].images) == 4
        assert "left out" in capsys.readouterr().err
        return
    with pytest.raises(InvalidArtifact) as raised:
        read_source("folder", root)
    assert said in str(raised.value)


def test_the_test_images_are_not_the_training_images_under_another_name(tmp_path):
    classes_in(tmp_path, "train")
    link(tmp_path, "test", "train")
    with pytest.raises(InvalidArtifact, match="is the same folder as"):
        read_source("folder", tmp_path)


def test_links_to_folders_and_files_elsewhere_are_followed(tmp_path):
    classes_in(tmp_path / "elsewhere", "pets")
    root = tmp_path / "own"
    for folder in ("cat", "dog"):
        link(root, f"train/{folder}", f"../../elsewhere/pets/{folder}")
        link(root, f"test/{folder}/1.png", f"../../../elsewhere/pets/{folder}/1.png")
    found = paths(read_source("folder", root))
    assert found["train"] == ["train/cat/0.png", "train/cat/1.png", "train/dog/0.png", "train/dog/1.png"]
    assert found["test"] == ["test/cat/1.png", "test/dog/1.png"]


JUNK = ["cat/._0.png", "cat/.ipynb_checkpoints/0-checkpoint.png", "dog/@eaDir/0.png", "dog/__MACOSX/._1.png", "dog/Thumbs.db"]
JUNK += [".git/x.png", "__MACOSX/cat/0.png", "@eaDir/0.png", ".DS_Store", "desktop.ini"]


@pytest.mark.parametrize("part", ["", "train/", "val/"])
def test_what_machines_leave_is_no_image(part, tmp_path):
    root = classes_in(tmp_path, *(["train", "val"] if part else ["."]))
    before = paths(read_source("folder", root))
    put(root, *(f"{part}{name}" for name in JUNK))
    assert paths(read_source("folder", root)) == before


def test_files_that_are_left_out_are_counted_and_named(tmp_path, capsys):
    root = classes_in(tmp_path, "train", "val")
    put(root, "train/cat/a.jfif", "train/cat/b.JFIF", "train/dog/c.gif", "train/dog/none", "train/cat/._x.png", "val/y.png")
    read_source("folder", root)
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith(f"{root}/train: left out")
    for part in ("2 .jfif", "1 .gif", "1 no extension", "1 hidden", "(as train/cat/a.jfif)"):
        assert part in first
    assert second.startswith(f"{root}/val: left out")
    assert "1 images outside of class folders" in second
    for path in (root / "val" / "dog").iterdir():
        path.rename(path.with_suffix(".heic"))
    with pytest.raises(InvalidArtifact, match=r"val/dog holds only 2 \.heic; it must hold images \(\.jpg"):
        read_source("folder", root)


@pytest.mark.parametrize("name", [b"caf\xe9", b"cat/caf\xe9.png"])
def test_names_that_are_no_utf8_are_shown(name, tmp_path):
    root = classes_in(tmp_path, ".")
    path = os.fsencode(root) + b"/" + name
    if b"." in name:
        with open(path, "wb"):
            pass
    else:
        os.mkdir(path)
    with pytest.raises(InvalidArtifact) as raised:
        read_source("folder", root)
    line = str(raised.value)
    assert r"caf\xe9" in line
    assert "rename it" in line
    line.encode()


def test_names_are_not_read_in_another_encoding(tmp_path, monkeypatch):
    root = put(classes_in(tmp_path, "."), "cat/größe.png")
    assert "cat/größe.png" in paths(read_source("folder", root))["all"]
    monkeypatch.setattr(sys, "getfilesystemencoding", lambda: "iso8859-1")
    with pytest.raises(InvalidArtifact, match="no UTF-8 in this locale"):
        read_source("folder", root)


def test_a_folder_that_may_not_be_entered_is_named(tmp_path, monkeypatch):
    root, scan = classes_in(tmp_path, "."), os.scandir

    def refused(path: Path) -> object:
        if Path(path).name == "dog":
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(image_files.os, "scandir", refused)
    with pytest.raises(InvalidArtifact, match=r"Permission denied.*dog"):
        read_source("folder", root)


NAMED = {  # classes.json, and what is said of it
    "another folder": ('{"cow": "cow"}', "names 'cow', which is no class folder"),
    "a list of names": ('["cat", "dog"]', "holds a list; it must map folders (cat, dog)"),
    "null": ("null", "holds a NoneType"),
    "pairs, as Keras has them": (
        '{"cat": ["n02121808", "domestic_cat"]}',
        "gives 'cat' the name ['n02121808', 'domestic_cat']",
    ),
    "Keras's index": ('{"0": ["n02121808", "domestic_cat"]}', "names '0', which is no class folder"),
    "an object": ('{"cat": {"name": "cat"}}', "must be one text"),
    "a number": ('{"cat": 5}', "gives 'cat' the name 5; it must be one text"),
    "true": ('{"cat": true}', "must be one text"),
    "nothing": ('{"cat": null}', "must be one text"),
    "no letters": ('{"cat": ""}', "a name is empty"),
    "blanks": ('{"cat": "  "}', "blanks at its ends"),
    "a line end": ('{"cat": "cat\\n"}', "blanks at its ends"),
    "a line end inside": ('{"cat": "house\\ncat"}', "control characters"),
    "a blank before": ('{"cat": " cat"}', "blanks at its ends"),
    "NUL": ('{"cat": "c\\u0000t"}', "control characters"),
    "an escape": ('{"cat": "\\u001b[2Jcat"}', "control characters"),
    "half a character": ('{"cat": "cat \\ud83d"}', "half of a character"),
    "half a character as a folder": ('{"cat \\ud83d": "cat"}', "half of a character"),
    "one name twice": ('{"cat": "pet", "dog": "pet"}', "'pet' and 'pet' are the same"),
    "another case": ('{"cat": "pet", "dog": "Pet"}', "'pet' and 'Pet' are the same, or but for case"),
    "another encoding of accents": (
        '{"cat": "p\\u00e9t", "dog": "pe\\u0301t"}',
        "are the same, or but for case or how accents",
    ),
    "one folder twice": ('{"cat": "cat", "cat": "tom"}', "it holds 'cat' twice"),
    "a byte order mark": ('\ufeff{"cat": "tom"}', "BOM"),
    "half a file": ('{"cat": "to', "cannot be read"),
    "no JSON": ("cat: tom", "cannot be read"),
    "deep": ("[" * 100_000, "cannot be read"),
    "a long number": ('{"cat": ' + "9" * 5000 + "}", "cannot be read"),
}


@pytest.mark.parametrize(("content", "said"), NAMED.values(), ids=NAMED)
def test_class_names_that_are_none_are_refused(content, said, tmp_path):
    root = classes_in(tmp_path, ".")
    (root / "classes.json").write_text(content, encoding="utf-8")
    with pytest.raises(InvalidArtifact) as raised:
        read_source("folder", root)
    line = str(raised.value)
    assert said in line
    assert str(root / "classes.json") in line
    line.encode()


def put_pipe(path: Path) -> None:
    os.mkfifo(path)


@pytest.mark.parametrize(
    "in_the_way", [put_pipe, Path.mkdir, lambda path: path.symlink_to("/dev/zero"), lambda path: path.symlink_to("x")]
)
def test_class_names_come_from_a_regular_file(in_the_way, tmp_path):
    root = classes_in(tmp_path, "train", "test")
    in_the_way(root / "classes.json")
    with pytest.raises(InvalidArtifact, match=r"classes\.json is no regular file"):
        read_source("folder", root)


def test_names_that_look_like_something_else_stay_names(tmp_path):
    folders = ["007", "1e3", "2024-01-01", "NA", "None", "Straße", "nan", "null", "true", "北京"]
    root = put(tmp_path / "own", *(f"{folder}/{number}.png" for folder in folders for number in range(2)))
    store(tmp_path / "data", root)
    assert read_classes(tmp_path / "data" / "classes.json") == folders
    assert load_split(tmp_path / "data", "test", root).classes == folders


@pytest.mark.parametrize(
    "folders", [("Cat", "cat"), ("caf\u00e9", "cafe\u0301"), ("a_b", "a b"), ("__", "cat"), ("c\nt", "cat"), ("cat",)]
)
def test_folders_that_sound_alike_or_not_at_all_are_refused(folders, tmp_path):
    root = put(tmp_path, *(f"{folder}/{number}.png" for folder in folders for number in range(2)))
    with pytest.raises(InvalidArtifact, match=r"bad class names.*classes\.json"):
        read_source("folder", root)


def test_good_names_are_not_called_bad():
    assert not misnamed(imagenet_classes())
    assert not misnamed(["می\u200cخواهم", "cat (tabby)", "=1+1", "<b>", "x" * 10_000])  # odd, but texts


@pytest.mark.parametrize("content", [["only one"], ["a", "a"], ["a", ""], ["a", 5], ["a", "b\n"], {"a": "b"}, 5, None, []])
def test_stored_class_names_are_checked(content, tmp_path):
    write_json(tmp_path / "classes.json", content)
    with pytest.raises(
        InvalidArtifact, match=r"classes\.json must be a list of at least two class names: .*stage 'data' writes it"
    ):
        read_classes(tmp_path / "classes.json")


def test_a_copy_never_lands_on_both_sides_of_a_drawn_split(tmp_path):
    root = put(tmp_path / "own", *(f"{folder}/{number}.png" for folder in ("cat", "dog") for number in range(4)))
    for number in range(4):  # four copies are split in halves, whatever is drawn
        (root / "cat" / f"{number}.png").write_bytes((root / "cat" / "0.png").read_bytes())
    with pytest.raises(
        InvalidArtifact, match=r"2 of the test images are training images as well, byte for byte \(as cat/.*remove the copies"
    ):
        store(tmp_path / "data", root)
    assert not (tmp_path / "data").exists()


def test_copies_in_a_published_split_are_counted(tmp_path, capsys):
    root = classes_in(tmp_path / "own", "train", "test")
    copy = root / "test" / "dog" / "1.png"
    copy.write_bytes((root / "train" / "cat" / "0.png").read_bytes())
    store(tmp_path / "data", root)
    said = capsys.readouterr().err
    assert "1 of the test images are training images as well, byte for byte (as test/dog/1.png and train/cat/0.png)" in said


def test_what_cannot_be_stored_leaves_the_older_files(tmp_path):
    root = classes_in(tmp_path / "own", "train", "test")
    store(tmp_path / "data", root)
    before = {path: path.read_bytes() for path in (tmp_path / "data").rglob("*.*")}
    assert len(before) == 3
    (root / "classes.json").write_text('{"cat": "cat \\ud83d"}', encoding="utf-8")
    put(root, "train/dog/2.png", "test/dog/2.png")
    with pytest.raises(InvalidArtifact):
        store(tmp_path / "data", root)
    assert {path: path.read_bytes() for path in (tmp_path / "data").rglob("*.*")} == before


def test_limits_of_just_what_is_there_keep_all(tmp_path):
    root = classes_in(tmp_path / "own", "train", "test")
    store(tmp_path / "data", root, limit_train=4, limit_test=2)
    assert [len(load_split(tmp_path / "data", split, root)) for split in ("train", "test")] == [4, 2]


@pytest.mark.parametrize("change", [{"test_share": 0.1}, {"limit_train": 4}])
def test_no_class_is_lost_by_a_split_or_a_limit(change, tmp_path):
    names = [f"cat/{number}.png" for number in range(40)] + [f"dog/{number}.png" for number in range(4)]
    content = read_source("folder", put(tmp_path, *names))
    with pytest.raises(
        InvalidParameter, match=r"folder cannot be split as params\.yaml datasets asks: no (train|test)ing image of 'dog'"
    ):
        make_splits(content, "folder", **SPLIT | change)


PHOTOS = {
    "up": "../../../photo",
    "half a character": "a/\ud83d",
    "a number": 5,
}


@pytest.mark.parametrize("photo", PHOTOS.values(), ids=PHOTOS)
def test_listed_paths_stay_in_the_data_set(photo, tmp_path):
    (tmp_path / "food-101" / "meta").mkdir(parents=True)
    for split in ("train", "test"):
        listed = json.dumps({"a": ["a/1"], "b": [photo]})
        (tmp_path / "food-101" / "meta" / f"{split}.json").write_text(listed, encoding="utf-8")
    if isinstance(photo, int):
        assert paths(read_source("food101", tmp_path))["test"][1] == "food-101/images/5.jpg"  # missing, which the index says
        return
    with pytest.raises(InvalidArtifact, match=r"is listed, which is no path below it|half of a character"):
        read_source("food101", tmp_path)


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("digits") / "data"
    content = read_source("digits", None)
    splits = make_splits(content, "digits", test_share=0.2, split_seed=0, limit_train=20, limit_test=10)
    save_splits(folder, content, splits, None, **OPTIONS | {"source": "digits"})
    return folder


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        found, metadata = read_safetensors(folder / "train" / "images.safetensors", "data")
        write_safetensors(folder / "train" / "images.safetensors", {**found, **change(found)}, metadata)

    return damage


def states(**changes: object) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        found, metadata = read_safetensors(folder / "train" / "images.safetensors", "data")
        stated = {name: json.dumps(value) for name, value in changes.items()}
        write_safetensors(folder / "train" / "images.safetensors", found, metadata | stated)

    return damage


def label(value: int) -> Callable[[Path], None]:
    return tensors(lambda found: {"labels": found["labels"].index_fill(0, torch.tensor([3]), value)})


DAMAGED = {
    "real numbers": (tensors(lambda t: {"images": t["images"].float()}), "torch.float32, and not uint8"),
    "two channels": (tensors(lambda t: {"images": t["images"].expand(-1, 2, -1, -1)}), "[20, 2, 8, 8]"),
    "no channels": (tensors(lambda t: {"images": t["images"][:, 0]}), "[20, 8, 8]"),
    "no pixels": (tensors(lambda t: {"images": t["images"][:, :, :0]}), "[20, 1, 0, 8]"),
    "no images": (tensors(lambda t: {name: value[:0] for name, value in t.items()}), "[0, 1, 8, 8]"),
    "more labels": (tensors(lambda t: {"labels": t["labels"].repeat(2)}), "labels [40], torch.int64, and not int64 [20]"),
    "fewer labels": (tensors(lambda t: {"labels": t["labels"][:5]}), "labels [5]"),
    "labels in a column": (tensors(lambda t: {"labels": t["labels"][:, None]}), "labels [20, 1]"),
    "labels of real numbers": (tensors(lambda t: {"labels": t["labels"].double()}), "torch.float64"),
    "a label below all": (label(-1), "none of 0 to 9"),
    "a label that losses ignore": (label(-100), "none of 0 to 9"),
    "a label above all": (label(10), "none of 0 to 9"),
    "three classes": (states(classes=["a", "b", "c"]), "none of 0 to 2"),
    "classes that are one text": (states(classes="zero"), "bad class names"),
    "classes that are others": (states(classes=[*"abcdefghij"]), "holds other classes than"),
    "no mean": (states(mean=None), "as its mean None, and not three numbers"),
    "a short mean": (states(mean=[0.5]), "not three numbers"),
    "a mean that is no number": (states(mean=[0.5, 0.5, float("nan")]), "not three numbers"),
    "an infinite mean": (states(mean=[0.5, 0.5, float("inf")]), "not three numbers"),
    "a mean in 255ths": (states(mean=[127, 127, 127]), "not three numbers from 0 to 1"),
    "a text as mean": (states(mean=["0.5"] * 3), "not three numbers"),
    "no spread": (states(std=[0.2, 0, 0.2]), "as its std"),
    "a negative spread": (states(std=[0.2, 0.2, -0.2]), "as its std"),
    "no description": (lambda f: write_safetensors(f / "train" / "images.safetensors", {"images": torch.zeros(1)}), "train"),
    "an empty file": (lambda f: (f / "train" / "images.safetensors").write_bytes(b""), "cannot be read"),
    "other names beside it": (lambda f: write_json(f / "classes.json", [*"abcdefghij"]), "holds other classes than"),
}


@pytest.mark.parametrize(("damage", "said"), DAMAGED.values(), ids=DAMAGED)
def test_packed_images_are_what_they_should_be(damage, said, digits, tmp_path):
    folder = copy(digits, tmp_path)
    damage(folder)
    with pytest.raises(InvalidArtifact) as raised:
        load_split(folder, "train", None)
    line = str(raised.value)
    assert said in line
    assert "train/images.safetensors" in line
    assert line.count("stage 'data' writes it") == 1


def copy(folder: Path, to: Path) -> Path:
    for path in folder.rglob("*.*"):
        (to / path.relative_to(folder)).parent.mkdir(parents=True, exist_ok=True)
        (to / path.relative_to(folder)).write_bytes(path.read_bytes())
    return to


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An index, and the folder of its images."""
    root = classes_in(tmp_path_factory.mktemp("own"), "train", "test")
    folder = tmp_path_factory.mktemp("index") / "data"
    store(folder, root)
    return folder, root


INDEXED = {
    "nothing": (lambda table: table[:0], "must have rows"),
    "no labels": (lambda table: table.drop(columns="label"), "the columns path, label"),
    "a path out": (lambda table: table.assign(path=["../a", "b", "c", "d"]), "leads out"),
    "a path out in the middle": (lambda table: table.assign(path=["a/../../b", "b", "c", "d"]), "leads out"),
    "a path from the root": (lambda table: table.assign(path=["/etc/passwd", "b", "c", "d"]), "leads out"),
    "no path": (lambda table: table.assign(path=["", "b", "c", "d"]), "leads out"),
    "a path twice": (lambda table: table.assign(path="a"), "a path twice"),
    "a missing path": (lambda table: table.assign(path=["a", None, "c", "d"]), "must hold texts as path"),
    "numbers as paths": (lambda table: table.assign(path=range(4)), "must hold texts as path"),
    "labels that are no whole numbers": (lambda table: table.assign(label=0.5), "must hold whole numbers as label"),
    "a missing label": (lambda table: table.assign(label=[0, 1, None, 1]), "must hold whole numbers as label"),
    "a label above all": (lambda table: table.assign(label=2), "none of 0 to 1"),
    "a label below all": (lambda table: table.assign(label=-100), "none of 0 to 1"),
    "no width": (lambda table: table.assign(width=0), "without a size"),
    "no bytes": (lambda table: table.assign(bytes=-1), "without a size"),
    "a checksum that is none": (lambda table: table.assign(sha256="0x"), "holds a sha256 that is none"),
}


def index(folder: Path, split: str = "train") -> tuple[pd.DataFrame, dict[str, str]]:
    table = pq.read_table(folder / split / "index.parquet")
    return table.to_pandas(), {name.decode(): text.decode() for name, text in table.schema.metadata.items()}


@pytest.mark.parametrize(("change", "said"), INDEXED.values(), ids=INDEXED)
def test_an_index_is_what_it_should_be(change, said, own, tmp_path):
    folder = copy(own[0], tmp_path)
    table, metadata = index(folder)
    write_parquet(folder / "train" / "index.parquet", change(table), metadata)
    with pytest.raises(InvalidArtifact, match=r"train/index\.parquet.*stage 'data' writes it") as raised:
        load_split(folder, "train", own[1])
    assert said in str(raised.value)


def test_damaged_text_in_an_index_is_found_when_it_is_read(own, tmp_path):
    folder = copy(own[0], tmp_path)
    path = folder / "train" / "index.parquet"
    table, metadata = index(folder)
    pq.write_table(
        pa.Table.from_pandas(table).replace_schema_metadata(metadata), path, compression="none", use_dictionary=False
    )
    assert len(load_split(folder, "train", own[1])) == 4
    path.write_bytes(path.read_bytes().replace(b"train/cat/0.png", b"train/c\xfft/0.png"))
    with pytest.raises(InvalidArtifact, match=r"train/index\.parquet cannot be read .*UTF8.*stage 'data' writes it"):
        load_split(folder, "train", own[1])


@pytest.mark.parametrize(
    "changed", [{"split": "test"}, {"orientation": "upside down"}, {"mean": "[0]"}, {"classes": "["}, None]
)
def test_an_index_states_what_it_is(changed, own, tmp_path):
    folder = copy(own[0], tmp_path)
    table, metadata = index(folder)
    write_parquet(folder / "train" / "index.parquet", table, None if changed is None else metadata | changed)
    with pytest.raises(InvalidArtifact, match=r"train/index\.parquet.*stage 'data' writes it"):
        load_split(folder, "train", own[1])


DIGITS = {"source": "digits", "folder": None, "test_share": 0.2, "limit_train": 20, "limit_test": 10, "orientation": "stored"}


def swap(folder: Path) -> None:
    (folder / "train").rename(folder / "x")
    (folder / "test").rename(folder / "train")
    (folder / "x").rename(folder / "test")


def test_a_split_is_the_one_that_the_parameters_describe(digits, own, tmp_path):
    wanted, photos = SimpleNamespace(**DIGITS), SimpleNamespace(**DIGITS | {"source": "folder", "folder": str(own[1])})
    assert [len(read_split(digits, split, wanted, Path())) for split in ("train", "test")] == [20, 10]
    assert len(read_split(own[0], "train", photos, Path())) == 4
    others = {
        "another source": (digits, wanted, {"source": "cifar10"}, "was made of 'digits', and params.yaml says 'cifar10'"),
        "another limit": (digits, wanted, {"limit_train": 21}, "holds 20 images, which is not what"),
        "more than the limit": (own[0], photos, {"limit_train": 3}, "holds 4 images, which is not what"),
        "another orientation": (
            own[0],
            photos,
            {"orientation": "exif"},
            "with orientation 'stored', and params.yaml says 'exif'",
        ),
    }
    for folder, stated, change, said in others.values():
        with pytest.raises(InvalidArtifact, match="stage 'data' writes it") as raised:
            read_split(folder, "train", SimpleNamespace(**vars(stated) | change), Path())
        assert said in str(raised.value)
    for number, (folder, stated) in enumerate(((digits, wanted), (own[0], photos))):
        swapped = copy(folder, tmp_path / str(number))
        swap(swapped)
        for split in ("train", "test"):
            with pytest.raises(InvalidArtifact, match="stage 'data' writes it"):
                read_split(swapped, split, stated, Path())


def test_all_of_a_published_data_set_swapped_is_found(tmp_path):
    content, wanted = read_source("digits", None), SimpleNamespace(**DIGITS | {"limit_train": 0, "limit_test": 0})
    splits = make_splits(content, "digits", test_share=0.2, split_seed=0, limit_train=0, limit_test=0)
    save_splits(tmp_path, content, splits, None, **OPTIONS | {"source": "digits"})
    assert len(read_split(tmp_path, "train", wanted, Path())) == 1437
    swap(tmp_path)
    with pytest.raises(InvalidArtifact, match="holds 360 images, which is not what"):
        read_split(tmp_path, "train", wanted, Path())


@pytest.mark.parametrize("copied", ["standalone/tmp1234", "tmp1234/exp"])
def test_an_experiments_copy_finds_what_git_does_not_know(copied, tmp_path, monkeypatch):
    """The grid lies two folders deep in the repository, and DVC copies the repository's tracked files into the grid's .dvc."""
    grid = tmp_path / "repository" / "grids" / "own"
    copy_of_grid = grid / ".dvc" / "tmp" / "exps" / copied / "grids" / "own"
    tracked = copy_of_grid.parent.parent / "tracked"
    for folder in (copy_of_grid, tracked, tmp_path / "repository" / "photos", tmp_path / "repository" / "tracked"):
        folder.mkdir(parents=True)
    root = Path("../..")
    monkeypatch.delenv("TEXTGUARD_DATA", raising=False)
    monkeypatch.chdir(grid)
    assert data_root("folder", "photos", root) == root / "photos"
    assert data_root("food101", None, root) == root / "data" / "downloads" / "food101"
    monkeypatch.chdir(copy_of_grid)
    assert data_root("folder", "photos", root) == tmp_path / "repository" / "photos"
    assert data_root("folder", "tracked", root).resolve() == tracked
    assert data_root("folder", str(tmp_path), root) == tmp_path
    assert data_root("food101", None, root) == tmp_path / "repository" / "data" / "downloads" / "food101"
    assert lasting(root / "prompts" / "live") == tmp_path / "repository" / "prompts" / "live"
    assert lasting(Path("weights.pth")) == grid / "weights.pth"
    assert beside_copy(Path("/nowhere")) == Path("/nowhere")
    monkeypatch.setenv("TEXTGUARD_DATA", "../../photos")
    assert data_root("folder", None, root) == tmp_path / "repository" / "photos" / "folder"


@pytest.mark.parametrize(("folder", "shared"), [("~nobody-of-this-name/x", ""), (None, "~nobody-of-this-name")])
def test_a_home_that_does_not_exist_is_named(folder, shared, monkeypatch):
    monkeypatch.setenv("TEXTGUARD_DATA", shared)
    with pytest.raises(InvalidParameter, match=r"~nobody-of-this-name.*no such home directory"):
        data_root("folder", folder, Path())


def test_folders_of_any_name_are_told_in_letters_that_can_be_printed(tmp_path):
    (tmp_path / "classes.json").write_text('{"x": "y"}', encoding="utf-8")
    with pytest.raises(InvalidArtifact, match="names 'x', which is no class folder; it must map folders") as raised:
        datasets._own_classes(tmp_path / "classes.json", ["\udcff", "a\x1b[31m\nb"])
    assert str(raised.value).isprintable()
