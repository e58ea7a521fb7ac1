"""Did a run get worse? Two states of it, compared number by number: what the regression gate decides by.

A difference is tested in one of three ways.

- exact: both values come from enumeration (low == value == high), and differ or do not.
- paired: both files hold blocks, means of equal parts of the sample, from the same faults (or, for top-1, the same images). The
  p-value is the share of all sign flips of the blocks' differences that reach their sum: Fisher's randomisation test, exact
  where base and new are exchangeable within a block. The t test would not do: DeltaLoss is so skewed that a few faults make its
  mean, and t finds a layer whose every DeltaLoss has doubled only by luck (1024 injections, coefficient of variation 20).
- unpaired: standard errors from the intervals, added in quadrature, and the normal distribution. Improvements are always tested
  so, on the logarithm.

No change is within a relative tolerance of a base of 0: there, significance alone decides. What is null cannot be compared; it
is listed, like runs and layers that only one side has, and does not fail.

Sources: Fisher, The Design of Experiments, 1935, section 21. Holm, Scandinavian Journal of Statistics 6, 1979.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

import numpy as np

from textguard.params import GateParams
from textguard.schema.base import Measured
from textguard.schema.results import RunResult

FEWEST_BLOCKS = 16  # with fewer, flipped signs cannot reach the p-values that hundreds of comparisons ask for
MOST_BLOCKS = 32  # two halves of 2^16 sums; more are merged
ROUNDING = 1e-9  # 0.97 - 0.96 is not above 0.01
Unit = Literal["accuracy", "share", "nats", "times"]


@dataclass(frozen=True)
class Comparison:
    """One quantity of one run, before and now. p: one-sided, in the direction of the change; NaN where nothing can be compared.

    worse_by, allowed: in units of the test: share (accuracy, share), nats, logarithm (times). note: why nothing is compared.
    headline: whether it is of the whole run, and not of one of its layers.
    """

    run: str
    quantity: str
    unit: Unit = "nats"
    base: Measured | None = None
    new: Measured | None = None
    tested: str = ""
    worse_by: float = math.nan
    allowed: float = math.nan
    p: float = math.nan
    note: str = "not comparable"
    headline: bool = True


@dataclass(frozen=True)
class Judgement:
    """What is made of a comparison. p: with Holm's correction. verdict: better, worse, same, within tolerance, not separable;
    where nothing was compared, why.
    """

    comparison: Comparison
    p: float
    verdict: str


def compare_all(base: Mapping[str, RunResult], new: Mapping[str, RunResult], tolerances: GateParams) -> list[Comparison]:
    """Compare runs of the same name; list those that only one side has."""
    comparisons = []
    for name in sorted(base.keys() | new.keys()):
        if name in base and name in new:
            comparisons += compare(base[name], new[name], tolerances)
        else:
            run, note = (base[name].run, "gone") if name in base else (new[name].run, "new")
            comparisons.append(Comparison(run, "all", note=note))
    return comparisons


def compare(base: RunResult, new: RunResult, tolerances: GateParams) -> list[Comparison]:
    """Compare all quantities of two runs: top-1, overall, last layer and improvements first, then layer by layer."""
    name = new.run if base.run == new.run else f"{base.run} -> {new.run}"
    quantiles = [NormalDist().inv_cdf((1 + run.confidence) / 2) for run in (base, new)]
    same_faults = base.plan.mark == new.plan.mark

    def top1(old: Measured, now: Measured) -> Comparison:
        tested, p = _test(old, now, quantiles, paired=base.images == new.images)
        allowed = tolerances.top1_points / 100 + ROUNDING
        return Comparison(name, "top-1", "accuracy", old, now, tested, old.value - now.value, allowed, p)

    def loss(
        quantity: str, old: Measured, now: Measured, percent: float, unit: Unit = "nats", headline: bool = True
    ) -> Comparison:
        tested, p = _test(old, now, quantiles, paired=same_faults)
        allowed = (percent / 100 + ROUNDING) * old.value
        return Comparison(name, quantity, unit, old, now, tested, now.value - old.value, allowed, p, headline=headline)

    def improvement(quantity: str, old: Measured, now: Measured) -> Comparison:
        before, after = _log(old), _log(now)
        tested, p = _test(before, after, quantiles, paired=False)
        allowed = -math.log1p(-tolerances.improvement_percent / 100) + ROUNDING
        return Comparison(name, quantity, "times", old, now, tested, before.value - after.value, allowed, p)

    percent = tolerances.delta_loss_percent
    comparisons = [
        top1(base.top1, new.top1),
        loss("DeltaLoss, overall", base.overall.delta_loss, new.overall.delta_loss, percent),
        loss("SDC, overall", base.overall.sdc, new.overall.sdc, tolerances.sdc_percent, "share"),
        loss("DeltaLoss, last layer", base.last_layer.delta_loss, new.last_layer.delta_loss, percent),
    ]
    if base.improvement and new.improvement and base.improvement.baseline == new.improvement.baseline:
        comparisons += [
            improvement("improvement, last layer", base.improvement.last_layer, new.improvement.last_layer),
            improvement("improvement, overall", base.improvement.overall, new.improvement.overall),
        ]
    elif base.improvement or new.improvement:
        comparisons.append(Comparison(name, "improvement"))
    if base.confidence != new.confidence:
        comparisons.append(Comparison(name, "confidence of intervals", note=f"{base.confidence:g} -> {new.confidence:g}"))
    layers = [{layer.layer: layer.delta_loss for layer in run.layers} for run in (base, new)]
    for layer in dict.fromkeys([*layers[0], *layers[1]]):
        old, now = layers[0].get(layer), layers[1].get(layer)
        if old and now:
            comparisons.append(loss(f"DeltaLoss, {layer}", old, now, percent, headline=False))
        else:
            comparisons.append(Comparison(name, f"DeltaLoss, {layer}", note="gone" if old else "new", headline=False))
    return comparisons


def _log(measured: Measured) -> Measured:
    """The same on the logarithm, NaN where there is none."""
    numbers = (measured.value, measured.low, measured.high)
    return Measured(*(math.log(number) if number > 0 else math.nan for number in numbers), n=measured.n)


def _test(old: Measured, now: Measured, quantiles: list[float], *, paired: bool) -> tuple[str, float]:
    """How a difference is tested, and its one-sided p in its own direction; NaN where it cannot be.

    quantiles: of the normal distribution, that the two intervals were made with.
    """
    difference = now.value - old.value
    if math.isnan(difference):
        return "", math.nan
    if old.exact and now.exact:
        return "exact", 0.0 if difference else 1.0
    blocks = [np.array(measured.blocks or []) for measured in (old, now)]
    if paired and len(blocks[0]) == len(blocks[1]) >= FEWEST_BLOCKS and np.isfinite(blocks).all():
        return "paired", sign_flip_p((blocks[1] - blocks[0]) * math.copysign(1, difference))
    error = math.hypot(*((m.high - m.low) / (2 * z) for m, z in zip((old, now), quantiles, strict=True)))
    return "unpaired", math.erfc(abs(difference) / error / math.sqrt(2)) / 2 if error else math.nan


def sign_flip_p(differences: np.ndarray) -> float:
    """Share of the 2^K ways to flip the signs of K differences, shape [K], whose sum is at least that of the differences.

    All ways are counted, with sums of halves. Neighbours are merged while there are more than MOST_BLOCKS of them.
    """
    differences = differences[differences != 0]  # flipped or not, these change nothing
    while len(differences) > MOST_BLOCKS:
        differences = np.add.reduceat(differences, range(0, len(differences), 2))
    # The sum stays as large where those that are flipped add up to 0 or less.
    first, second = (_subset_sums(half) for half in np.array_split(differences, 2))
    slack = 1e-12 * np.abs(differences).sum()
    reached = np.searchsorted(np.sort(second), slack - first, side="right").sum()
    return float(reached) / (len(first) * len(second))


def _subset_sums(numbers: np.ndarray) -> np.ndarray:
    sums = np.zeros(1)
    for number in numbers:
        sums = np.concatenate([sums, sums + number])
    return sums


def holm(p_values: np.ndarray) -> np.ndarray:
    """p-values, shape [M], adjusted so that those at most alpha hold one false alarm or more with probability alpha at most."""
    order = np.argsort(p_values)
    adjusted = np.empty(len(p_values))
    adjusted[order] = np.minimum(1, np.maximum.accumulate(p_values[order] * np.arange(len(p_values), 0, -1)))
    return adjusted


def judge(comparisons: Sequence[Comparison], significance: float) -> list[Judgement]:
    """The verdict of every comparison.

    Holm's correction is applied to the worsenings and to the improvements separately, each over all comparisons: in the
    family of worsenings, a change for the better counts as p = 1, and the other way round.
    """
    p = np.array([comparison.p for comparison in comparisons])
    worse_by = np.array([comparison.worse_by for comparison in comparisons])
    tested = ~np.isnan(p)
    adjusted = np.full(len(p), math.nan)
    worse, better = (holm(np.where(sign * worse_by[tested] > 0, p[tested], 1)) for sign in (1, -1))
    adjusted[tested] = np.minimum(worse, better)
    return [
        Judgement(comparison, float(corrected), _verdict(comparison, corrected <= significance))
        for comparison, corrected in zip(comparisons, adjusted, strict=True)
    ]


def _verdict(comparison: Comparison, significant: bool) -> str:
    if math.isnan(comparison.p):
        return comparison.note
    if not comparison.worse_by:
        return "same"
    if abs(comparison.worse_by) <= comparison.allowed:
        return "within tolerance"
    if not significant:
        return "not separable"
    return "worse" if comparison.worse_by > 0 else "better"
