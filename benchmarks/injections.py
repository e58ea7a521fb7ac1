"""Injections per second: the replay engine against PyTorchFI 0.6.0 and against the model's plain forward pass."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common import alternating, digits_classifier, draw_faults, random_classifier, seconds
from textguard.errors import UnsupportedModel
from textguard.faults.engines import PyTorchFIEngine, ReplayEngine

ROUNDS = 3


@dataclass(frozen=True)
class Case:
    """A model and a plan.

    per_layer: injections. batch: faults per forward pass. candidates: batch sizes that PyTorchFI may choose from. every: it
    runs one injection in so many, where all would take minutes.
    """

    make: Callable[[], tuple[nn.Module, Tensor]]
    images: int
    per_layer: int
    batch: int
    candidates: tuple[int, ...]
    every: int = 8


CASES = {
    "resnet18 at 32 x 32": Case(digits_classifier, 40, 400, 256, (32, 64, 128, 256), every=1),
    "resnet50 at 224 x 224": Case(partial(random_classifier, "resnet50", 224, 8), 8, 32, 32, (8, 16, 32)),
    "mobilenet_v2 at 224 x 224": Case(partial(random_classifier, "mobilenet_v2", 224, 8), 8, 32, 32, (8, 16, 32)),
    "vgg16_bn at 224 x 224": Case(partial(random_classifier, "vgg16_bn", 224, 8), 8, 8, 32, (8, 16)),
    "swin_v2_t at 224 x 224": Case(partial(random_classifier, "swin_v2_t", 224, 8), 8, 6, 16, (8, 16)),
}


def measure(names: list[str]) -> dict[str, dict[str, Any]]:
    """For each case: injections/s of both engines, images/s of the plain forward pass, and their ratios."""
    return {name: _measure(CASES[name]) for name in names}


def _measure(case: Case) -> dict[str, Any]:
    model, pictures = case.make()
    pictures = pictures[: case.images]
    replay = ReplayEngine(model, pictures[0], case.batch)
    faults = draw_faults(replay, case.images, case.per_layer)
    some, _ = faults.select(torch.arange(len(faults.position), device=pictures.device)[:: case.every])
    runs = {"replay": lambda: replay.run(pictures, faults), "forward": partial(_forward, model, pictures)}
    found: dict[str, Any] = {
        "layers": len(replay.sites),
        "injections": len(faults.position),
        "images": case.images,
        "masked_share": float(replay.run(pictures, faults).masked.float().mean()),
    }
    try:
        engines = {size: PyTorchFIEngine(model, pictures[0], size) for size in case.candidates}
        reached = [site for site in next(iter(engines.values())).sites if site in replay.sites]
        if len(reached) < len(replay.sites):
            raise UnsupportedModel(f"its hooks reach {len(reached)} of {len(replay.sites)} layers")
        few, _ = some.select(torch.arange(min(len(some.position), 2 * max(case.candidates)), device=pictures.device))
        best = min(engines, key=lambda size: seconds(lambda: engines[size].run(pictures, few)))
        runs["pytorchfi"] = lambda: engines[best].run(pictures, some)
        found["pytorchfi_batch"] = best
    except UnsupportedModel as reason:
        found["pytorchfi"] = str(reason)
    times = alternating(runs, ROUNDS)
    found["replay_per_s"] = len(faults.position) / times["replay"]
    found["forward_images_per_s"] = case.images / times["forward"]
    found["times_forward"] = found["replay_per_s"] / found["forward_images_per_s"]
    if "pytorchfi" in times:
        found["pytorchfi_per_s"] = len(some.position) / times["pytorchfi"]
        found["times_pytorchfi"] = found["replay_per_s"] / found["pytorchfi_per_s"]
    return found


@torch.inference_mode()
def _forward(model: nn.Module, pictures: Tensor) -> None:
    model(pictures)
