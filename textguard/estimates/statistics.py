"""What the records of a campaign say, each number with its interval.

DeltaLoss of an injection is |CE(faulty) - CE(golden)|, the absolute change of the cross entropy (natural logarithm) on its
image. Source: Mahmoud et al., ISSRE 2021, as used by GoldenEye, DSN 2022.

DeltaLoss is skewed beyond what the usual interval, mean +- 2.576 standard errors, can bear: of six layers of a ResNet-18, with
a skewness of 59 to 142, it covers the truth in 73 to 88 % of campaigns of 4,096 injections instead of in 99 %. The interval
here corrects for the skewness that is seen (Hall, 1992), and for what is not: its upper limit is that of the sample with one
more injection, which does twice the worst that was seen. `make bench` measures both (benchmarks/coverage.py; these are the
numbers in benchmarks/results.json).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from scipy.special import stdtrit

CONFIDENCE = 0.99


@dataclass(frozen=True)
class Estimate:
    """A number, its interval, and the number of observations behind it. NaN where there are none; low = high if exact."""

    value: float
    low: float
    high: float
    n: int

    def as_json(self) -> dict[str, float | int | None]:
        """The estimate as metrics files hold it; NaN and infinities become null."""
        numbers = {"value": self.value, "low": self.low, "high": self.high}
        return {name: number if math.isfinite(number) else None for name, number in numbers.items()} | {"n": self.n}

    def times(self, factor: float) -> "Estimate":
        """The same in another unit."""
        return Estimate(self.value * factor, self.low * factor, self.high * factor, self.n)


@dataclass(frozen=True)
class Sample:
    """A mean as estimated from a sample of n: its value, and variance and third central moment of its error.

    unseen: what these three would change by, had there been one more observation, as bad as `sample_mean` was told.
    """

    value: float
    variance: float
    third: float
    n: int
    unseen: tuple[float, float, float] = (0.0, 0.0, 0.0)

    @property
    def with_unseen(self) -> "Sample":
        """The sample with that observation."""
        value, variance, third = self.unseen
        return Sample(self.value + value, self.variance + variance, self.third + third, self.n)


def exact(value: float, n: int) -> Sample:
    """A mean over all there is."""
    return Sample(value, 0.0, 0.0, n)


def sample_mean(strata: Sequence[np.ndarray], shares: Sequence[float], worst: Sequence[float]) -> Sample:
    """The mean of a population from independent samples of its strata.

    strata: the observations of each, one or more, float [n]. shares: of each stratum in the population. worst: what one more
    observation would be; it goes to the stratum where it changes the mean most.
    """
    sizes, parts = np.array([len(sample) for sample in strata]), np.asarray(shares, dtype=float)
    starts = np.cumsum(sizes) - sizes
    everything = np.concatenate(list(strata)).astype(float, copy=False)
    means = np.add.reduceat(everything, starts) / sizes
    moments = _moments(everything - means.repeat(sizes), starts, sizes, means, parts)
    shifts = np.abs(parts * (np.asarray(worst, dtype=float) - means) / (sizes + 1))
    at = int(np.argmax(shifts))
    larger = np.append(strata[at], worst[at])
    mean, one = larger.mean(keepdims=True), slice(at, at + 1)
    before = _moments(strata[at] - means[one], np.zeros(1, dtype=int), sizes[one], means[one], parts[one])
    after = _moments(larger - mean, np.zeros(1, dtype=int), sizes[one] + 1, mean, parts[one])
    unseen = tuple(new - old for new, old in zip(after, before, strict=True)) if shifts[at] > 0 else (0.0, 0.0, 0.0)
    if not everything.any() and not np.any(worst):  # nothing has happened, and nobody knows what could
        unseen = (0.0, math.nan, math.nan)
    return Sample(*moments, int(sizes.sum()), unseen)


def _moments(
    difference: np.ndarray, starts: np.ndarray, sizes: np.ndarray, means: np.ndarray, shares: np.ndarray
) -> tuple[float, float, float]:
    """Value, variance and third central moment of strata's mean; NaN where one observation of a stratum tells no more.

    difference: of each observation to its stratum's mean, one stratum behind the other.
    """
    squared = difference * difference
    squares, cubes = np.add.reduceat(squared, starts), np.add.reduceat(squared * difference, starts)
    known = np.where(sizes > 1, 1.0, np.nan)
    variance = shares**2 * squares / np.maximum(sizes - 1, 1) / sizes * known
    third = shares**3 * cubes / sizes**3.0 * known
    return float((shares * means).sum()), float(variance.sum()), float(third.sum())


def combine(samples: Sequence[Sample], weights: Sequence[float]) -> Sample:
    """The weighted sum of independent estimates."""
    unseen = max(
        (
            (weight * sample.unseen[0], weight**2 * sample.unseen[1], weight**3 * sample.unseen[2])
            for sample, weight in zip(samples, weights, strict=True)
        ),
        key=lambda change: abs(change[0]),
    )
    pairs = list(zip(samples, weights, strict=True))
    return Sample(
        sum(weight * sample.value for sample, weight in pairs),
        sum(weight**2 * sample.variance for sample, weight in pairs),
        sum(weight**3 * sample.third for sample, weight in pairs),
        sum(sample.n for sample in samples),
        unseen,
    )


def average(samples: Sequence[Sample], weights: Sequence[float] | None = None) -> Sample:
    """The mean of independent estimates, plain or weighted; weights need not sum to 1."""
    weights = [1.0] * len(samples) if weights is None else weights
    return combine(samples, [weight / sum(weights) for weight in weights])


def quantile(confidence: float) -> float:
    """How many standard errors of a normal distribution a two-sided interval reaches to each side."""
    return NormalDist().inv_cdf(0.5 + confidence / 2)


def mean_interval(sample: Sample, confidence: float = CONFIDENCE) -> Estimate:
    """The mean of values that cannot be negative, with the interval described at the top of this module.

    Source: Hall, Journal of the Royal Statistical Society B 54, 1992 (the cubic transformation).
    """
    z = quantile(confidence)
    low = sample.value - _studentised(sample, z)
    high = sample.value + sample.unseen[0] - _studentised(sample.with_unseen, -z)
    return Estimate(sample.value, float(np.maximum(low, 0.0)), high, sample.n)


def _studentised(sample: Sample, z: float) -> float:
    """What lies between value and limit: standard error times the quantile z, corrected for skewness."""
    if not sample.variance > 0:
        return 0.0 * sample.variance  # 0, or NaN
    error = math.sqrt(sample.variance)
    skewness = sample.third / error**3
    if abs(skewness) < 1e-6:
        return z * error
    return 3 / skewness * (math.cbrt(1 + skewness * (z - skewness / 6)) - 1) * error


def rate_interval(sample: Sample, confidence: float = CONFIDENCE) -> Estimate:
    """A proportion with Wilson's score interval, which also holds for 0 and for few hits.

    Of a stratified or weighted sample, with the size of the simple one that would be worth as much once it held one more hit.
    Sources: Wilson, Journal of the American Statistical Association 22, 1927; Korn and Graubard, Survey Methodology 24, 1998.
    """
    if not sample.n:
        return Estimate(math.nan, math.nan, math.nan, 0)
    rate, larger = min(1.0, max(0.0, sample.value)), sample.with_unseen
    if larger.variance == 0:
        return Estimate(rate, rate, rate, sample.n)
    count = min(sample.n, larger.value * (1 - larger.value) / larger.variance) if 0 < larger.value < 1 else 1.0
    z2 = quantile(confidence) ** 2
    centre = (rate + z2 / (2 * count)) / (1 + z2 / count)
    half = math.sqrt(z2) * math.sqrt(rate * (1 - rate) / count + z2 / (4 * count**2)) / (1 + z2 / count)
    low, high = max(0.0, centre - half), min(1.0, centre + half)
    return Estimate(rate, low if rate > 0 else 0.0, high if rate < 1 else 1.0, sample.n)


def mean_estimate(values: np.ndarray, confidence: float = CONFIDENCE) -> Estimate:
    """The mean of independent observations, none of them negative, float [N]."""
    if not len(values):
        return Estimate(math.nan, math.nan, math.nan, 0)
    return mean_interval(sample_mean([values], [1.0], [2 * float(np.max(values))]), confidence)


def rate_estimate(hits: int, count: int, confidence: float = CONFIDENCE) -> Estimate:
    """The proportion of `hits` among `count` independent trials."""
    if not count:
        return Estimate(math.nan, math.nan, math.nan, 0)
    rate = hits / count
    return rate_interval(Sample(rate, 0.0, 0.0, count, _one_more_trial(hits, count)), confidence)


def _one_more_trial(hits: int, count: int) -> tuple[float, float, float]:
    rate = (hits + (2 * hits <= count)) / (count + 1)
    return rate - hits / count, rate * (1 - rate) / count, 0.0


def difference(minuend: Estimate, subtrahend: Estimate) -> Estimate:
    """Difference of two independent estimates; the parts of their intervals on either side add in quadrature."""
    value = minuend.value - subtrahend.value
    below = math.hypot(minuend.value - minuend.low, subtrahend.high - subtrahend.value)
    above = math.hypot(minuend.high - minuend.value, subtrahend.value - subtrahend.low)
    return Estimate(value, value - below, value + above, min(minuend.n, subtrahend.n))


def over_trainings(draws: Sequence[np.ndarray], values: Sequence[float], confidence: float = CONFIDENCE) -> tuple[float, float]:
    """The interval of a mean over trainings, from the bootstrap draws [R] of each training's own value: hierarchically.

    Trainings are resampled, then their injections. So few trainings show too little of their spread: it is widened by
    sqrt(K / (K - 1)) and takes Student's quantile with K - 1 degrees of freedom. Source: Hesterberg, The American Statistician
    69, 2015. K is 2 or more. Returns low and high.
    """
    count, size = len(draws), len(draws[0])
    generator = np.random.Generator(np.random.Philox(key=[count, size]))
    chosen = generator.integers(0, count, (size, count))
    which = generator.integers(0, size, (size, count))
    spread = float(np.stack(draws)[chosen, which].mean(axis=1).std(ddof=1)) * math.sqrt(count / (count - 1))
    half = float(stdtrit(count - 1, 0.5 + confidence / 2)) * spread
    centre = float(np.mean(values))
    return centre - half, centre + half


def planned_injections(population: int, half_width: float, confidence: float = CONFIDENCE) -> int:
    """How many injections bring any rate to +- half_width, out of a population of faults.

    Source: Leveugle et al., DATE 2009, with the rate that needs most, 0.5.
    """
    z = quantile(confidence)
    return math.ceil(population / (1 + half_width**2 * (population - 1) / (z**2 * 0.25)))


def planned_half_width(population: int, injections: int, confidence: float = CONFIDENCE) -> float:
    """The same formula the other way round: what a number of injections brings a rate to."""
    if injections >= population:
        return 0.0
    return quantile(confidence) * math.sqrt(0.25 * (population - injections) / ((population - 1) * injections))
