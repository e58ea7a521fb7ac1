"""What the records of a campaign say: each number with its interval.

DeltaLoss of an injection is |CE(faulty) - CE(golden)|, in nats: the absolute change of the cross entropy (natural logarithm) on
its image. Source: Mahmoud et al., ISSRE 2021, as used by GoldenEye, DSN 2022.

DeltaLoss is so skewed that the usual interval, the mean +- a normal quantile of standard errors, holds far less often than it
says. The interval here corrects for the skewness of the sample (Hall, 1992). The sample may also have missed the worst faults.
The upper limit is therefore that of the same sample with one more injection, whose DeltaLoss is twice the largest in it, or the
largest itself where the plan was guided, which looks at the worst first.
benchmarks/coverage.py measures how often either interval holds, and benchmarks/results.md has its numbers.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from statistics import NormalDist

import numpy as np
from scipy.special import stdtrit

CONFIDENCE = 0.99
LARGEST = 1e300
HOLD_FROM, HOLD_FROM_GUIDED = 1024, 64  # see few_injections


@dataclass(frozen=True)
class Estimate:
    """A number with its interval.

    Attributes
    ----------
    value : float
        The number; NaN where nothing was observed.
    low, high : float
        The ends of the interval. Both equal `value` where the number is exact, and both are NaN where nothing tells its error.
    n : int
        The number of observations behind it.
    error : float
        The standard error of the sampling alone, without what the interval adds for what the sample may have missed. 0 where
        the number is exact, or where all observations are equal; NaN where there is none.

    Examples
    --------
    >>> Estimate(0.25, 0.125, 0.5, n=400).times(100)
    Estimate(value=25.0, low=12.5, high=50.0, n=400)
    """

    value: float
    low: float
    high: float
    n: int
    error: float = field(default=math.nan, repr=False, compare=False)

    def as_json(self) -> dict[str, float | int | None]:
        """The estimate as metrics files hold it.

        Returns
        -------
        dict of str to float, int or None
            Keys `value`, `low`, `high` and `n`, and `error` where there is one. NaN and infinities are None, which JSON writes
            as null.
        """
        numbers = {"value": self.value, "low": self.low, "high": self.high}
        found = {name: number if math.isfinite(number) else None for name, number in numbers.items()} | {"n": self.n}
        return found | ({"error": self.error} if math.isfinite(self.error) else {})

    def times(self, factor: float) -> "Estimate":
        """The same estimate in another unit, which is `factor` times smaller."""
        return Estimate(self.value * factor, self.low * factor, self.high * factor, self.n, self.error * abs(factor))


@dataclass(frozen=True)
class Sample:
    """A mean as estimated from a sample, and the moments of its error.

    `mean_interval` and `rate_interval` make an interval of it, `combine` and `average` a mean over several samples.

    Attributes
    ----------
    value : float
        The estimated mean.
    variance : float
        The variance of its error, the square of its standard error.
    third : float
        The third central moment of its error.
    n : int
        The number of observations.
    unseen : (float, float, float)
        By how much `value`, `variance` and `third` would change if the sample held one more observation, as bad as the `worst`
        that `sample_mean` was given.
    guided : bool
        Whether the sample looked where something was to be found, so that it may be worth more than a simple one of its size.
    """

    value: float
    variance: float
    third: float
    n: int
    unseen: tuple[float, float, float] = (0.0, 0.0, 0.0)
    guided: bool = field(default=False, repr=False)

    @property
    def error(self) -> float:
        """The standard error."""
        return math.sqrt(self.variance)  # of NaN, NaN

    @property
    def with_unseen(self) -> "Sample":
        """The sample as it would be with that one more observation."""
        value, variance, third = self.unseen
        return Sample(self.value + value, self.variance + variance, self.third + third, self.n, guided=self.guided)


def exact(value: float, n: int) -> Sample:
    """The mean of a whole population, which has no error.

    Parameters
    ----------
    value : float
        The mean.
    n : int
        The size of the population.

    Returns
    -------
    Sample
        Its variance and third moment are 0.

    Examples
    --------
    >>> mean_interval(exact(0.5, n=1000))
    Estimate(value=0.5, low=0.5, high=0.5, n=1000)
    """
    return Sample(value, 0.0, 0.0, n)


def sample_mean(strata: Sequence[np.ndarray], shares: Sequence[float], worst: Sequence[float]) -> Sample:
    """Estimate the mean of a population from independent samples of its strata.

    Parameters
    ----------
    strata : sequence of ndarray
        The observations of each stratum, float [n], n of at least 1.
    shares : sequence of float
        The share of each stratum in the population.
    worst : sequence of float
        For each stratum, the value that one more observation might have. It counts for the stratum where it changes the mean
        most.

    Returns
    -------
    Sample
        The mean. Its variance and third moment are NaN where a stratum has only one observation.

    Examples
    --------
    >>> sample = sample_mean([np.array([0.0, 2.0, 4.0])], shares=[1.0], worst=[8.0])
    >>> sample.value, round(sample.variance, 4), sample.third, sample.n
    (2.0, 1.3333, 0.0, 3)
    >>> sample.with_unseen.value
    3.5
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
    if not everything.any() and not np.any(worst):  # Nothing has happened, so nothing tells what could.
        unseen = (0.0, math.nan, math.nan)
    return Sample(*moments, int(sizes.sum()), unseen)


