"""Images in class folders as networks are tested on them, without any package but Pillow and torch."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from textguard.errors import InvalidArtifact, InvalidParameter, UnreadableImage, printable
from textguard.vision.image_files import ClassFolders, announce_left_out, decode, reason, shown

PARTS = ("train", "training", "test", "testing", "val", "valid", "validation")
GREY = (0.299, 0.587, 0.114)  # ITU-R BT.601, as Pillow converts


class ImageFolders(Dataset):
    """FOLDER/CLASS/*: [i] is (float32 [3 or 1, size, size], label). Labels count the folders in the order of their names.

    The shorter side is resized to `resize` with antialiasing, the centre cropped, the channels normalised, as in torchvision's
    references. mean, std: of 3 channels, for values from 0 to 1, or of 1, which makes the images grey.

    Raises InvalidArtifact where there are no such folders or images, InvalidParameter for sizes or channels that do not fit.
    """

    def __init__(self, root: Path, size: int, resize: int, mean: Sequence[float], std: Sequence[float]) -> None:
        if not 1 <= size <= resize:
            raise InvalidParameter(f"--size is {size} and --resize {resize}; 1 <= size <= resize is needed")
        if len(mean) != len(std) or len(mean) not in (1, 3) or not all(deviation > 0 for deviation in std):
            raise InvalidParameter(
                "--mean and --std must hold 3 numbers each, or 1 for grey images, and those of --std be above 0"
            )
        if not root.is_dir():
            raise InvalidArtifact(f"{shown(root)} is no folder; name one that holds a folder of images for each class")
        self.root, self.size, self.resize = root, size, resize
        self.mean, self.std = (torch.tensor(values, dtype=torch.float32)[:, None, None] for values in (mean, std))
        try:
            tree = ClassFolders(root)
            self.classes = tree.names()
            if inner := [name for name in self.classes if name.lower() in PARTS]:
                raise InvalidArtifact(f"{shown(root)} holds parts of a data set; name one of them: folder:{root / inner[-1]}")
            if len(self.classes) < 2:
                raise InvalidArtifact(f"{shown(root)} holds {len(self.classes)} class folders; at least 2 are needed")
            self.paths, labels = [], []
            for label, folder in enumerate(self.classes):
                found, others, example = tree.images("", folder)
                announce_left_out(root / folder, others, example)
                self.paths += found
                labels += [label] * len(found)
        except OSError as error:
            raise InvalidArtifact(f"{error.filename} cannot be read: {error.strerror}") from error
        self.labels = np.array(labels)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path = self.root / self.paths[index]
        try:
            pixels = torch.from_numpy(np.array(decode(path.read_bytes(), "exif").image)).permute(2, 0, 1)
        except Exception as error:
            raise UnreadableImage(f"{shown(path)} cannot be read ({printable(reason(error))}); mend or remove it") from error
        height, width = pixels.shape[1:]
        scale = self.resize / min(height, width)
        # The longer side is rounded down, and the pixels to whole numbers, as torchvision does.
        sides = [
            self.resize if side == min(height, width) else int(self.resize * side / min(height, width))
            for side in (height, width)
        ]
        if scale != 1:
            pixels = F.interpolate(pixels[None], sides, mode="bilinear", antialias=True)[0]
        top, left = (round((side - self.size) / 2) for side in pixels.shape[1:])
        image = pixels[:, top : top + self.size, left : left + self.size].float() / 255
        if len(self.mean) == 1:
            image = (image * torch.tensor(GREY)[:, None, None]).sum(dim=0, keepdim=True)
        return (image - self.mean) / self.std, int(self.labels[index])
