"""Images that got worse: noise, blur, contrast, brightness and JPEG in five severities, the same for every classifier.

Source: Hendrycks and Dietterich, ICLR 2019, whose strengths these are: those of CIFAR-10-C for small images, those of
ImageNet-C for larger ones, where the same severity is stronger. Two differ in how they work. Brightness is a factor here and a
summand of the HSV value there: the factor is what the summand makes of a value of one half. Contrast shrinks towards the mean
of grey values here, and of each channel there.
"""

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from textguard.errors import InvalidParameter, UnknownName
from textguard.vision.datasets import PackedSplit, Split
from textguard.vision.transforms import SMALL, EvaluationView, F

# Kind -> strengths of severity 1 to 5, for images of up to SMALL pixels a side, and for larger ones. Noise: standard deviation,
# of values from 0 to 1. Blur: the Gaussian's, in sides of the image. Contrast: what is left. Brightness: added to HSV's value.
# JPEG: quality.
STRENGTHS: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "noise": ((0.04, 0.06, 0.08, 0.09, 0.10), (0.08, 0.12, 0.18, 0.26, 0.38)),
    "blur": (
        tuple(pixels / 32 for pixels in (0.4, 0.6, 0.7, 0.8, 1.0)),
        tuple(pixels / 224 for pixels in (1.0, 2.0, 3.0, 4.0, 6.0)),
    ),
    "contrast": ((0.75, 0.5, 0.4, 0.3, 0.15), (0.4, 0.3, 0.2, 0.1, 0.05)),
    "brightness": ((0.05, 0.1, 0.15, 0.2, 0.3), (0.1, 0.2, 0.3, 0.4, 0.5)),
    "jpeg": ((80, 65, 58, 50, 40), (25, 18, 15, 10, 7)),
}
SEVERITIES = 5


@dataclass(frozen=True)
class Corruption:
    """One kind of corruption in one severity.

    kind: of STRENGTHS. severity: 1, the weakest, to 5. seed: of the noise, which depends on it and on the image's position
    alone. Raises UnknownName, InvalidParameter.
    """

    kind: str
    severity: int
    seed: int

    def __post_init__(self) -> None:
        if self.kind not in STRENGTHS:
            raise UnknownName("corruption", self.kind, STRENGTHS, "params.yaml corruptions.kinds")
        if self.severity not in range(1, SEVERITIES + 1):
            raise InvalidParameter(
                f"severity is {self.severity!r}; it must be from 1 to {SEVERITIES}; change it in params.yaml corruptions"
            )

    def apply(self, image: Tensor, index: int) -> Tensor:
        """The image at position `index` made worse: uint8 [1 or 3, S, S] to the same. Global generators stay as they were.

        >>> grey = torch.full((3, 32, 32), 100, dtype=torch.uint8)
        >>> int(Corruption("brightness", 5, seed=0).apply(grey, 0).max())  # 1.6 times as bright
        160
        """
        side = image.shape[-1]
        return _APPLY[self.kind](image, STRENGTHS[self.kind][side > SMALL][self.severity - 1], (self.seed, index))


def _noise(image: Tensor, strength: float, seeds: tuple[int, int]) -> Tensor:
    # The same noise in all severities, so that they differ in nothing but the strength.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(int(np.random.SeedSequence(seeds).generate_state(1, np.uint64)[0] >> np.uint64(1)))
        return F.gaussian_noise(image, sigma=strength)


def _blur(image: Tensor, strength: float, _: tuple[int, int]) -> Tensor:
    side = image.shape[-1]
    sigma = strength * side
    reach = min(math.ceil(4 * sigma), side - 1)  # beyond four deviations there is nothing; reflected images end at their side
    return F.gaussian_blur(image, [2 * reach + 1] * 2, [sigma, sigma])


def _contrast(image: Tensor, strength: float, _: tuple[int, int]) -> Tensor:
    return F.adjust_contrast(image, strength)


def _brightness(image: Tensor, strength: float, _: tuple[int, int]) -> Tensor:
    return F.adjust_brightness(image, 1 + 2 * strength)


def _jpeg(image: Tensor, strength: float, _: tuple[int, int]) -> Tensor:
    # By Pillow: torchvision's own needs its compiled library, which does not load beside every build of torch.
    file, pixels = io.BytesIO(), image.permute(1, 2, 0).numpy()
    Image.fromarray(pixels[..., 0] if len(image) == 1 else pixels).save(file, "jpeg", quality=int(strength))
    with Image.open(file, formats=["JPEG"]) as read:
        return torch.from_numpy(np.array(read)).reshape(pixels.shape).permute(2, 0, 1)


_APPLY: dict[str, Callable[[Tensor, float, tuple[int, int]], Tensor]] = {
    "noise": _noise,
    "blur": _blur,
    "contrast": _contrast,
    "brightness": _brightness,
    "jpeg": _jpeg,
}


class CorruptedView(EvaluationView):
    """A split as networks are tested, with corrupted images: resized and cropped, made worse, then normalised.

    See `evaluation_view` for the arguments that it shares. An image is the same in any batch and process. Images of a split in
    memory that are kept resized are corrupted once.
    """

    def __init__(self, split: Split, image_size: int, resize_size: int, interpolation: str, corruption: Corruption) -> None:
        super().__init__(split, image_size, resize_size, interpolation)
        self.corruption = corruption
        if self.prepared is not None:
            # One by one: a convolution of many images may round otherwise than that of one.
            self.prepared = torch.stack([corruption.apply(image, index) for index, image in enumerate(self.prepared)])

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[Tensor, int]]:
        if self.prepared is not None:
            return super().__getitems__(indices)
        indices = [int(index) for index in indices]
        images = [self._normalise(self.corruption.apply(self._fit(self._raw(index)), index)) for index in indices]
        return list(zip(images, self.split.labels[indices].tolist(), strict=True))

    def _raw(self, index: int) -> Tensor:
        """uint8 [1 or 3, H, W], with as many channels whether images are kept resized or not."""
        return self.split.images[index] if isinstance(self.split, PackedSplit) else self.split[index][0]