def _moments(
    difference: np.ndarray, starts: np.ndarray, sizes: np.ndarray, means: np.ndarray, shares: np.ndarray
) -> tuple[float, float, float]:
    """Value, variance and third central moment of the mean over strata.

    The last two are NaN where a stratum has only one observation, because that tells nothing of its spread. difference: each
    observation minus its stratum's mean, float [N], one stratum behind the other. starts, sizes, means, shares: of each
    stratum.
    """
    squared = difference * difference
    squares, cubes = np.add.reduceat(squared, starts), np.add.reduceat(squared * difference, starts)
    known = np.where(sizes > 1, 1.0, np.nan)
    variance = shares**2 * squares / np.maximum(sizes - 1, 1) / sizes * known
    third = shares**3 * cubes / sizes**3.0 * known
    return float((shares * means).sum()), float(variance.sum()), float(third.sum())


def combine(samples: Sequence[Sample], weights: Sequence[float]) -> Sample:
    """The weighted sum of independent estimates.

    Parameters
    ----------
    samples : sequence of Sample
        The estimates, at least one.
    weights : sequence of float
        What each is multiplied with.

    Returns
    -------
    Sample
        The sum. Its `unseen` is that of the sample which changes the sum most.

    Examples
    --------
    >>> combine([Sample(2.0, 0.5, 0.0, 10), Sample(3.0, 0.25, 0.0, 20)], [2.0, -1.0])
    Sample(value=1.0, variance=2.25, third=0.0, n=30, unseen=(0.0, 0.0, 0.0))
    """
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
        any(sample.guided for sample in samples),
    )


def average(samples: Sequence[Sample], weights: Sequence[float] | None = None) -> Sample:
    """The mean of independent estimates.

    Parameters
    ----------
    samples : sequence of Sample
        The estimates, at least one.
    weights : sequence of float, optional
        What each counts for; their sum need not be 1. By default all count the same.

    Returns
    -------
    Sample
        The mean.

    Examples
    --------
    >>> average([exact(1.0, n=10), exact(2.0, n=10)], weights=[3, 1]).value
    1.25
    """
    weights = [1.0] * len(samples) if weights is None else weights
    return combine(samples, [weight / sum(weights) for weight in weights])


def quantile(confidence: float) -> float:
    """How many standard errors of a normal distribution a two-sided interval reaches to each side.

    Parameters
    ----------
    confidence : float
        Between 0 and 1.

    Returns
    -------
    float
        The quantile.

    Examples
    --------
    >>> round(quantile(0.99), 3)
    2.576
    """
    return NormalDist().inv_cdf(0.5 + confidence / 2)


def mean_interval(sample: Sample, confidence: float = CONFIDENCE) -> Estimate:
    """The interval of a mean of values that cannot be negative, as the top of this module describes it.

    Parameters
    ----------
    sample : Sample
        The estimated mean.
    confidence : float
        How often such intervals shall hold, between 0 and 1.

    Returns
    -------
    Estimate
        The mean and its interval, whose lower end is at least 0.

    References
    ----------
    Hall, "On the Removal of Skewness by Transformation", Journal of the Royal Statistical Society B 54, 1992: the cubic
    transformation.

    Examples
    --------
    >>> losses = np.repeat([0.0, 0.5, 2.0], [300, 80, 20])
    >>> found = mean_interval(sample_mean([losses], shares=[1.0], worst=[2 * losses.max()]))
    >>> [round(number, 3) for number in (found.low, found.value, found.high)]
    [0.148, 0.2, 0.287]
    """
    z = quantile(confidence)
    low = sample.value - studentised(sample, z)
    high = sample.value + sample.unseen[0] - studentised(sample.with_unseen, -z)
    if sample.variance > 0:  # Of layers that differ by 16 digits, sampled ones may not show; the mean is not exact for that.
        low, high = min(low, math.nextafter(sample.value, -math.inf)), max(high, math.nextafter(sample.value, math.inf))
    return Estimate(sample.value, float(np.maximum(low, 0.0)), high, sample.n, sample.error)


