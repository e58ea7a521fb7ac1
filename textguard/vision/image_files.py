"""Image files from anywhere: which files of class folders are images, and what their pixels are.

Such files may be damaged, hostile or simply odd. Only the formats below are decoded, only regular files are read, no folder is
walked twice, and what cannot be shown in 8 bits per channel without a guess is refused.
"""

import io
import logging
import os
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from textguard.errors import InvalidArtifact, printable
from textguard.runtime import announce

# What Pillow logs of a damaged file it also raises. Without a handler it would be on stderr twice.
logging.getLogger("PIL").addHandler(logging.NullHandler())

# An allow-list, because Pillow goes by content: it would hand a file x.jpg that holds PostScript to Ghostscript.
FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP")
EXTENSIONS = (
    ".jpg",
    ".jpeg",
    ".png",
    ".ppm",
    ".bmp",
    ".pgm",
    ".tif",
    ".tiff",
    ".webp",
)  # as torchvision's ImageFolder has them
MODES = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr")  # 8 bits per channel, or fewer
ORIENTATIONS = ("stored", "exif")
EXIF_ORIENTATION = 0x0112
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
SIDEWAYS = (5, 6, 7, 8)
# What machines leave beside images, apart from names that start with a dot: Macs' archives, network storage, Windows.
LEFT_BY_MACHINES = ("__macosx", "@eadir", "#recycle", "$recycle.bin", "thumbs.db", "desktop.ini")


@dataclass(frozen=True)
class Decoded:
    """An image as it is used. image: RGB. size: width and height of the whole picture, in pixels.

    turned: its EXIF says that it is to be turned, and it was not. transparent: it has transparent pixels, whose colours are
    used. deep: it has 16 bits per channel, of which the upper 8 are used.
    """

    image: Image.Image
    size: tuple[int, int]
    turned: bool
    transparent: bool
    deep: bool


