"""How often intervals of DeltaLoss hold, and how wide they are, on layers of trained classifiers.

Big campaigns stand for all faults of their layers, one with uniform injections and one with guided ones; small ones are drawn
from them, again and again. `simulate` needs no classifier: it measures intervals over trainings, and those of samples in which
most injections do nothing but round.
"""

from typing import Any

import numpy as np
import pandas as pd

from benchmarks.common import CLASSIFIERS, SEED, digits_campaign
from textguard.estimates.statistics import (
    CONFIDENCE,
    Estimate,
    Sample,
    average,
    mean_interval,
    over_trainings,
    quantile,
    rate_interval,
    sample_mean,
    studentised,
)
from textguard.estimates.summary import FEWEST_SEEN, ROUNDING, UNSEEN, UNSEEN_GUIDED, rate_sample, summarise
from textguard.faults.damage import SINGLE_FLIP
from textguard.faults.execution import run_campaign
from textguard.faults.guided import draw_guided
from textguard.faults.plans import draw_plan
from textguard.faults.profiling import image_chances

INTERVALS = ("normal", "hall", "ours", "sdc")
SIZES = {"uniform": (64, 256, 1024, 4096), "guided": (64, 256, 512, 1024)}  # injections per layer of small campaigns
Z = quantile(CONFIDENCE)

LAYERS = 8  # that are measured, spread over the depth; the last is enumerated where its faults have a closed form
POPULATION = 32_768  # injections into each, of either kind
REPETITIONS = 2_000

TRAININGS = (3, 5, 10)
FACTORS = (1.5, 3.5, 10.0)  # true improvements
BETWEEN = (0.2, 0.5)  # standard deviation of an improvement's logarithm between trainings
WITHIN = (0.05, 0.5)  # and that of its estimate
SIMULATIONS = 4_000
# DeltaLoss of injections that do something, and how many of all they are. The others round.
ROUNDED = {
    "1 of 2,000, lognormal 2": (5e-4, 2.0),
    "1 of 1,000, lognormal 1.5": (1e-3, 1.5),
    "1 of 32, lognormal 2": (1 / 32, 2.0),
}
ROUNDED_SIZES, WORST = (64, 1024, 4096), 20.0  # injections; nats that another layer of the campaign has seen


def measure() -> dict[str, Any]:
    """Classifier -> campaign -> interval -> coverage, and half-width as a share of the truth: by layer, and of their mean."""
    found = {name: _measure(name) for name in CLASSIFIERS}
    return {"population": POPULATION, "repetitions": REPETITIONS, "classifiers": found}


def simulate() -> dict[str, Any]:
    """Coverage and power over trainings, and coverage of samples that mostly round, before and now."""
    draw = np.random.default_rng(SEED)
    trainings = [
        {"trainings": count, "between": between, "within": within, **_over_trainings(draw, count, between, within)}
        for count in TRAININGS
        for between in BETWEEN
        for within in WITHIN
    ]
    rounded = {
        name: {f"{size:,}": _rounded(draw, size, share, sigma) for size in ROUNDED_SIZES}
        for name, (share, sigma) in ROUNDED.items()
    }
    return {"trainings": trainings, "rounded": rounded}


def _over_trainings(draw: np.random.Generator, count: int, between: float, within: float) -> dict[str, Any]:
    """How often the interval of an improvement holds, its half-width as a factor (median), and how often it excludes 1."""
    reach, logs = quantile(CONFIDENCE) * within, draw.normal(0, between, (SIMULATIONS, count))
    logs += draw.normal(0, within, logs.shape)
    limits = []
    for row in np.exp(logs):
        parts = [Estimate(value, value * np.exp(-reach), value * np.exp(reach), 1) for value in row]
        found = over_trainings(parts, (0.0, np.inf))
        limits.append((found.low, found.high))
    low, high = np.array(limits).T
    # A true factor multiplies every limit.
    return {
        "coverage": float(((low <= 1) & (high >= 1)).mean()),
        "half_width": float(np.exp(np.median(np.log(high / low)) / 2)),
        "power": {f"{factor:g}": float((low * factor > 1).mean()) for factor in FACTORS},
    }


def _rounded(draw: np.random.Generator, size: int, share: float, sigma: float) -> dict[str, float]:
    """Coverage where an unseen injection may do twice the worst seen, and where a sample of rounding does not say so."""
    truth, repetitions, held = share * np.exp(sigma**2 / 2), SIMULATIONS // 8, {"seen": 0, "ours": 0}
    other = np.full(FEWEST_SEEN, WORST)
    rows = {"bit": 0, "weight": 1.0, "detected": False, "masked": False, "mismatch": False, "golden_loss": 0.0}
    layers = np.repeat(["layer", "other"], [size, len(other)])
    for _ in range(repetitions):
        losses = np.abs(draw.normal(0, 1e-6, size)) + (draw.random(size) < share) * draw.lognormal(0, sigma, size)
        records = pd.DataFrame({"layer": layers, "index": range(len(layers)), "faulty_loss": np.append(losses, other), **rows})
        samples = {
            "seen": sample_mean([losses], [1.0], [UNSEEN * losses.max()]),
            "ours": summarise(records, {"layer": 1})["layer"].delta_loss,
        }
        for name, sample in samples.items():
            found = mean_interval(sample)
            held[name] += found.low <= truth <= found.high
    return {name: float(times / repetitions) for name, times in held.items()}


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
        name: {
            str(layer): _Pool(records)
            for layer, records in run_campaign(
                setup.engine, setup.loader, plan, setup.limits, image_batch=64, label=f"{network}, {name}"
            ).groupby("layer", sort=False)
        }
        for name, plan in plans.items()
    }
    layers = {
        site.layer: {
            f"{name}_{what}": float(number)
            for name, pool in pools.items()
            for what, number in pool[site.layer].moments().items()
        }
        for site in sites
    }
    found = {
        f"{name}, {size:,}": _small_campaigns(pools[name], size, name == "guided")
        for name, sizes in SIZES.items()
        for size in sizes
    }
    return {"eligible": int((plain > 0).sum()), "layers": layers, "campaigns": found}


