"""What guided plans are worth on large images, and what they take to draw: on models of 224 x 224 pixels, with random weights.

The variance that uniform injections would have follows from the guided ones: their weights make averages those of all faults,
also the average of squares.
"""

import time
from typing import Any

import numpy as np
import pandas as pd

from benchmarks.common import DETECTOR_LIMIT, SEED, random_classifier, seconds
from textguard.faults.damage import SINGLE_FLIP
from textguard.faults.engines import ReplayEngine
from textguard.faults.execution import run_campaign
from textguard.faults.guided import draw_guided
from textguard.faults.profiling import image_chances, loader_of

MODELS = ("vgg16_bn", "resnet50", "swin_v2_t")
IMAGES, LAYERS, INJECTIONS = 4, 8, 512  # images; layers, spread over the depth; injections into each


def measure() -> dict[str, Any]:
    """Model -> seconds per image, of drawing and of a forward pass, and of each layer the ratio of variances."""
    return {name: _measure(name) for name in MODELS}


def _measure(name: str) -> dict[str, Any]:
    model, pictures = random_classifier(name, 224, IMAGES)
    engine = ReplayEngine(model, pictures[0], 16)
    loader = loader_of(pictures, engine.observe(pictures).argmax(dim=1), IMAGES)
    sites = [engine.sites[place] for place in np.unique(np.linspace(0, len(engine.sites) - 2, LAYERS).round().astype(int))]
    limits = {site.layer: DETECTOR_LIMIT for site in engine.sites}
    chances = image_chances(engine, loader, "guided")
    counts = {site.layer: (0, INJECTIONS) for site in sites}
    start = time.perf_counter()
    plan = draw_guided(engine, sites, loader, chances, counts, SEED, SINGLE_FLIP, [limits], label=f"{name}, plan")
    drawing = time.perf_counter() - start
    records = run_campaign(engine, loader, plan, limits, image_batch=IMAGES, label=name)
    return {
        "images": IMAGES,
        "injections": len(plan),
        "drawing_s_per_image": drawing / IMAGES,
        "forward_s_per_image": min(seconds(lambda: engine.observe(pictures)) for _ in range(3)) / IMAGES,
        "layers": {str(layer): _worth(rows) for layer, rows in records.groupby("layer", sort=False)},
    }


def _worth(records: pd.DataFrame) -> dict[str, float]:
    """Coefficients of variation of one injection under both plans, and the ratio of variances."""
    loss, weight = (records["faulty_loss"] - records["golden_loss"]).abs().to_numpy(float), records["weight"].to_numpy(float)
    loss = np.where(np.isfinite(loss), loss, 0.0)
    mean = (weight * loss).mean()
    uniform, guided = (weight * loss**2).mean() - mean**2, (weight * loss).var()
    return {
        "uniform_cv": float(np.sqrt(uniform) / mean),
        "guided_cv": float(np.sqrt(guided) / mean),
        "variance_ratio": float(uniform / guided),
    }
