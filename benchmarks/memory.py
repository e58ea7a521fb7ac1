"""Peak memory: a campaign on ResNet-50 at 224 x 224 against a plain forward pass with as many images as faults per pass."""

import resource
import subprocess
import sys

import torch

from benchmarks.common import draw_faults, random_classifier
from textguard.faults.engines import ReplayEngine

BATCH = 32


def measure() -> dict[str, float]:
    """Megabytes above the loaded model, each measured in a process of its own, and their ratio."""
    megabytes = {what: _in_a_process(what) for what in ("forward", "replay")}
    return {**{f"{what}_mb": value for what, value in megabytes.items()}, "ratio": megabytes["replay"] / megabytes["forward"]}


def _in_a_process(what: str) -> float:
    done = subprocess.run([sys.executable, "-m", "benchmarks.memory", what], capture_output=True, text=True, check=True)
    return float(done.stdout)


def _peak_mb() -> float:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _main(what: str) -> None:
    model, images = random_classifier("resnet50", 224, BATCH)
    with torch.inference_mode():
        model(images[:1])
        engine = ReplayEngine(model, images[0], BATCH) if what == "replay" else None
        before = _peak_mb()
        if engine:
            # As many faults per layer and golden run as there are images in a plain pass.
            engine.run(images, draw_faults(engine, BATCH, BATCH))
        else:
            model(images)
    print(_peak_mb() - before)


if __name__ == "__main__":
    _main(sys.argv[1])