def decode(content: bytes, orientation: str, *, small: bool = False) -> Decoded:
    """The picture that the bytes hold, as RGB with 8 bits per channel. Raises whatever Pillow does, and ValueError.

    orientation: `stored` takes the pixels as they lie in the file, `exif` turns them as the file's EXIF says. (TIFF states its
    orientation itself, and Pillow always turns it.) small: a JPEG is read to its end, but decoded at an eighth of its size.

    Transparency is dropped, as torchvision's loader does. 16 bits per channel become 8 where the format says which value is
    white: PNG and PPM; in TIFF it is anybody's guess how many of the 16 the camera has filled.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Pillow, about metadata that nobody reads, and about sizes below its limit
        try:
            image = Image.open(io.BytesIO(content), formats=FORMATS)
        except UnidentifiedImageError as error:
            raise ValueError(f"it is no {', '.join(FORMATS[:-1])} or {FORMATS[-1]}") from error
        # The pictures behind the first of a camera's JPEG (MPO) are previews of it.
        if getattr(image, "is_animated", False) and image.format != "MPO":
            raise ValueError("it holds several pictures; keep one of them")
        size = image.size
        if small:
            image.draft("RGB", (1, 1))
        image.load()
        turn = _exif_orientation(image)
        deep = image.mode.startswith("I") and image.format in ("PNG", "PPM")
        if deep:
            colours = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
        elif image.mode in MODES:
            colours = image.convert("RGB")
        else:
            raise ValueError(
                f"its pixels are {image.format} {image.mode}, where any value may be white; save it with 8 bits per channel"
            )
        transparent = False
        if not deep and image.has_transparency_data:
            lowest, highest = image.convert("RGBA").getchannel("A").getextrema()
            transparent = lowest < 255
            if lowest < highest and all(low == high for low, high in colours.getextrema()):
                raise ValueError("all of its picture lies in its transparency, which is not used; save it without")
    if orientation == "exif" and turn in TURNS:
        colours = colours.transpose(TURNS[turn])
        size = size[::-1] if turn in SIDEWAYS else size
    return Decoded(colours, size, orientation == "stored" and turn in TURNS, transparent, deep)


def _exif_orientation(image: Image.Image) -> int:
    """What EXIF says of a loaded image; 1, upright, where it says nothing that can be read."""
    try:
        found = image.getexif().get(EXIF_ORIENTATION)
    except Exception:  # damaged metadata make no worse picture
        return 1
    return found if isinstance(found, int) else 1


def reason(error: BaseException) -> str:
    """Why an image cannot be read, in one line."""
    said = str(error) or "it needs more memory than there is" if isinstance(error, MemoryError) else str(error)
    known = isinstance(error, ValueError) and said.startswith("it")
    return printable(said if known else f"{type(error).__name__}: {said}", 160)


@dataclass
class ClassFolders:
    """Class folders below `root`, looked through once. seen: the folders so far, by device and inode."""

    root: Path
    seen: dict[tuple[int, int], str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for place in self.root.resolve().parents:  # a link to one of them would lead back to the root
            self.mark(str(place))

    def names(self, part: str = "") -> list[str]:
        """The folders in root/part, sorted, without those that are hidden or left by machines. Raises InvalidArtifact."""
        found = sorted(name for name, is_folder in _entries(self.root / part) if is_folder and _is_visible(name))
        for name in found:
            self._check_name(str(Path(part, name)))
        return found

    def images(self, part: str, folder: str) -> tuple[list[str], Counter[str], str]:
        """The images of root/part/folder and of the folders in it, relative to the root, in torchvision's order.

        Files that are no images by their names are counted by extension, and one of them is named; `hidden` counts what is
        hidden or left by machines. Raises InvalidArtifact for a name that is no UTF-8, for a link to a folder that was walked
        before (as one to a folder that holds it), and for a folder without images; OSError for one that cannot be entered.
        """
        found, others, example = [], Counter(), ""
        for place, files in sorted(self._walk(str(Path(part, folder)))):
            for name in sorted(files):
                path = f"{place}/{name}"
                if not _is_visible(name):
                    others["hidden"] += 1
                elif name.lower().endswith(EXTENSIONS):
                    self._check_name(path)
                    found.append(path)
                else:
                    others[printable(Path(name).suffix.lower(), 12) or "no extension"] += 1
                    example = example or path
        if not found:
            where, held = shown(self.root / part / folder), f"only {counted(others)}" if others else "nothing"
            raise InvalidArtifact(f"class folder {where} holds {held}; it must hold images ({', '.join(EXTENSIONS)})")
        return found, others, example

    def mark(self, place: str) -> None:
        """Remember a folder below the root. Raises InvalidArtifact where it was walked already, under this or another name."""
        state = (self.root / place).stat()
        before = self.seen.setdefault((state.st_dev, state.st_ino), place)
        if before != place:
            raise InvalidArtifact(
                f"{shown(self.root / place)} is the same folder as {shown(self.root / before)}, and no image may count twice; "
                "remove the link"
            )

    def _walk(self, top: str) -> Iterator[tuple[str, list[str]]]:
        """Folders below the root and the names of what is in each but further folders; hidden folders are such names, too."""
        waiting = [top]
        while waiting:
            place = waiting.pop()
            self.mark(place)
            files = []
            for name, is_folder in _entries(self.root / place):
                if is_folder and _is_visible(name):
                    waiting.append(f"{place}/{name}")
                else:
                    files.append(name)
            yield place, files

    def _check_name(self, path: str) -> None:
        try:
            path.encode()
        except UnicodeEncodeError:
            raise InvalidArtifact(f"{shown(self.root / path)} has a name that is no UTF-8; rename it") from None
        if not path.isascii() and sys.getfilesystemencoding().lower() != "utf-8":
            raise InvalidArtifact(
                f"{shown(self.root / path)} has a name that is no UTF-8 in this locale; set LC_ALL=C.UTF-8, or PYTHONUTF8=1"
            )


def _entries(folder: Path) -> list[tuple[str, bool]]:
    """Names in a folder, and whether each is a folder or leads to one. Most need no look at the file itself."""
    with os.scandir(folder) as entries:
        return [(entry.name, _is_folder(entry)) for entry in entries]


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # as of a link to itself
        return False


def _is_visible(name: str) -> bool:
    return not name.startswith(".") and name.lower() not in LEFT_BY_MACHINES


def shown(path: Path) -> str:
    """A path for a message: bytes that are no UTF-8 as escapes, no control characters."""
    return printable(os.fsencode(path).decode("utf-8", "backslashreplace"), 400)


def counted(kinds: Counter[str]) -> str:
    """For example `3 .gif, 1 .heic`: the five most frequent, and how many of others."""
    most = kinds.most_common(5)
    rest = kinds.total() - sum(count for _, count in most)
    return ", ".join([f"{count} {kind}" for kind, count in most] + [f"{rest} others"] * bool(rest))


def announce_left_out(where: Path, others: Counter[str], example: str) -> None:
    """Say which files are no images by their names, where there are any."""
    if others:
        named = f" (as {printable(example)})" if example else ""
        announce(f"{shown(where)}: left out, as their names are not those of images: {counted(others)}{named}")
