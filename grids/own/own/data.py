"""Data of one's own, which params.yaml names as `module:own.data:splits`. Replace them with yours.

DVC watches this file, and not the files that it reads: change something here, or run `dvc repro --force data`, when those do.
"""

import numpy as np

SIDE = 16
CLASSES = ["square", "disc", "cross"]


def splits() -> dict:
    """Training and test images with their labels, and the names of the classes.

    Each part is a tuple (images, labels), or a map-style data set of (image, label). Images are uint8, or floats from 0 to 1
    that are not normalised: [N, H, W], [N, 1 or 3, H, W] or [N, H, W, 1 or 3]. Where there is only one part, call it "all".
    """
    draw = np.random.default_rng(0)
    return {"train": drawn(240, draw), "test": drawn(60, draw), "classes": CLASSES}


def drawn(count: int, draw: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """White shapes in noise, uint8 [count, SIDE, SIDE], and which they are, int64 [count]."""
    labels = np.arange(count) % len(CLASSES)
    images = draw.uniform(0, 0.3, (count, SIDE, SIDE))
    rows, columns = np.mgrid[:SIDE, :SIDE]
    for image, label in zip(images, labels, strict=True):
        down, right = (abs(axis - draw.integers(4, SIDE - 4)) for axis in (rows, columns))
        inside = [np.maximum(down, right) <= 3, np.hypot(down, right) <= 3, (np.minimum(down, right) < 1) & (down + right <= 3)]
        image[inside[label]] = 0.9
    return np.rint(images * 255).astype(np.uint8), labels
