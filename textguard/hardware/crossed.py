"""What persistent faults come to: means over faults and images, with intervals for both.

Every fault meets every image, so the two are crossed: outcomes y of n faults on m images share what the fault does anyway and
what the image suffers anyway. The mean over both errs by

    variance of the faults' means / n + variance of the images' means / m - variance of the rest / (n m)

where the last term is what the first two both hold: the rest of an outcome, behind what its fault and its image explain. It is
the variance of a two-way layout with both ways random (Searle, Casella and McCulloch, Variance Components, 1992, chapter 4).
Tensors are strata of faults, which are drawn in each; images are the same for all.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy.special import stdtrit

from textguard.errors import Setting
from textguard.estimates.statistics import CONFIDENCE, Estimate, Sample, quantile, rate_interval, sample_mean, studentised
from textguard.faults.checks import confidence_level
from textguard.hardware.persistent import PersistentResult

# What quantities can be, if not anything from 0 up, and in which unit they are told.
_WITHIN = {"changed": (0.0, 1.0, 1.0), "sdc": (0.0, 1.0, 1.0), "accuracy_lost": (-1.0, 1.0, 100.0)}


@dataclass(frozen=True)
class Crossed:
    """Outcomes of n faults of one tensor on m images.

    by_fault: float [n], each fault's mean over images. by_image: float [m], each image's mean over faults. square: the mean of
    all squared outcomes.
    """

    by_fault: np.ndarray
    by_image: np.ndarray
    square: float

    @property
    def rest(self) -> float:
        """The variance behind what faults and images explain; NaN with one fault or one image."""
        n, m = len(self.by_fault), len(self.by_image)
        if n < 2 or m < 2:
            return math.nan
        mean = self.by_fault.mean()
        squares = self.square - np.mean(self.by_fault**2) - np.mean(self.by_image**2) + mean**2
        return max(0.0, float(squares) * n * m / ((n - 1) * (m - 1)))


def crossed_mean(
    tensors: Sequence[Crossed], weights: Sequence[float], most: float = math.inf, confidence: float = CONFIDENCE
) -> Sample:
    """The weighted mean over tensors of outcomes, and the moments of its error over faults and images.

    Few faults tell little of their spread. So each variance is larger than the sample's by the square of Student's quantile
    over the normal one.

    Parameters
    ----------
    tensors : sequence of Crossed
        Each tensor's outcomes; all on the same images.
    weights : sequence of float
        What each tensor counts for; their sum need not be 1.
    most : float
        What no outcome can be above, such as 1 for shares: then the worst unseen fault does that on all images. Otherwise it
        does twice what the worst seen one does.
    confidence : float, default 0.99
        Of the interval that will be made of it.

    Returns
    -------
    Sample
        For `interval`. Its variance is NaN where a tensor has one fault, or there is one image.

    Examples
    --------
    Every second of 100 faults breaks every image, so images tell nothing, and 100 faults are 100 observations:

    >>> import numpy as np
    >>> from textguard.hardware.crossed import Crossed, crossed_mean
    >>> faults, images = np.tile([0.0, 1.0], 50), np.full(30, 0.5)
    >>> sample = crossed_mean([Crossed(faults, images, square=0.5)], weights=[1.0], most=1.0)
    >>> sample.value, round(sample.error, 3)
    (0.5, 0.051)
    """
    shares = np.asarray(weights, dtype=float) / np.sum(weights)
    worst = [most if math.isfinite(most) else 2 * float(np.max(one.by_fault)) for one in tensors]
    faults = sample_mean([one.by_fault for one in tensors], shares, worst)
    together = sum(share * one.by_image for share, one in zip(shares, tensors, strict=True))
    images = sample_mean([together], [1.0], [float(np.max(together))])
    m = len(together)
    rest = sum(share**2 * one.rest / len(one.by_fault) / m for share, one in zip(shares, tensors, strict=True))
    fewest = min(len(one.by_fault) for one in tensors)
    variance = images.variance * _student(m, confidence) + faults.variance * _student(fewest, confidence) - rest
    variance = np.maximum(variance, np.maximum(faults.variance, images.variance))  # NaN stays
    value = float(sum(share * one.by_fault.mean() for share, one in zip(shares, tensors, strict=True)))
    count = sum(len(one.by_fault) for one in tensors)
    return Sample(value, float(variance), faults.third + images.third, count, faults.unseen)


def _student(count: int, confidence: float) -> float:
    """By what a variance that `count` observations tell is to be multiplied, for normal quantiles to become Student's."""
    return float(stdtrit(count - 1, 0.5 + confidence / 2) / quantile(confidence)) ** 2 if count > 1 else math.nan