def studentised(sample: Sample, z: float) -> float:
    """How far a limit of Hall's interval lies below the mean.

    Parameters
    ----------
    sample : Sample
        The estimated mean.
    z : float
        The normal quantile: positive for the lower limit, negative for the upper one.

    Returns
    -------
    float
        The standard error times the quantile, corrected for the skewness of the sample.

    Examples
    --------
    >>> studentised(Sample(value=5.0, variance=4.0, third=0.0, n=100), z=1.5)
    3.0
    """
    if not sample.variance > 0:
        return 0.0 * sample.variance  # 0, or NaN
    error = math.sqrt(sample.variance)
    skewness = sample.third / error**3
    if abs(skewness) < 1e-6:
        return z * error
    return 3 / skewness * (math.cbrt(1 + skewness * (z - skewness / 6)) - 1) * error


def rate_interval(sample: Sample, confidence: float = CONFIDENCE) -> Estimate:
    """The interval of a proportion: Wilson's score interval [1]_, which also holds for no hits and for few.

    A stratified or weighted sample is worth as much as a simple one of another size. The interval takes that size, as it would
    be if the sample held one more hit [2]_; but no more than the sample's own, unless it was guided.

    Parameters
    ----------
    sample : Sample
        The estimated proportion.
    confidence : float
        How often such intervals shall hold, between 0 and 1.

    Returns
    -------
    Estimate
        The proportion and its interval, within [0, 1].

    References
    ----------
    .. [1] Wilson, "Probable Inference, the Law of Succession, and Statistical Inference", Journal of the American Statistical
       Association 22, 1927.
    .. [2] Korn and Graubard, "Confidence Intervals for Proportions with Small Expected Number of Positive Counts Estimated from
       Survey Data", Survey Methodology 24, 1998.

    Examples
    --------
    >>> hits = np.array([1.0] * 5 + [0.0] * 395)
    >>> found = rate_interval(sample_mean([hits], shares=[1.0], worst=[1.0]))
    >>> [round(number, 4) for number in (found.low, found.value, found.high)]
    [0.0042, 0.0125, 0.0367]
    """
    if not sample.n:
        return Estimate(math.nan, math.nan, math.nan, 0)
    rate, larger = min(1.0, max(0.0, sample.value)), sample.with_unseen
    if larger.variance == 0:
        return Estimate(rate, rate, rate, sample.n, sample.error)
    count = larger.value * (1 - larger.value) / larger.variance if 0 < larger.value < 1 else 1.0
    count = count if sample.guided else min(sample.n, count)
    z2 = quantile(confidence) ** 2
    centre = (rate + z2 / (2 * count)) / (1 + z2 / count)
    half = math.sqrt(z2) * math.sqrt(rate * (1 - rate) / count + z2 / (4 * count**2)) / (1 + z2 / count)
    low, high = max(0.0, centre - half), min(1.0, centre + half)
    return Estimate(rate, low if rate > 0 else 0.0, high if rate < 1 else 1.0, sample.n, sample.error)


def mean_estimate(values: np.ndarray, confidence: float = CONFIDENCE, most: float = math.inf) -> Estimate:
    """The mean of independent observations, with its interval.

    Parameters
    ----------
    values : ndarray
        float [N], none of them negative.
    confidence : float
        How often such intervals shall hold, between 0 and 1.
    most : float
        What no value can be above: 1 for shares. Nor is the interval, then.

    Returns
    -------
    Estimate
        The mean; NaN where there are no observations.

    Examples
    --------
    >>> found = mean_estimate(np.repeat([0.0, 0.5, 2.0], [300, 80, 20]))
    >>> [round(number, 3) for number in (found.low, found.value, found.high)]
    [0.148, 0.2, 0.287]
    """
    if not len(values):
        return Estimate(math.nan, math.nan, math.nan, 0)
    found = mean_interval(sample_mean([values], [1.0], [2 * float(np.max(values))]), confidence)
    return replace(found, high=min(found.high, most))


def rate_estimate(hits: int, count: int, confidence: float = CONFIDENCE) -> Estimate:
    """The proportion of hits among independent trials, with its interval.

    Parameters
    ----------
    hits : int
        How many trials hit.
    count : int
        How many trials there were.
    confidence : float
        How often such intervals shall hold, between 0 and 1.

    Returns
    -------
    Estimate
        The proportion; NaN where there were no trials.

    Examples
    --------
    >>> found = rate_estimate(5, 400)
    >>> [round(number, 4) for number in (found.low, found.value, found.high)]
    [0.0042, 0.0125, 0.0367]
    """
    if not count:
        return Estimate(math.nan, math.nan, math.nan, 0)
    rate = hits / count
    found = rate_interval(Sample(rate, 0.0, 0.0, count, _one_more_trial(hits, count)), confidence)
    return replace(found, error=math.sqrt(rate * (1 - rate) / count))


