"""What mitigations cost and buy: the time of an inference beside the bare model's, and accuracy where stored weights err.

Times are ratios in one run, on ResNet-18 and the demo's test images. The same bits are at fault under all mitigations.
"""

import time

import torch

from benchmarks.common import seconds, trained_digits
from textguard.faults.mitigations import MITIGATIONS, protect
from textguard.faults.profiling import activation_bounds
from textguard.hardware.costs import mitigation_costs
from textguard.hardware.rates import error_rates
from textguard.vision.transforms import image_loader

RATES = (3e-8, 1e-7, 1e-6)
MEMORIES = 16


def measure() -> dict[str, dict]:
    """By mitigation: time ratio, comparisons, stored bounds, points lost at RATES, golden top-1; and what a memory costs."""
    model, train, test = trained_digits()
    loader, profile = image_loader(test, len(test)), image_loader(train, 256)
    costs = mitigation_costs(model, loader, profile=profile).set_index("mitigation")
    images = next(iter(loader))[0].to(next(model.parameters()).device)
    found: dict[str, dict] = {}
    with torch.inference_mode():
        plain = min(seconds(lambda: model(images)) for _ in range(3))
    for name in MITIGATIONS:
        protected = protect(model, images[0], activation_bounds(model, profile, name), name)
        start = time.perf_counter()
        curve = error_rates(protected, loader, RATES, memories=MEMORIES)
        runs = int(curve.memories["wrong"].gt(0).sum()) + 1  # and the golden run
        found[name] = {
            **costs.loc[name].to_dict(),
            "golden_top1": curve.settings["golden_top1"],
            "lost": {f"{rate:g}": curve.points[rate]["lost"].as_json() for rate in curve.rates},
            "memory_over_forward": (time.perf_counter() - start) / runs / plain,
        }
    return found


def lines(found: dict[str, dict] | None) -> list[str]:
    """The results as a Markdown table; nothing where that was not measured."""
    if not found:
        return []
    rates = list(found["none"]["lost"])
    rows = [
        f"| {name} | {own['time']:.2f} | {own['comparisons']:,.0f} | {own['numbers']:,.0f} | {own['golden_top1']:.1%} | "
        + " | ".join(f"{cell['value']:.1f} ({cell['low']:.1f} to {cell['high']:.1f})" for cell in own["lost"].values())
        + " |"
        for name, own in found.items()
    ]
    return [
        "",
        "Mitigations on ResNet-18 at 32 x 32: the time of an inference as a multiple of the bare model's, in one run; "
        "comparisons per image; bounds stored; and points of accuracy lost where stored weights err at a rate, mean over "
        f"{MEMORIES} memories with its 99 % interval. "
        f"A memory takes {found['none']['memory_over_forward']:.2f} times as long as the images' forward pass.",
        "",
        "| Mitigation | Time | Comparisons | Bounds | Top-1 | " + " | ".join(f"Lost at {rate}" for rate in rates) + " |",
        "| --- | --- | --- | --- | --- |" + " --- |" * len(rates),
        *rows,
    ]
