"""What text guidance costs: training, inference and memory of both kinds of classifier, alternating; and their sizes.

The text-guided classifier has a normalised latent layer of E numbers and a head that starts at random: what texts the head
starts from changes no time and no size.
"""

import statistics
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common import SEED, seconds
from benchmarks.memory import peak_mb
from textguard.report.published import load_published
from textguard.runtime import pick_device
from textguard.vision.backbones import BACKBONES
from textguard.vision.classifiers import ClassifierSpec, build_classifier
from textguard.vision.evaluation import measure_cost

WIDTH = 512  # E, of CLIP's text encoders
IMAGENET_CLASSES = 1000
# Backbone, image side, classes, images in a training step, rounds.
CASES = [("resnet18", 32, 10, 64, 15), ("mobilenet_v2", 32, 10, 64, 15), ("resnet50", 224, IMAGENET_CLASSES, 8, 3)]
BATCHES = (1, 64)  # of inferences
VARIANTS = {"baseline": 0, "random": WIDTH}
PEAKS = ("training", "inference")
SIDE = 224  # of Table 1's images


def measure() -> dict[str, Any]:
    """Ratios text-guided / baseline: [median, lowest, highest] of the rounds; and the sizes of all backbones of Table 1."""
    return {"times": {f"{case[0]} at {case[1]}": _case(*case) for case in CASES}, "sizes": _sizes()}


def _classifier(backbone: str, side: int, classes: int, variant: str) -> nn.Module:
    names = tuple(f"class {number}" for number in range(classes))
    spec = ClassifierSpec("any", backbone, variant, side, side, "bilinear", VARIANTS[variant], names)
    return build_classifier(spec)


def _case(backbone: str, side: int, classes: int, batch: int, rounds: int) -> dict[str, Any]:
    torch.manual_seed(SEED)
    found: dict[str, Any] = {"batch": batch, "rounds": rounds}
    models = {variant: _classifier(backbone, side, classes, variant).to(pick_device()) for variant in VARIANTS}
    steps = {name: _step(model, *_batch(side, classes, batch)) for name, model in models.items()}
    found["training"] = _compare(steps, rounds)
    for size in BATCHES:
        images, _ = _batch(side, classes, size)
        found[f"inference_{size}"] = _compare({name: partial(infer, model, images) for name, model in models.items()}, rounds)
    arguments = [backbone, str(side), str(classes), str(batch)]
    for what in PEAKS:
        found[f"{what}_mb"] = {variant: _in_a_process(what, variant, *arguments) for variant in VARIANTS}
    return found


def _batch(side: int, classes: int, size: int) -> tuple[Tensor, Tensor]:
    images = torch.randn(size, 3, side, side, generator=torch.Generator().manual_seed(SEED))
    return images.to(pick_device()), (torch.arange(size) % classes).to(pick_device())


def _step(model: nn.Module, images: Tensor, labels: Tensor) -> Callable[[], None]:
    """One step of training with SGD and momentum."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)

    def step() -> None:
        model.train()
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()

    return step


@torch.inference_mode()
def infer(model: nn.Module, images: Tensor) -> Tensor:
    """The logits of these images."""
    return model.eval()(images)


def _compare(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, Any]:
    """Median seconds of both, and the ratios of each round. Who comes first alternates, so that a slow phase hits both."""
    for run in runs.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds):
        for name in list(runs)[:: 1 if number % 2 else -1]:
            times[name].append(seconds(runs[name]))
    ratios = [own / theirs for theirs, own in zip(*times.values(), strict=True)]
    middle = {f"{name}_s": statistics.median(found) for name, found in times.items()}
    return {**middle, "ratio": [statistics.median(ratios), min(ratios), max(ratios)]}


def _in_a_process(*arguments: str) -> float:
    """The peak of what one process takes beyond its model, in megabytes."""
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.guidance", *arguments]
    return float(subprocess.run(command, capture_output=True, encoding="utf-8", check=True).stdout)


def _sizes() -> dict[str, dict[str, Any]]:
    """Millions of parameters and multiply-adds of Table 1's backbones; what guidance adds to them, and what the paper says."""
    rows = [row for row in load_published() if row.place == "paper Table 1"]
    printed = {row.backbone: row.numbers for row in rows}
    found = {}
    for name in BACKBONES:
        sizes = {}
        for variant in VARIANTS:
            with torch.device("meta"):
                model = _classifier(name, SIDE, IMAGENET_CLASSES, variant)
                sizes[variant] = measure_cost(model, torch.empty(3, SIDE, SIDE))
        found[name] = {
            part: {
                "baseline": getattr(sizes["baseline"], part) / 1e6,
                "added": (getattr(sizes["random"], part) - getattr(sizes["baseline"], part)) / 1e6,
                "published": float(printed[name][part]) if name in printed and part in printed[name] else None,
            }
            for part in ("parameters", "multiply_adds")
        }
    return found


def lines(found: dict[str, Any] | None) -> list[str]:
    """What was measured, as Markdown; nothing where it was not."""
    if not found:
        return []
    shown = [
        "",
        f"Text guidance (E = {WIDTH}, a head that starts at random) beside the baseline, the lowest and the highest ratio of "
        "alternating rounds in brackets. Training: time of a step. Memory: the peak beyond the model, of a step and of an "
        f"inference of {BATCHES[-1]} images, each in a process of its own.",
        "",
        "| Model | Step of | Rounds | Training (x) | " + " | ".join(f"Inference of {size} (x)" for size in BATCHES) + " "
        "| Memory, training (x) | Memory, inference (x) |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, own in found["times"].items():
        ratios = [own[what]["ratio"] for what in ("training", *(f"inference_{size}" for size in BATCHES))]
        times = " | ".join(f"{middle:.3f} ({low:.3f} to {high:.3f})" for middle, low, high in ratios)
        memory = " | ".join(f"{own[f'{what}_mb']['random'] / own[f'{what}_mb']['baseline']:.3f}" for what in PEAKS)
        shown.append(f"| {name} | {own['batch']} | {own['rounds']} | {times} | {memory} |")
    shown += [
        "",
        f"Sizes of the backbones of the paper's Table 1, C = {IMAGENET_CLASSES:,}, E = {WIDTH}, {SIDE} pixels a side, "
        "in millions: the baseline's, what guidance adds, and what the paper says that it adds.",
        "",
        "| Backbone | Parameters | Added | Published | Multiply-adds | Added | Published |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, own in found["sizes"].items():
        cells = []
        for part in ("parameters", "multiply_adds"):
            said = own[part]["published"]
            cells += [f"{own[part]['baseline']:,.2f}", f"{own[part]['added']:+.2f}", "-" if said is None else f"{said:+.2f}"]
        shown.append(f"| {name} | {' | '.join(cells)} |")
    return shown


def _main(what: str, variant: str, backbone: str, side: str, classes: str, batch: str) -> None:
    torch.manual_seed(SEED)
    model = _classifier(backbone, int(side), int(classes), variant)
    size = int(batch) if what == "training" else BATCHES[-1]
    images, labels = _batch(int(side), int(classes), size)
    step = _step(model, images, labels)
    print(peak_mb(step if what == "training" else partial(infer, model, images)))


if __name__ == "__main__":
    _main(*sys.argv[1:])