class _Pool:
    """A layer's injections: weighted DeltaLoss, weighted SDCs, weights. The few losses that are not finite count as none."""

    def __init__(self, records: pd.DataFrame) -> None:
        loss = (records["faulty_loss"] - records["golden_loss"]).abs().to_numpy(float)
        finite, self.weight = np.isfinite(loss), records["weight"].to_numpy(float)
        self.plain = np.where(finite, loss, 0.0)
        self.losses = self.weight * self.plain
        self.sdcs = self.weight * (records["mismatch"].to_numpy(bool) | ~finite)

    def moments(self) -> dict[str, float]:
        """Of weighted DeltaLoss: mean, coefficient of variation, skewness; the share of SDCs."""
        mean, spread = self.losses.mean(), self.losses.std()
        skewness = ((self.losses - mean) ** 3).mean() / spread**3
        return {"mean": mean, "cv": spread / mean, "skewness": skewness, "sdc": self.sdcs.mean()}


def _small_campaigns(pools: dict[str, _Pool], size: int, guided: bool) -> dict[str, Any]:
    """Interval -> its lowest coverage over layers, that of the mean over layers, and their half-widths.

    ours_ideal: the half-width of our interval, over 2.576 true standard errors.
    """
    draw, unseen = np.random.default_rng(SEED), UNSEEN_GUIDED if guided else UNSEEN
    ideal = {layer: Z * pool.losses.std() / np.sqrt(size) / pool.losses.mean() for layer, pool in pools.items()}
    truths = {layer: (float(pool.losses.mean()), float(pool.sdcs.mean())) for layer, pool in pools.items()}
    truths[""] = tuple(np.mean(list(truths.values()), axis=0).tolist())
    tallies = {layer: _Tally(*truth) for layer, truth in truths.items()}
    for _ in range(REPETITIONS):
        samples, rates = [], []
        drawn = {layer: draw.integers(0, len(pool.weight), size) for layer, pool in pools.items()}
        worst = max(pool.plain[drawn[layer]].max() for layer, pool in pools.items())
        for layer, pool in pools.items():
            chosen = drawn[layer]
            losses, sdcs, weight = pool.losses[chosen], pool.sdcs[chosen], pool.weight[chosen]
            # As textguard.estimates.summary does it.
            did = pool.plain[chosen] > ROUNDING
            most = worst * (weight**2).sum() / weight.sum() if did.sum() < FEWEST_SEEN else 0.0
            samples.append(sample_mean([losses], [1.0], [max(unseen * losses.max(), most)]))
            rates.append(rate_sample([sdcs], [1.0], [weight[did] if guided and did.any() else weight], guided))
            tallies[layer].add(samples[-1], rates[-1])
        tallies[""].add(average(samples), average(rates))
    results = {layer: tally.result() for layer, tally in tallies.items()}
    overall = results.pop("")
    found = {
        interval: {
            "layers": {layer: own[interval] for layer, own in results.items()},
            "lowest_coverage": min(own[interval][0] for own in results.values()),
            "coverage": float(np.mean([own[interval][0] for own in results.values()])),
            "half_width": float(np.median([own[interval][1] for own in results.values()])),
            "mean_coverage": overall[interval][0],
            "mean_half_width": overall[interval][1],
        }
        for interval in INTERVALS
    }
    return found | {"ours_ideal": float(np.median([own["ours"][1] / ideal[layer] for layer, own in results.items()]))}


class _Tally:
    """How often each interval held, and its half-width as a share of the truth."""

    def __init__(self, truth: float, rate: float) -> None:
        self._truth, self._rate = truth, rate
        self._found: list[list[tuple[float, float]]] = []

    def add(self, sample: Sample, rate: Sample) -> None:
        """sample, rate: of DeltaLoss and SDCs."""
        ours, sdc = mean_interval(sample), rate_interval(rate)
        error = np.sqrt(sample.variance)
        limits = (
            (sample.value - Z * error, sample.value + Z * error),
            (sample.value - studentised(sample, Z), sample.value - studentised(sample, -Z)),
            (ours.low, ours.high),
        )
        self._found.append(
            [
                *((low <= self._truth <= high, (high - low) / 2 / self._truth) for low, high in limits),
                (sdc.low <= self._rate <= sdc.high, (sdc.high - sdc.low) / 2 / self._rate if self._rate else 0.0),
            ]
        )

    def result(self) -> dict[str, tuple[float, float]]:
        """Interval -> coverage, and mean half-width."""
        means = np.array(self._found, dtype=float).mean(axis=0)
        return {name: (float(held), float(width)) for name, (held, width) in zip(INTERVALS, means, strict=True)}