def _one_more_trial(hits: int, count: int) -> tuple[float, float, float]:
    """What one more trial, a hit where hits are the rarer outcome, changes: the `unseen` of a Sample."""
    rate = (hits + (2 * hits <= count)) / (count + 1)
    return rate - hits / count, rate * (1 - rate) / count, 0.0


def paired_difference(minuend: np.ndarray, subtrahend: np.ndarray, confidence: float = CONFIDENCE) -> Estimate:
    """The difference of two means over the same observations, as of two classifiers on the same images.

    What an image adds to both cancels, so the interval is Student's, of the differences.

    Parameters
    ----------
    minuend, subtrahend : ndarray
        float [N], in the same order.
    confidence : float
        How often such intervals shall hold, between 0 and 1.

    Returns
    -------
    Estimate
        mean(minuend) - mean(subtrahend); NaN where there are no observations, and no limits where there is one.

    Raises
    ------
    ValueError
        The arrays differ in shape.

    Examples
    --------
    >>> paired_difference(np.array([0.5, 0.75, 1.0]), np.array([0.25, 0.5, 0.75]))
    Estimate(value=0.25, low=0.25, high=0.25, n=3)
    """
    if minuend.shape != subtrahend.shape:
        raise ValueError(f"paired observations must be as many: {minuend.shape} and {subtrahend.shape}")
    count = len(minuend)
    if not count:
        return Estimate(math.nan, math.nan, math.nan, 0)
    each = minuend - subtrahend
    mean, half = float(each.mean()), math.nan
    if count > 1:
        half = float(stdtrit(count - 1, 0.5 + confidence / 2) * each.std(ddof=1) / math.sqrt(count))
    return Estimate(mean, mean - half, mean + half, count)


def over_trainings(estimates: Sequence[Estimate], within: tuple[float, float], confidence: float = CONFIDENCE) -> Estimate:
    """The mean over trainings of one method, with an interval that holds for trainings that were not made.

    Each training's estimate errs by the training's own luck and by that of its injections. The spread of the estimates holds
    both, so Student's interval of their mean holds both, and neither is added to it. A few trainings may agree by chance: the
    interval is never narrower than the injections alone allow, with the single intervals in quadrature.

    Quantities without an upper end are averaged as logarithms where all estimates are above 0. Their mean is then the geometric
    one, and a ratio of means is the mean of ratios. Others have the plain mean, and the interval is cut where they end.

    Parameters
    ----------
    estimates : sequence of Estimate
        One per training, at least one. A single one is returned as it is: it says nothing of other trainings.
    within : (float, float)
        The least and the largest number that the quantity can be: (0, inf) of DeltaLoss and ratios, (0, 1) of shares, and
        (-inf, inf) of differences.
    confidence : float
        How often such intervals shall hold, between 0 and 1; that of the single intervals.

    Returns
    -------
    Estimate
        The mean; NaN where an estimate is not finite. Where none of the trainings saw anything, the upper end is the largest of
        theirs.

    Examples
    --------
    >>> trainings = [Estimate(2.0, 1.9, 2.1, n=100), Estimate(8.0, 7.6, 8.4, n=100)]
    >>> found = over_trainings(trainings, (0.0, math.inf), confidence=0.8)
    >>> [round(number, 2) for number in (found.low, found.value, found.high)], found.n
    ([0.47, 4.0, 33.77], 200)
    """
    if len(estimates) == 1:
        return estimates[0]
    count, n = len(estimates), sum(estimate.n for estimate in estimates)
    value, low, high = np.array([(estimate.value, estimate.low, estimate.high) for estimate in estimates], dtype=float).T
    if not np.isfinite(value).all():
        return Estimate(math.nan, math.nan, math.nan, n)
    if not value.any():
        return Estimate(0.0, float(low.min()), float(high.max()), n)
    logs = within == (0.0, math.inf) and (value > 0).all()
    with np.errstate(divide="ignore", over="ignore"):
        if logs:
            value, low, high = np.log(value), np.log(low), np.log(high)
        mean, spread = value.mean(), value.std(ddof=1) / math.sqrt(count)
        half = stdtrit(count - 1, 0.5 + confidence / 2) * spread
        below, above = (np.maximum(half, np.sqrt((side**2).sum()) / count) for side in (value - low, high - value))
        numbers = np.array([mean, mean - below, mean + above])
        # What is above LARGEST is as good as unbounded, and files do not hold it.
        mean, low, high = (
            np.exp(np.where(numbers > math.log(LARGEST), math.inf, numbers)) if logs else np.clip(numbers, *within)
        )
    return Estimate(float(mean), float(low), float(high), n)


