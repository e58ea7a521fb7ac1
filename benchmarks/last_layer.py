"""The last layer in closed form: every output and every bit of 10,000 images with 10 classes."""

import torch
from torch import nn

from benchmarks.common import SEED, alternating
from textguard.faults.engines import ReplayEngine
from textguard.faults.exact import flip_logits

IMAGES, CLASSES = 10_000, 10


def measure() -> dict[str, float]:
    """Seconds for all faults, and how many there are."""
    torch.manual_seed(SEED)
    outputs, labels = torch.randn(IMAGES, CLASSES) * 5, torch.randint(CLASSES, (IMAGES,))
    engine = ReplayEngine(nn.Linear(16, CLASSES), torch.zeros(16), 1)
    times = alternating({"all": lambda: flip_logits(engine, outputs, 1.0, labels, 20.0)}, 5)
    return {"faults": IMAGES * CLASSES * 32, "seconds": times["all"]}