def interval(sample: Sample, confidence: float = CONFIDENCE, within: tuple[float, float] = (0.0, math.inf)) -> Estimate:
    """Hall's interval of a crossed mean, cut where the quantity ends; see `textguard.estimates.statistics`.

    sample: of `crossed_mean`. within: what the quantity can be, (-1, 1) of differences of shares. Where nothing has happened at
    all, the upper end is what one more fault, as bad as can be, would make of the mean.

    Examples
    --------
    >>> import numpy as np
    >>> from textguard.hardware.crossed import Crossed, crossed_mean, interval
    >>> nothing = Crossed(np.zeros(99), np.zeros(30), square=0.0)
    >>> found = interval(crossed_mean([nothing], [1.0], most=1.0), within=(0.0, 1.0))
    >>> found.value, found.low, round(found.high, 2)
    (0.0, 0.0, 0.08)
    """
    z = quantile(confidence)
    low = sample.value - studentised(sample, z)
    high = sample.value + sample.unseen[0] - studentised(sample.with_unseen, -z)
    return Estimate(sample.value, float(np.maximum(low, within[0])), float(np.minimum(high, within[1])), sample.n, sample.error)


@dataclass(frozen=True)
class PersistentSummary:
    """What persistent faults came to.

    Attributes
    ----------
    tensors : dict of str to dict of str to Estimate
        Tensor, or layer, -> name of a quantity -> its estimate. Over faults and images: `delta_loss`, nats; `changed`, the
        share of predictions that change; `accuracy_lost`, percentage points of top-1; `sdc` and `eligible_delta_loss`, the
        same of images that the golden run has right. Over faults, on these images: `critical`, the share of faults that
        change at least one prediction; `masked`, of those that move no logit of any image beyond rounding.
    mean : dict of str to Estimate
        The mean over tensors, each counting the same.
    weighted : dict of str to Estimate
        The same, each counting by its stored bits: what a fault does that strikes anywhere in memory.
    images, faults : int
        How many there were.
    top1 : float
        Of the golden run.
    confidence : float
        Of the intervals.

    Examples
    --------
    >>> from textguard.hardware import PersistentSummary
    >>> PersistentSummary({}, {}, {}, images=40, faults=64, top1=0.9, confidence=0.99).as_json()["faults"]
    64
    """

    tensors: Mapping[str, Mapping[str, Estimate]]
    mean: Mapping[str, Estimate]
    weighted: Mapping[str, Estimate]
    images: int
    faults: int
    top1: float
    confidence: float

    def as_json(self) -> dict[str, Any]:
        """A plain dict for a metrics file."""

        def plain(found: Mapping[str, Estimate]) -> dict[str, Any]:
            return {name: estimate.as_json() for name, estimate in found.items()}

        return {
            **{"images": self.images, "faults": self.faults, "top1": self.top1, "confidence": self.confidence},
            **{"mean": plain(self.mean), "weighted": plain(self.weighted)},
            "tensors": {name: plain(found) for name, found in self.tensors.items()},
        }