def ratio_of(numerator: Estimate, denominator: Estimate) -> Estimate:
    """The ratio of two independent estimates of what is never below 0, with an interval from theirs.

    The distances of each estimate from the ends of its interval, as logarithms, add up in quadrature. (Zou and Donner,
    Statistics in Medicine 27, 2008, call it MOVER.)

    Parameters
    ----------
    numerator, denominator : Estimate
        Of one confidence, which the result has too.

    Returns
    -------
    Estimate
        The ratio; NaN where one of them is not above 0. An end is 0 or infinite where an interval reaches 0 or has no end.

    Examples
    --------
    >>> found = ratio_of(Estimate(8.0, 4.0, 16.0, n=10), Estimate(2.0, 1.0, 4.0, n=20))
    >>> [round(number, 2) for number in (found.low, found.value, found.high)], found.n
    ([1.5, 4.0, 10.66], 10)
    """
    count = min(numerator.n, denominator.n)
    if not (numerator.value > 0 and denominator.value > 0):
        return Estimate(math.nan, math.nan, math.nan, count)

    def reach(estimate: Estimate, end: float) -> float:
        """How far an end of the interval is, as a logarithm; infinitely far where it is 0, or where there is none."""
        return abs(math.log(end / estimate.value)) if 0 < end < math.inf else math.inf

    value = numerator.value / denominator.value
    low = value * math.exp(-math.hypot(reach(numerator, numerator.low), reach(denominator, denominator.high)))
    far = math.hypot(reach(numerator, numerator.high), reach(denominator, denominator.low))
    return Estimate(value, low, value * math.exp(far) if far < math.log(LARGEST) else math.inf, count)


def few_injections(injections: int, plan: str) -> str:
    """What to say beside intervals of DeltaLoss that too few injections made.

    On layers of trained classifiers, intervals of fewer uniform injections hold far less often than they say. Guided ones
    mostly hold from 64 on (benchmarks/coverage.py).

    Parameters
    ----------
    injections : int
        The number of injections into a sampled layer: the smallest one.
    plan : {"uniform", "proportional", "neyman", "guided"}
        How they were drawn.

    Returns
    -------
    str
        A sentence for a caption; empty where intervals hold.

    Examples
    --------
    >>> few_injections(256, "uniform")
    'Intervals of fewer than 1,024 uniform injections per layer hold less often than they say; here are 256.'
    >>> few_injections(256, "guided")
    ''
    """
    needed = HOLD_FROM_GUIDED if plan == "guided" else HOLD_FROM
    if injections >= needed:
        return ""
    few = f"fewer than {needed:,} {plan} injections per layer"
    return f"Intervals of {few} hold less often than they say; here are {injections:,}."


def planned_injections(population: int, half_width: float, confidence: float = CONFIDENCE) -> int:
    """How many injections bring any rate to a half-width.

    Parameters
    ----------
    population : int
        How many faults there are.
    half_width : float
        The wanted half-width of the interval, as a proportion: 0.01 for +- 1 %.
    confidence : float
        The confidence of that interval, between 0 and 1.

    Returns
    -------
    int
        The number of injections for the rate that needs most, 0.5.

    References
    ----------
    Leveugle et al., "Statistical Fault Injection: Quantified Error and Confidence", DATE 2009.

    Examples
    --------
    >>> planned_injections(1_000_000_000, half_width=0.01, confidence=0.95)
    9604
    """
    z = quantile(confidence)
    return math.ceil(population / (1 + half_width**2 * (population - 1) / (z**2 * 0.25)))


def planned_half_width(population: int, injections: int, confidence: float = CONFIDENCE) -> float:
    """The half-width that a number of injections brings any rate to: the inverse of `planned_injections`.

    Parameters
    ----------
    population : int
        How many faults there are.
    injections : int
        How many of them are injected.
    confidence : float
        The confidence of that interval, between 0 and 1.

    Returns
    -------
    float
        The half-width for the rate that needs most, 0.5, as a proportion; 0 where all faults are injected.

    Examples
    --------
    >>> round(planned_half_width(1_000_000_000, injections=9604, confidence=0.95), 4)
    0.01
    """
    if injections >= population:
        return 0.0
    return quantile(confidence) * math.sqrt(0.25 * (population - injections) / ((population - 1) * injections))
