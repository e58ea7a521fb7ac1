"""Peak memory on the CPU (Linux): a campaign on ResNet-50 at 224 x 224 against a plain forward pass with the same batch."""

import ctypes
import gc
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.common import draw_faults, random_classifier
from textguard.faults.engines import ReplayEngine

BATCH = 32


def measure() -> dict[str, float]:
    """Megabytes above the loaded model, each measured in a process of its own, and their ratio."""
    megabytes = {what: _in_a_process(what) for what in ("forward", "replay")}
    return {**{f"{what}_mb": value for what, value in megabytes.items()}, "ratio": megabytes["replay"] / megabytes["forward"]}


def _in_a_process(what: str) -> float:
    done = subprocess.run([sys.executable, "-m", "benchmarks.memory", what], capture_output=True, encoding="utf-8", check=True)
    return float(done.stdout)


def _memory_mb(field: str) -> float:
    """This process's memory as Linux counts it: VmRSS now, VmHWM at its highest since the last reset."""
    (line,) = [
        line for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines() if line.startswith(f"{field}:")
    ]
    return int(line.split()[1]) / 1024


def peak_mb(run: Callable[[], object]) -> float:
    """Megabytes that `run` takes at most, above what this process holds before it. Linux alone."""
    # Making a model took memory too: give it back, and forget that it was ever used.
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    before = _memory_mb("VmRSS")
    run()
    return _memory_mb("VmHWM") - before


def _main(what: str) -> None:
    model, images = random_classifier("resnet50", 224, BATCH)
    engine = ReplayEngine(model, images[0], BATCH) if what == "replay" else None
    with torch.inference_mode():
        if engine:
            # As many faults per layer and golden run as there are images in a plain pass.
            print(peak_mb(lambda: engine.run(images, draw_faults(engine, BATCH, BATCH * len(engine.sites)))))
        else:
            print(peak_mb(lambda: model(images)))


if __name__ == "__main__":
    _main(sys.argv[1])
