"""Where a campaign's time goes on the CPU: the share outside of convolutions, matrix products and data movement.

Time in operators is the profiler's: each operator's own, without those it calls. The time that it is a share of is a run's
without the profiler, which would else be counted with what it watches: it adds to every one of some ten thousand calls.
Movement is reading, writing and copying values from one place to another. All else is `other`: Python, torch's dispatcher, the
bookkeeping of damage and masking, and also the network's own activations, additions, normalisation and pooling.
"""

import statistics

from torch.profiler import ProfilerActivity, profile

from benchmarks.common import digits_classifier, draw_faults, seconds
from textguard.faults.engines import ReplayEngine

PRODUCTS = ("convolution", "addmm", "bmm", "aten::mm")
MOVEMENT = ("copy_", "index", "gather", "clone", "contiguous", "cat", "masked_fill", "fill_", "zero_")
ROUNDS = 9


def measure() -> dict[str, float]:
    """Shares of the wall time of the demo's campaign on ResNet-18: medians of alternating runs with and without profiler.

    One shard of it, as params.yaml has it: 64 of 360 images with their share of 4,096 injections per layer, 512 at a time.
    """
    model, images = digits_classifier()
    images = images[:64]
    engine = ReplayEngine(model, images[0], 512)
    faults = draw_faults(engine, len(images), 4096 * 64 // 360 * len(engine.sites))
    engine.run(images, faults)
    found: dict[str, list[float]] = {"wall": [], "products": [], "movement": []}
    for _ in range(ROUNDS):
        found["wall"].append(seconds(lambda: engine.run(images, faults)))
        with profile(activities=[ProfilerActivity.CPU]) as watched:
            engine.run(images, faults)
        for name, operators in (("products", PRODUCTS), ("movement", MOVEMENT)):
            own = [e.self_cpu_time_total for e in watched.key_averages() if any(part in e.key for part in operators)]
            found[name].append(sum(own) / 1e6)
    wall, products, movement = (statistics.median(times) for times in found.values())
    return {"products": products / wall, "movement": movement / wall, "other": 1 - (products + movement) / wall}
