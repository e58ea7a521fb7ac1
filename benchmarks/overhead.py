"""Where a campaign's time goes: the share outside of convolutions, matrix products and data movement."""

from torch.profiler import ProfilerActivity, profile

from benchmarks.common import digits_classifier, draw_faults, seconds
from textguard.faults.engines import ReplayEngine

PRODUCTS = ("convolution", "addmm", "bmm", "aten::mm")
MOVEMENT = ("copy_", "index", "gather", "im2col", "clone", "contiguous", "cat", "masked_fill", "fill_", "zero_", "nonzero")


def measure() -> dict[str, float]:
    """Shares of the wall time of a campaign on ResNet-18 at 32 x 32; `other` holds all else, Python included."""
    model, images = digits_classifier()
    images = images[:40]
    engine = ReplayEngine(model, images[0], 256)
    faults = draw_faults(engine, len(images), 400)
    engine.run(images, faults)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as watched:
        wall = seconds(lambda: engine.run(images, faults))
    events = watched.key_averages()
    products, movement = (
        sum(event.self_cpu_time_total for event in events if any(name in event.key for name in names)) / 1e6 / wall
        for names in (PRODUCTS, MOVEMENT)
    )
    return {"products": products, "movement": movement, "other": 1 - products - movement}
