"""Injections per second: the replay engine against PyTorchFI 0.6.0 at its best and against the model's plain forward pass.

PyTorchFI runs as its best user would run it: declared once, in the memory format and with the batch size that a short trial
finds fastest. So does the plain forward pass. How often an engine may use a golden run depends on how many faults an image has,
so there is a plan for each of DENSITIES.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common import alternating, digits_classifier, draw_faults, random_classifier, seconds
from textguard.errors import UnsupportedModel
from textguard.faults.engines import PyTorchFIEngine, ReplayEngine

ROUNDS = 3
DENSITIES = (6, 32, 200)  # faults per image; 4,096 per layer on ImageNet's validation images are about 6
GOAL = 6.0  # times PyTorchFI
FORMATS = {"NCHW": torch.contiguous_format, "channels last": torch.channels_last}


@dataclass(frozen=True)
class Case:
    """A model and how it is run.

    make: from a number of images to the model and so many. images: per golden run, for each of DENSITIES. batch: faults per
    forward pass of the replay engine. candidates: batch sizes that PyTorchFI and the plain forward pass may choose from.
    """

    make: Callable[[int], tuple[nn.Module, Tensor]]
    images: tuple[int, int, int]
    batch: int
    candidates: tuple[int, ...]


def _digits(images: int) -> tuple[nn.Module, Tensor]:
    model, pictures = digits_classifier()
    return model, pictures[:images]


CASES = {
    "resnet18 at 32 x 32": Case(_digits, (360, 360, 64), 256, (64, 128, 256)),
    "resnet50 at 224 x 224": Case(partial(random_classifier, "resnet50", 224), (36, 12, 4), 32, (4, 8, 16)),
    "mobilenet_v2 at 224 x 224": Case(partial(random_classifier, "mobilenet_v2", 224), (36, 16, 8), 32, (8, 16, 32)),
    "vgg16_bn at 224 x 224": Case(partial(random_classifier, "vgg16_bn", 224), (8, 4, 1), 32, (4, 8)),
    "swin_v2_t at 224 x 224": Case(partial(random_classifier, "swin_v2_t", 224), (8, 2, 1), 16, (4, 8)),
}


@dataclass(frozen=True)
class Way:
    """How a model is run whole: its memory format, and how many images at a time."""

    memory_format: str
    batch: int

    def __str__(self) -> str:
        return f"{self.memory_format}, {self.batch} at a time"

    def arrange(self, model: nn.Module, pictures: Tensor) -> tuple[nn.Module, Tensor]:
        """Copies of both in the memory format."""
        chosen = FORMATS[self.memory_format]
        return copy.deepcopy(model).to(memory_format=chosen), pictures.clone(memory_format=chosen)


def measure(names: list[str]) -> dict[str, dict[str, Any]]:
    """For each case and density: injections/s of both engines, images/s of the plain forward pass, and their ratios."""
    return {name: _measure(CASES[name]) for name in names}


def _measure(case: Case) -> dict[str, Any]:
    model, pictures = case.make(max(*case.images, *case.candidates))
    replay = ReplayEngine(model, pictures[0], case.batch)
    of_density = dict(zip(DENSITIES, case.images, strict=True))
    faults = {density: draw_faults(replay, images, density * images) for density, images in of_density.items()}
    most = pictures[: max(case.images)]
    masked: dict[int, float] = {}

    def plain(way: Way) -> Callable[[], object]:
        return partial(_forward, *way.arrange(model, pictures[: max(case.candidates)]), way.batch)

    def carry_out(density: int) -> None:
        outcomes = replay.run(pictures[: of_density[density]], faults[density])
        masked[density] = float(outcomes.masked.float().mean())

    forward = _fastest(case, plain)
    runs = {
        **{density: partial(carry_out, density) for density in DENSITIES},
        "golden": lambda: replay.observe(most),
        "forward": plain(forward),
    }
    found: dict[str, Any] = {"layers": len(replay.sites), "forward": str(forward)}
    try:
        theirs = _their_faults(case, model, pictures, replay)
        way = _fastest(case, theirs)
        runs["pytorchfi"], found["pytorchfi"] = theirs(way), str(way)
    except UnsupportedModel as reason:
        found["pytorchfi"] = str(reason)
    times = alternating(runs, ROUNDS)
    per_image = times["forward"] / max(case.candidates)
    found["forward_images_per_s"] = 1 / per_image
    found["golden_forwards"] = times["golden"] / len(most) / per_image
    if "pytorchfi" in runs:
        found["pytorchfi_inferences_per_s"] = _inferences(case) / times["pytorchfi"]
    found["densities"] = {str(density): _of_density(found, density, images, times) for density, images in of_density.items()}
    for density, own in found["densities"].items():
        own["masked_share"] = masked[int(density)]
    return found


def _of_density(found: Mapping[str, Any], density: int, images: int, times: Mapping[Any, float]) -> dict[str, float]:
    """Injections/s and ratios. r: what a fault costs beyond the golden run, in forward passes of one image."""
    injections, forward = density * images, found["forward_images_per_s"]
    own = {"images": images, "injections": injections, "replay_per_s": injections / times[density]}
    own["times_forward"] = own["replay_per_s"] / forward
    own["r"] = (times[density] * forward - found["golden_forwards"] * images) / injections
    if "pytorchfi_inferences_per_s" in found:
        # Both run each image once without faults. Of PyTorchFI that costs as much as a fault, whichever one.
        own["pytorchfi_per_s"] = found["pytorchfi_inferences_per_s"] * density / (density + 1)
        own["times_pytorchfi"] = own["replay_per_s"] / own["pytorchfi_per_s"]
        own["bound"] = (1 + density) / (1 + density * own["r"])
    return own


def _their_faults(
    case: Case, model: nn.Module, pictures: Tensor, replay: ReplayEngine
) -> Callable[[Way], Callable[[], object]]:
    """From how PyTorchFI runs to its run of some of the faults of the densest plan. Raises UnsupportedModel."""
    images = case.images[-1]
    faults = draw_faults(replay, images, DENSITIES[-1] * images)
    count = _inferences(case) - images
    some, _ = faults.select((torch.arange(count) * (len(faults.position) / count)).long().to(pictures.device))

    def make(way: Way) -> Callable[[], object]:
        arranged, own = way.arrange(model, pictures[:images])
        engine = PyTorchFIEngine(arranged, own[0], way.batch)
        reached = [site for site in engine.sites if site in replay.sites]
        if len(reached) < len(replay.sites):
            raise UnsupportedModel(f"its hooks reach {len(reached)} of {len(replay.sites)} layers")
        return partial(engine.run, own, some)

    return make


def _inferences(case: Case) -> int:
    """How many PyTorchFI runs: two of its largest batches of faults, and each image without any."""
    return 2 * max(case.candidates) + case.images[-1]


def _ways(case: Case) -> Iterator[Way]:
    return (Way(name, size) for name in FORMATS for size in case.candidates)


def _fastest(case: Case, make: Callable[[Way], Callable[[], object]]) -> Way:
    """The way whose best of three runs is the shortest; the first one warms up."""

    def best(way: Way) -> float:
        run = make(way)
        return min(seconds(run) for _ in range(3))

    return min(_ways(case), key=best)


@torch.inference_mode()
def _forward(model: nn.Module, pictures: Tensor, batch: int) -> None:
    for some in pictures.split(batch):
        model(some)
