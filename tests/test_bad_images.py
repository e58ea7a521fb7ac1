"""Bad input: image files that are damaged, hostile or odd. Each comes out with the right pixels, or is refused in one line."""

import ast
import io
import os
import socket
import struct
import zlib
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image, ImageOps

from conftest import REPOSITORY
from textguard.artifacts import MOST_BYTES, read_regular
from textguard.errors import InvalidArtifact, UnreadableImage
from textguard.vision import datasets
from textguard.vision.datasets import IndexedSplit, Part, index_files, load_split, make_splits, read_source, save_splits
from textguard.vision.image_files import decode, reason

GREY = np.arange(0, 240, 4, dtype=np.uint8).reshape(6, 10)
RGB = np.stack([GREY, GREY[::-1], GREY[:, ::-1]], axis=-1)
ALPHA = np.full_like(GREY, 255)
ALPHA[0] = 0
OPTIONS = {"source": "folder", "checksum": False, "corrupt_share": 0.0}
SPLIT = {"test_share": 0.5, "split_seed": 0, "limit_train": 0, "limit_test": 0}


def stored(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def png(width: int, height: int, depth: int, colour: int, rows: bytes) -> bytes:
    """A PNG of any depth. rows: each begins with its filter, 0."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def png16(pixels: np.ndarray, colour: int) -> bytes:
    """A PNG with 16 bits per channel whose 8-bit version is `pixels`."""
    deep = (pixels.astype(">u2") * 257).reshape(len(pixels), -1)
    return png(pixels.shape[1], len(pixels), 16, colour, b"".join(b"\0" + row.tobytes() for row in deep))


def with_alpha(pixels: np.ndarray) -> np.ndarray:
    return np.dstack([pixels, ALPHA])


def palette(transparent: bool) -> bytes:
    image = Image.fromarray(GREY).convert("P")
    return stored(image, transparency=bytes([0, *[255] * 255])) if transparent else stored(image)


def pgm(most: int, values: np.ndarray) -> bytes:
    return f"P5 10 6 {most}\n".encode() + values.astype(">u2" if most > 255 else np.uint8).tobytes()


READ = {  # the file, and its pixels as RGB (or grey)
    "grey": (stored(Image.fromarray(GREY)), GREY),
    "colours": (stored(Image.fromarray(RGB)), RGB),
    "16-bit grey PNG": (png16(GREY, 0), GREY),
    "16-bit colour PNG": (png16(RGB, 2), RGB),
    "16-bit grey PNG with alpha": (png16(with_alpha(GREY), 4), GREY),
    "16-bit colour PNG with alpha": (png16(with_alpha(RGB), 6), RGB),
    "16-bit PGM": (pgm(65535, GREY.astype(int) * 257), GREY),
    "12-bit PGM": (pgm(4095, np.rint(GREY * (4095 / 255))), GREY),
    "1-bit PNG": (stored(Image.fromarray(GREY > 99)), (GREY > 99) * np.uint8(255)),
    "1-bit TIFF": (stored(Image.fromarray(GREY > 99), "TIFF"), (GREY > 99) * np.uint8(255)),
    "grey with alpha": (stored(Image.fromarray(with_alpha(GREY), "LA")), GREY),
    "colours with alpha": (stored(Image.fromarray(with_alpha(RGB))), RGB),
    "palette": (palette(transparent=False), GREY),
    "palette with transparency": (palette(transparent=True), GREY),
    "CMYK": (stored(Image.fromarray(RGB).convert("CMYK"), "TIFF"), RGB),
    "WebP": (stored(Image.fromarray(RGB), "WEBP", lossless=True), RGB),
    "BMP": (stored(Image.fromarray(RGB), "BMP"), RGB),
    "camera's JPEG with previews": (
        stored(Image.new("RGB", (10, 6), "white"), "MPO", save_all=True, append_images=[Image.new("RGB", (4, 4))]),
        np.full_like(RGB, 255),
    ),
}


@pytest.mark.parametrize(("content", "pixels"), READ.values(), ids=READ)
def test_odd_images_have_the_right_pixels(content, pixels):
    expected = pixels if pixels.ndim == 3 else np.stack([pixels] * 3, axis=-1)
    for small in (False, True):
        found = decode(content, "stored", small=small)
        assert found.image.mode == "RGB"
        assert found.size == (10, 6)
    exact = decode(content, "stored").image
    np.testing.assert_allclose(np.array(exact).astype(int), expected.astype(int), atol=1 if content[:2] == b"P5" else 0)


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 40 40\n%%EndComments\nshowpage\n"
NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 60, 3), dtype=np.uint8))
FRAMES = {"save_all": True, "append_images": [Image.fromarray(GREY[::-1].copy())]}
REFUSED = {  # the file, and what is said of it
    "nothing": (b"", "it is no JPEG, PNG, PPM, BMP, TIFF or WEBP"),
    "a web page": (b"<html>404</html>", "it is no JPEG"),
    "PostScript": (EPS, "it is no JPEG"),
    "a GIF": (stored(Image.fromarray(GREY), "GIF"), "it is no JPEG"),
    "an icon": (stored(Image.fromarray(GREY), "ICO"), "it is no JPEG"),
    "a Targa": (stored(Image.fromarray(GREY), "TGA"), "it is no JPEG"),
    "half a PNG": (stored(NOISE)[:5000], "truncated"),
    "half a JPEG": (stored(NOISE, "JPEG")[:2000], "truncated"),
    "an animated PNG": (stored(Image.fromarray(GREY), "PNG", **FRAMES), "it holds several pictures"),
    "an animated WebP": (stored(Image.fromarray(RGB), "WEBP", lossless=True, **FRAMES), "it holds several pictures"),
    "a TIFF of two pages": (stored(Image.fromarray(GREY), "TIFF", **FRAMES), "it holds several pictures"),
    "a 16-bit TIFF": (stored(Image.fromarray(GREY.astype(np.uint16)), "TIFF"), "save it with 8 bits"),
    "a 32-bit TIFF": (stored(Image.fromarray(GREY.astype(np.int32)), "TIFF"), "save it with 8 bits"),
    "a TIFF of real numbers": (stored(Image.fromarray(GREY.astype(np.float32)), "TIFF"), "save it with 8 bits"),
    "a PFM": (b"Pf\n10 6\n-1.0\n" + GREY.astype("<f4").tobytes(), "save it with 8 bits"),
    "colours that Pillow does not convert": (stored(Image.fromarray(RGB, "LAB"), "TIFF"), "save it with 8 bits"),
    "black on nothing": (stored(Image.fromarray(np.dstack([RGB * 0, GREY]))), "lies in its transparency"),
    "a bomb of 400 million pixels": (png(20000, 20000, 8, 0, b""), "400000000 pixels"),
}


@pytest.mark.parametrize(("content", "part"), REFUSED.values(), ids=REFUSED)
def test_what_is_no_picture_to_learn_from_is_refused(content, part, tmp_path):
    (tmp_path / "x.jpg").write_bytes(content)
    for small in (True, False):  # when the index is made, and when it is read
        with pytest.raises(Exception) as raised:  # noqa: PT011 (whatever Pillow raises)
            decode(content, "stored", small=small)
        line = reason(raised.value)
        assert part in line
        assert "object at" not in line
    looked = datasets._look(tmp_path, "stored", "x.jpg")
    assert looked[4] == line


def test_every_image_is_opened_with_a_list_of_formats():
    opened = 0
    for path in [*(REPOSITORY / "textguard").rglob("*.py"), *(REPOSITORY / "stages").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "Image.open":
                assert "formats" in {keyword.arg for keyword in node.keywords}, f"{path}:{node.lineno}"
                opened += 1
    assert opened


def test_no_file_starts_a_program(tmp_path, monkeypatch):
    script, started = tmp_path / "bin" / "gs", tmp_path / "started"
    script.parent.mkdir()
    script.write_text(f"#!/bin/sh\ntouch {started}\n", encoding="utf-8")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{script.parent}:{os.environ['PATH']}")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    for number in range(2):
        (tmp_path / f"{number}.jpg").write_bytes(EPS if number else stored(Image.fromarray(RGB), "JPEG"))
    part = Part(np.array(["0.jpg", "1.jpg"], object), np.zeros(2, int))
    table = index_files(part, tmp_path, corrupt_share=0.5, orientation="stored", label="test")
    assert table["path"].tolist() == ["0.jpg"]
    assert not started.exists()
    with pytest.raises(OSError):  # noqa: PT011 (the stand-in draws nothing)
        Image.open(tmp_path / "1.jpg").load()
    assert started.exists(), "Pillow alone would have started it"


def a_pipe(path: Path) -> None:
    os.mkfifo(path)


def a_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def a_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        here = Path.cwd()
        os.chdir(path.parent)  # the paths of sockets are short
        server.bind(path.name)
        os.chdir(here)


def a_dangling_link(path: Path) -> None:
    path.symlink_to("nowhere")


def a_link_to_itself(path: Path) -> None:
    path.symlink_to(path.name)


def a_huge_file(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(MOST_BYTES + 1)  # without taking any space


def a_folder(path: Path) -> None:
    path.mkdir()


IN_THE_WAY = {
    a_pipe: "it is no regular file",
    a_device: "it is no regular file",
    a_socket: "it is no regular file",
    a_folder: "it is no regular file",
    a_dangling_link: "No such file",
    a_link_to_itself: "symbolic links",
    a_huge_file: "1,073,741,824 are the most",
}


@pytest.mark.parametrize(("put", "part"), IN_THE_WAY.items(), ids=[put.__name__ for put in IN_THE_WAY])
def test_only_regular_files_are_read(put, part, tmp_path):
    put(tmp_path / "x.png")
    with pytest.raises((ValueError, OSError), match=part):
        read_regular(tmp_path / "x.png")
    assert part in datasets._look(tmp_path, "stored", "x.png")[4]


def own_folder(root: Path, files: dict[str, bytes]) -> Path:
    """Class folders with these files beside three good images of each class."""
    for label, folder in enumerate(("cat", "dog")):
        (root / folder).mkdir(parents=True)
        for number in range(3):
            Image.fromarray(RGB + np.uint8(3 * label + number)).save(root / folder / f"{number}.png")
    for name, content in files.items():
        (root / name).write_bytes(content)
    return root


def store(folder: Path, root: Path, orientation: str = "stored") -> IndexedSplit:
    content = read_source("folder", root)
    save_splits(folder, content, make_splits(content, "folder", **SPLIT), root, **OPTIONS, orientation=orientation)
    return load_split(folder, "train", root)


def test_a_pipe_among_the_images_is_named_and_nothing_is_written(tmp_path):
    root = own_folder(tmp_path / "own", {})
    os.mkfifo(root / "cat" / "p.png")
    with pytest.raises(InvalidArtifact, match=r"1 of .* images .*corrupt \(cat/p\.png: it is no regular file\).*corrupt_share"):
        store(tmp_path / "data", root)
    assert not (tmp_path / "data").exists()


def test_an_image_that_became_a_pipe_is_named(tmp_path):
    train = store(tmp_path / "data", own_folder(tmp_path / "own", {}))
    photo = train.root / train.paths[0]
    photo.unlink()
    os.mkfifo(photo)
    with pytest.raises(UnreadableImage, match=f"{photo} cannot be read .it is no regular file"):
        train[0]


def turned(orientation: object, kind: str = "JPEG") -> bytes:
    image = Image.fromarray(RGB)
    exif = image.getexif()
    exif[0x0112] = orientation
    return stored(image, kind, exif=exif, **({"quality": 95} if kind == "JPEG" else {"lossless": True}))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(10))
def test_exif_turns_an_image_where_it_is_asked_to(orientation, kind):
    content = turned(orientation, kind)
    raw = Image.open(io.BytesIO(content), formats=[kind])
    as_stored, upright = (decode(content, how) for how in ("stored", "exif"))
    np.testing.assert_array_equal(np.array(as_stored.image), np.array(raw.convert("RGB")))
    np.testing.assert_array_equal(np.array(upright.image), np.array(ImageOps.exif_transpose(raw).convert("RGB")))
    assert upright.size == upright.image.size == ((6, 10) if orientation in (5, 6, 7, 8) else (10, 6))
    assert (as_stored.turned, upright.turned) == (2 <= orientation <= 8, False)


@pytest.mark.parametrize("damage", [b"", b"Exif\0\0", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff", b"Exif\0\0II*\0" + b"\xff" * 40])
def test_damaged_exif_makes_no_worse_picture(damage):
    plain = stored(Image.fromarray(RGB), "JPEG")
    content = plain[:2] + b"\xff\xe1" + struct.pack(">H", len(damage) + 2) + damage + plain[2:]
    for how in ("stored", "exif"):
        found = decode(content, how)
        np.testing.assert_array_equal(np.array(found.image), np.array(decode(plain, how).image))
        assert not found.turned


def test_what_is_odd_about_images_is_counted_and_announced(tmp_path, capsys):
    odd = {
        "cat/a.jpg": turned(6),
        "dog/b.jpg": turned(3),
        "cat/c.png": stored(Image.fromarray(with_alpha(RGB))),
        "cat/d.png": png16(GREY, 0),
    }
    root = own_folder(tmp_path / "own", odd)
    store(tmp_path / "data", root)
    said = [line for line in capsys.readouterr().err.splitlines() if " images " in line]
    counts = {
        oddity: sum(int(line.split(": ")[1].split()[0]) for line in said if part in line)
        for oddity, part in {"turned": "datasets.*.orientation: exif", "transparent": "transparent", "deep": "16 bits"}.items()
    }
    assert counts == {"turned": 2, "transparent": 1, "deep": 1}
    store(tmp_path / "upright", root, "exif")
    assert "EXIF" not in capsys.readouterr().err


def test_an_index_says_how_its_images_are_turned(tmp_path):
    root = own_folder(tmp_path / "own", {f"{folder}/{n}.png": turned(6, "PNG") for folder in ("cat", "dog") for n in range(3)})
    for number, path in enumerate(sorted(root.rglob("*.png"))):  # no two alike
        path.write_bytes(path.read_bytes() + bytes([number]))
    shapes = {how: store(tmp_path / how, root, how)[0][0].shape for how in ("stored", "exif")}
    assert shapes == {"stored": (3, 6, 10), "exif": (3, 10, 6)}


def test_an_image_too_large_for_the_memory_is_named(tmp_path, monkeypatch):
    own_folder(tmp_path, {})

    def no_memory(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr(datasets, "decode", no_memory)
    assert datasets._look(tmp_path, "stored", "cat/0.png")[4] == "MemoryError: it needs more memory than there is"


def test_a_killed_reader_ends_in_one_line(tmp_path, monkeypatch):
    class Killed:
        def __init__(self, _: int) -> None:
            pass

        def __enter__(self) -> "Killed":
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def map(self, *_: object, **__: object) -> None:
            yield 10, 6, 1, "", "", False, False, False
            raise BrokenProcessPool

    monkeypatch.setattr(datasets, "ProcessPoolExecutor", Killed)
    part = Part(np.array(["a.jpg", "b.jpg"], object), np.zeros(2, int))
    with pytest.raises(InvalidArtifact, match=r"was killed.*b\.jpg.*TEXTGUARD_WORKERS"):
        index_files(part, tmp_path, corrupt_share=0, orientation="stored", label="test")