def summarise_persistent(result: PersistentResult, confidence: float = CONFIDENCE) -> PersistentSummary:
    """Each tensor's and all tensors' damage by persistent faults, with intervals.

    Intervals of means are over faults and images: other faults, drawn as these were, on other images like these. Those of
    `critical` and `masked` are over faults alone, for these are said of the images at hand: more images make more faults
    critical. They hold for plans of `draw_persistent`; a list that somebody chose is no sample. Where runs were stopped early,
    each fault counts with the images that it saw.

    Parameters
    ----------
    result : PersistentResult
        As `run_persistent` returns it.
    confidence : float, default 0.99
        Of the intervals.

    Returns
    -------
    PersistentSummary
        The estimates.

    Raises
    ------
    InvalidParameter
        The confidence is none.

    References
    ----------
    Searle, Casella and McCulloch, Variance Components, Wiley, 1992.

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> from torch.utils.data import DataLoader, TensorDataset
    >>> from textguard.hardware.crossed import summarise_persistent
    >>> from textguard.hardware.persistent import run_persistent
    >>> from textguard.hardware.stored import draw_persistent, stored_tensors
    >>> model = nn.Linear(2, 2, bias=False)
    >>> model.weight.data = torch.eye(2)
    >>> images = torch.rand(40, 2, generator=torch.Generator().manual_seed(0))
    >>> loader = DataLoader(TensorDataset(images, images.argmax(1)), batch_size=40)
    >>> plan = draw_persistent(stored_tensors(model, images[0]), 64, seed=0)
    >>> summary = summarise_persistent(run_persistent(model, loader, plan))
    >>> changed = summary.tensors["weight"]["changed"]
    >>> 0 < changed.low < changed.value < changed.high < 1
    True
    """
    confidence = confidence_level(Setting("confidence"), confidence)
    names = list(dict.fromkeys(result.outcomes["layer"]))
    outcomes = {name: result.outcomes[result.outcomes["layer"] == name] for name in names}
    images = dict(list(result.by_image.groupby("layer", sort=False)))
    right = result.golden.set_index("image")["eligible"]
    tables = {
        "delta_loss": {name: _losses(outcomes[name], images[name]) for name in names},
        "changed": {name: _shares(outcomes[name], images[name], "changed", "images") for name in names},
        "accuracy_lost": {name: _lost(outcomes[name], images[name]) for name in names},
    }
    if right.any():
        eligible = {name: table[table["image"].map(right).to_numpy(dtype=bool)] for name, table in images.items()}
        renamed = {
            name: table[["eligible", "eligible_finite", "eligible_delta_loss", "eligible_square"]].set_axis(
                ["images", "finite", "delta_loss", "square"], axis=1
            )
            for name, table in outcomes.items()
        }
        tables["sdc"] = {
            name: _shares(outcomes[name], eligible[name], "changed", "eligible", "eligible_changed") for name in names
        }
        tables["eligible_delta_loss"] = {name: _losses(renamed[name], eligible[name]) for name in names}
    bits = [result.stored_bits[name] for name in names]
    found: dict[str, dict[str, Estimate]] = {name: {} for name in names}
    mean: dict[str, Estimate] = {}
    weighted: dict[str, Estimate] = {}
    for quantity, tensors in tables.items():
        for name in names:
            found[name][quantity] = _mean(quantity, [tensors[name]], [1.0], confidence)
        mean[quantity] = _mean(quantity, list(tensors.values()), [1.0] * len(names), confidence)
        weighted[quantity] = _mean(quantity, list(tensors.values()), bits, confidence)
    for quantity, hits in {
        "critical": {name: (table["changed"] > 0).to_numpy(float) for name, table in outcomes.items()},
        "masked": {name: (table["masked"] == table["images"]).to_numpy(float) for name, table in outcomes.items()},
    }.items():
        for name in names:
            found[name][quantity] = _rate([hits[name]], [1.0], confidence)
        mean[quantity] = _rate(list(hits.values()), [1.0] * len(names), confidence)
        weighted[quantity] = _rate(list(hits.values()), bits, confidence)
    return PersistentSummary(found, mean, weighted, result.images, len(result.outcomes), result.top1, confidence)


def _mean(quantity: str, tensors: Sequence[Crossed | None], weights: Sequence[float], confidence: float) -> Estimate:
    """The mean over tensors, of those where there is one."""
    least, most, factor = _WITHIN.get(quantity, (0.0, math.inf, 1.0))
    known = [(one, weight) for one, weight in zip(tensors, weights, strict=True) if one is not None]
    if not known:
        return Estimate(math.nan, math.nan, math.nan, 0)
    sample = crossed_mean([one for one, _ in known], [weight for _, weight in known], most, confidence)
    return interval(sample, confidence, (least, most)).times(factor)


def _rate(hits: Sequence[np.ndarray], weights: Sequence[float], confidence: float) -> Estimate:
    """A share of faults, Wilson's interval."""
    shares = np.asarray(weights, dtype=float) / np.sum(weights)
    worst = [float(2 * one.mean() <= 1) for one in hits]
    return rate_interval(sample_mean(hits, shares, worst), confidence)


def _shares(faults: pd.DataFrame, images: pd.DataFrame, name: str, of: str, column: str = "") -> Crossed:
    """Of outcomes that happen or not, whose squares are themselves."""
    by_fault = (faults[column or name] / faults[of]).to_numpy()
    return Crossed(by_fault, (images[name] / images["faults"]).to_numpy(), float(by_fault.mean()))


def _lost(faults: pd.DataFrame, images: pd.DataFrame) -> Crossed:
    by_fault = ((faults["lost"] - faults["gained"]) / faults["images"]).to_numpy()
    by_image = ((images["lost"] - images["gained"]) / images["faults"]).to_numpy()
    return Crossed(by_fault, by_image, float(((faults["lost"] + faults["gained"]) / faults["images"]).mean()))


def _losses(faults: pd.DataFrame, images: pd.DataFrame) -> Crossed | None:
    """None where no loss was finite."""
    faults, images = faults[faults["finite"] > 0], images[images["finite"] > 0]
    if not len(faults):
        return None
    by_image = (images["delta"] / images["finite"]).to_numpy()
    return Crossed(faults["delta_loss"].to_numpy(), by_image, float(faults["square"].mean()))
