"""How often intervals of DeltaLoss hold, and how wide they are, on layers of the trained classifier.

A big campaign on a layer stands for all its faults; small ones are drawn from it, again and again.
"""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd

from benchmarks.common import SEED, digits_campaign
from textguard.faults.campaign import image_chances, run_campaign
from textguard.faults.plans import draw_plan
from textguard.faults.sampling import _neyman, _spread
from textguard.faults.statistics import CONFIDENCE, Sample, mean_interval, quantile, sample_mean, studentised

BITS = 32
PLANS = ("uniform", "neyman")
INTERVALS = ("normal", "hall", "ours")
Z = quantile(CONFIDENCE)

TRAININGS = 3
LAYERS = 6  # that are measured, spread over the depth
POPULATION = 65_536  # injections into each; the other layers, which only have pilots, get an eighth
REPETITIONS = 2_000
UNIFORM, NEYMAN, PILOT = 4096, 1024, 128  # injections per layer of a small campaign


def measure() -> dict[str, Any]:
    """Layer -> its coefficient of variation and skewness, and plan -> interval -> coverage and mean relative half-width.

    Of the trainings, the lowest coverage, and the mean of the rest.
    """
    found = [_measure(SEED + number) for number in range(TRAININGS)]
    layers = {name: {kind: _mean([own[name][kind] for own in found]) for kind in ("cv", "skewness")} for name in found[0]}
    for name, layer in layers.items():
        for plan in PLANS:
            layer[plan] = {
                interval: {
                    "coverage": min(own[name][plan][interval]["coverage"] for own in found),
                    "half_width": _mean([own[name][plan][interval]["half_width"] for own in found]),
                }
                for interval in INTERVALS
            }
    sizes = {"trainings": TRAININGS, "population": POPULATION, "repetitions": REPETITIONS, "uniform": UNIFORM, "neyman": NEYMAN}
    return {**sizes, "layers": layers}


def _measure(seed: int) -> dict[str, dict[str, Any]]:
    """The same for one training."""
    setup = digits_campaign(seed=seed)
    chances = image_chances(setup.engine, setup.loader, "importance")
    sites = setup.engine.sites[:-1]  # the last is exact
    measured = [sites[place].layer for place in np.unique(np.linspace(0, len(sites) - 1, LAYERS).round().astype(int))]
    counts = {site.layer: POPULATION if site.layer in measured else POPULATION // 8 for site in sites}
    plan = draw_plan(sites, (chances > 0).astype(float), counts, SEED)
    records = run_campaign(setup.engine, setup.loader, plan, setup.limits, image_batch=64, label="coverage")
    known = {name: _Layer(rows, chances) for name, rows in records.groupby("layer", sort=False)}
    tallies = {name: {plan: _Tally() for plan in PLANS} for name in measured}
    draw, even = np.random.default_rng(SEED), np.full(BITS, 1 / BITS)
    first = _spread(PILOT, even, None)
    for _ in range(REPETITIONS):
        pilots = {name: layer.strata(draw, first) for name, layer in known.items()}
        shares = _neyman({name: SimpleNamespace(strata=strata) for name, strata in pilots.items()})
        for name in measured:
            layer = known[name]
            drawn = layer.values[draw.integers(0, len(layer.values), UNIFORM)]
            tallies[name]["uniform"].add(sample_mean([drawn], [1.0], [2 * drawn.max()]), layer.mean)
            more = layer.strata(draw, _spread(NEYMAN, shares[name], first) - first)
            strata = [np.concatenate(pair) for pair in zip(pilots[name], more, strict=True)]
            sample = sample_mean(strata, even, [2 * stratum.max() for stratum in strata])
            tallies[name]["neyman"].add(sample, layer.mean_over_bits)
    return {
        name: {"cv": known[name].cv, "skewness": known[name].skewness} | {plan: tally.result() for plan, tally in own.items()}
        for name, own in tallies.items()
    }


def _mean(numbers: list[float]) -> float:
    return float(np.mean(numbers))


class _Layer:
    """A layer's population, and samples of it by bit with images by their chances."""

    def __init__(self, records: pd.DataFrame, chances: np.ndarray) -> None:
        loss = (records["faulty_loss"] - records["golden_loss"]).abs().to_numpy(float)
        finite = np.isfinite(loss)  # with so few non-finite losses, leaving them out first is as good
        order = np.argsort(records["bit"].to_numpy()[finite], kind="stable")
        bit, image = (records[name].to_numpy()[finite][order] for name in ("bit", "image"))
        self.values = loss[finite][order]
        self.mean = float(self.values.mean())
        self.cv = float(self.values.std() / self.mean)
        self.skewness = float(((self.values - self.mean) ** 3).mean() / self.values.std() ** 3)
        starts, sizes = np.searchsorted(bit, np.arange(BITS)), np.bincount(bit, minlength=BITS)
        self.mean_over_bits = float((np.add.reduceat(self.values, starts) / sizes).mean())
        chance = chances[image]
        total = np.add.reduceat(chance, starts)
        self._weighted = self.values * (total / sizes)[bit] / chance
        self._edges = np.concatenate([np.cumsum(part) / part.sum() for part in np.split(chance, starts[1:])]) + bit

    def strata(self, draw: np.random.Generator, counts: np.ndarray) -> list[np.ndarray]:
        bit = np.repeat(np.arange(BITS), counts)
        chosen = np.searchsorted(self._edges, draw.random(len(bit)) + bit, side="right")
        return np.split(self._weighted[chosen], np.cumsum(counts)[:-1])


class _Tally:
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

    def result(self) -> dict[str, dict[str, float]]:
        means = np.array(self._found, dtype=float).mean(axis=0)
        return {
            name: {"coverage": float(held), "half_width": float(width)}
            for name, (held, width) in zip(INTERVALS, means, strict=True)
        }
