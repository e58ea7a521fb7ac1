"""How often intervals of DeltaLoss hold, and how wide they are, on layers of trained classifiers.

Big campaigns stand for all faults of their layers, one with uniform injections and one with guided ones; small ones are drawn
from them, again and again.
"""

from typing import Any

import numpy as np
import pandas as pd

from benchmarks.common import CLASSIFIERS, SEED, digits_campaign
from textguard.estimates.statistics import CONFIDENCE, Sample, average, mean_interval, quantile, sample_mean, studentised
from textguard.estimates.summary import UNSEEN, UNSEEN_GUIDED
from textguard.faults.damage import SINGLE_FLIP
from textguard.faults.execution import run_campaign
from textguard.faults.guided import draw_guided
from textguard.faults.plans import draw_plan
from textguard.faults.profiling import image_chances

INTERVALS = ("normal", "hall", "ours")
SIZES = {"uniform": (4096,), "guided": (64, 256, 1024)}  # injections per layer of small campaigns
Z = quantile(CONFIDENCE)

LAYERS = 8  # that are measured, spread over the depth; the last is enumerated where its faults have a closed form
POPULATION = 32_768  # injections into each, of either kind
REPETITIONS = 2_000


def measure() -> dict[str, Any]:
    """Classifier -> campaign -> interval -> coverage, and half-width as a share of the truth: by layer, and of their mean."""
    found = {name: _measure(name) for name in CLASSIFIERS}
    return {"population": POPULATION, "repetitions": REPETITIONS, "classifiers": found}


def _measure(network: str) -> dict[str, Any]:
    setup = digits_campaign(network=network)
    sites = setup.engine.sites[:-1]
    sites = [sites[place] for place in np.unique(np.linspace(0, len(sites) - 1, LAYERS).round().astype(int))]
    plain, chances = (image_chances(setup.engine, setup.loader, how) for how in ("uniform", "guided"))
    plans = {
        "uniform": draw_plan(sites, plain, POPULATION, SEED),
        "guided": draw_guided(
            setup.engine,
            sites,
            setup.loader,
            chances,
            {site.layer: (0, POPULATION) for site in sites},
            SEED,
            SINGLE_FLIP,
            [setup.limits],
        ),
    }
    pools = {
        name: _pools(run_campaign(setup.engine, setup.loader, plan, setup.limits, image_batch=64, label=f"{network}, {name}"))
        for name, plan in plans.items()
    }
    layers = {
        site.layer: {
            f"{name}_{what}": float(number)
            for name, pool in pools.items()
            for what, number in zip(("mean", "cv", "skewness"), _moments(pool[site.layer]), strict=True)
        }
        for site in sites
    }
    found = {
        f"{name}, {size:,}": _small_campaigns(pools[name], size, UNSEEN_GUIDED if name == "guided" else UNSEEN)
        for name, sizes in SIZES.items()
        for size in sizes
    }
    return {"eligible": int((plain > 0).sum()), "layers": layers, "campaigns": found}


def _pools(records: pd.DataFrame) -> dict[str, np.ndarray]:
    """Layer -> weighted DeltaLoss of its injections. With so few non-finite losses, to leave them out first is as good."""
    loss = (records["faulty_loss"] - records["golden_loss"]).abs().to_numpy(float) * records["weight"].to_numpy(float)
    layers = records["layer"].to_numpy()
    return {str(layer): loss[(layers == layer) & np.isfinite(loss)] for layer in pd.unique(layers)}


def _moments(values: np.ndarray) -> tuple[float, float, float]:
    """Mean, coefficient of variation, skewness."""
    return values.mean(), values.std() / values.mean(), ((values - values.mean()) ** 3).mean() / values.std() ** 3


def _small_campaigns(pools: dict[str, np.ndarray], size: int, unseen: float) -> dict[str, Any]:
    """Interval -> its lowest coverage over layers, that of the mean over layers, and their half-widths: mean, and largest."""
    draw = np.random.default_rng(SEED)
    truths = {layer: float(pool.mean()) for layer, pool in pools.items()}
    truth = float(np.mean(list(truths.values())))
    tallies = {layer: Tally() for layer in [*pools, ""]}
    for _ in range(REPETITIONS):
        samples = []
        for layer, pool in pools.items():
            drawn = pool[draw.integers(0, len(pool), size)]
            samples.append(sample_mean([drawn], [1.0], [unseen * drawn.max()]))
            tallies[layer].add(samples[-1], truths[layer])
        tallies[""].add(average(samples), truth)
    results = {layer: tally.result() for layer, tally in tallies.items()}
    overall = results.pop("")
    return {
        interval: {
            "layers": {layer: own[interval] for layer, own in results.items()},
            "lowest_coverage": min(own[interval][0] for own in results.values()),
            "half_width": float(np.median([own[interval][1] for own in results.values()])),
            "mean_coverage": overall[interval][0],
            "mean_half_width": overall[interval][1],
        }
        for interval in INTERVALS
    }


class Tally:
    """How often each interval held, and its half-width as a share of the truth."""

    def __init__(self) -> None:
        self._found: list[list[tuple[bool, float]]] = []

    def add(self, sample: Sample, truth: float) -> None:
        ours = mean_interval(sample)
        half = Z * sample.variance**0.5
        limits = (
            (sample.value - half, sample.value + half),
            (sample.value - studentised(sample, Z), sample.value - studentised(sample, -Z)),
            (ours.low, ours.high),
        )
        self._found.append([(low <= truth <= high, (high - low) / 2 / truth) for low, high in limits])

    def result(self) -> dict[str, tuple[float, float]]:
        """Interval -> coverage, and mean half-width."""
        means = np.array(self._found, dtype=float).mean(axis=0)
        return {name: (float(held), float(width)) for name, (held, width) in zip(INTERVALS, means, strict=True)}
