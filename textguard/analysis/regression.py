"""Did a run get worse? Two states of it, compared number by number: what the regression gate decides by.

Runs of equal weights differ by what was changed around them. Each of their numbers is tested in one of four ways.

- exact: both values come from enumeration (low == value == high), and differ or do not.
- unpaired: the difference over the standard errors of the samplings, in quadrature, and the normal distribution. As in the
  test of a pooled variance, the variance also holds what the difference itself adds to it, squared / (n + n): without it,
  samples in which all observations are equal would prove anything. Intervals play no part: they hold what a sample may have
  missed, and would hide what it has seen.
- paired: both files hold blocks, means of equal parts of the sample, from the same faults (or, for top-1, the same images). The
  p-value is the share of all sign flips of the blocks' differences that reach their sum: Fisher's randomisation test, exact
  where base and new are exchangeable within a block. It finds that every fault does more, however skewed DeltaLoss is. Where
  other faults do the harm, pairs tell little, and the unpaired test is the better one. Both are made, and twice the smaller
  p-value counts (Bonferroni); the name of the test is that of the smaller one.
- layers: the logarithms of new / base of all sampled layers, with flipped signs as well. Means over layers are those of the few
  layers that suffer most, and uncertain like them; that most layers do more shows in this. Layers that share their images do
  not err independently, and are not tested so.

Runs of other weights are other trainings, which differ by luck. They are judged where both sides hold two or more of one data
set, backbone and variant: by Welch's t test over trainings, of the logarithms (of top-1 itself), with the spread between
trainings, or that of the samplings where it is larger. Elsewhere they are listed.

Ratios to a baseline are shown and never judged: a baseline that became better makes them smaller.

No change is within a relative tolerance of a base of 0: there, significance alone decides. A change of DeltaLoss that fp32
rounds away is always within tolerance. What is null cannot be compared; it is listed, like runs and layers that only one side
has, and does not fail.

Sources: Fisher, The Design of Experiments, 1935, section 21. Holm, Scandinavian Journal of Statistics 6, 1979. Welch,
Biometrika 34, 1947.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.special import stdtr

from textguard.params import GateParams
from textguard.schema.base import Measured
from textguard.schema.results import Layer, RunResult

FEWEST_BLOCKS = 16  # with fewer, flipped signs cannot reach the p-values that hundreds of comparisons ask for
MOST_BLOCKS = 32  # two halves of 2^16 sums; more are merged
FEWEST_TRAININGS = 2  # of each side: one has no spread
ROUNDING = 1e-9  # 0.97 - 0.96 is not above 0.01
NOISE = 1e-6  # nats: what fp32 rounds a cross entropy by, which another order of additions changes
NOT_COMPARABLE = "not comparable"
ANOTHER = "another training"
NOT_JUDGED = "not judged"
Unit = Literal["accuracy", "share", "nats", "times"]


@dataclass(frozen=True)
class Quantity:
    """What is compared of two runs. tolerance: the name of its tolerance in GateParams; empty where it is only shown."""

    name: str
    of: Callable[[RunResult], Measured | None]
    unit: Unit
    tolerance: str = ""


@dataclass(frozen=True)
class LayerQuantity:
    """The same of their layers."""

    name: str
    of: Callable[[Layer], Measured]
    unit: Unit
    tolerance: str


QUANTITIES = (
    Quantity("top-1", lambda run: run.top1, "accuracy", "top1_points"),
    Quantity("DeltaLoss, overall", lambda run: run.overall.delta_loss, "nats", "delta_loss_percent"),
    Quantity("SDC, overall", lambda run: run.overall.sdc, "share", "sdc_percent"),
    Quantity("mismatch, overall", lambda run: run.overall.mismatch, "share", "sdc_percent"),
    Quantity("SDC, all neurons", lambda run: run.by_neurons.sdc, "share", "sdc_percent"),
    Quantity("DeltaLoss, head alone", lambda run: run.head.delta_loss, "nats", "delta_loss_percent"),
    Quantity("SDC, head alone", lambda run: run.head.sdc, "share", "sdc_percent"),
    Quantity("DeltaLoss, last layer", lambda run: run.last_layer.delta_loss, "nats", "delta_loss_percent"),
    Quantity("SDC, last layer", lambda run: run.last_layer.sdc, "share", "sdc_percent"),
    Quantity("improvement of SDC, overall", lambda run: run.improvement and run.improvement.sdc.overall, "times"),
    Quantity("improvement of DeltaLoss, overall", lambda run: run.improvement and run.improvement.delta_loss.overall, "times"),
)
LAYER_QUANTITIES = (
    LayerQuantity("DeltaLoss", lambda layer: layer.delta_loss, "nats", "delta_loss_percent"),
    LayerQuantity("SDC", lambda layer: layer.sdc, "share", "sdc_percent"),
)


@dataclass(frozen=True)
class Comparison:
    """One quantity of one run, before and now. p: one-sided, in the direction of the change; NaN where nothing can be compared.

    worse_by, allowed: in units of the test: share (accuracy, share) or nats; over layers and over trainings, the logarithm of
    the ratio, but of top-1. note: why nothing is compared. headline: whether it is of the whole run, and not of one of its
    layers.
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
    note: str = NOT_COMPARABLE
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
    """Compare runs of the same name and weights, and trainings of the same kind; list all others."""
    same = {name for name in base.keys() & new.keys() if base[name].weights == new[name].weights}
    trainings = [_trainings(side, same) for side in (base, new)]
    judged = [cell for cell in trainings[0] if min(len(side.get(cell, ())) for side in trainings) >= FEWEST_TRAININGS]
    comparisons = []
    for name in sorted(base.keys() | new.keys()):
        runs = [side[name] for side in (base, new) if name in side]
        if name in same:
            comparisons += compare(*runs, tolerances)
        elif not all(_cell(run) in judged for run in runs):
            if len(runs) == 2:
                comparisons += list_trainings(*runs)
            else:
                comparisons.append(Comparison(runs[0].run, "all", note="gone" if name in base else "new"))
    for cell in judged:
        comparisons += compare_trainings(*(side[cell] for side in trainings), tolerances)
    return comparisons


def _cell(run: RunResult) -> tuple[str, str, str]:
    return run.dataset, run.backbone, run.variant


def _trainings(runs: Mapping[str, RunResult], without: set[str]) -> dict[tuple[str, str, str], list[RunResult]]:
    """Cell -> its runs but those named, one of each training."""
    cells: dict[tuple[str, str, str], dict[str, RunResult]] = {}
    for name in sorted(runs.keys() - without):
        cells.setdefault(_cell(runs[name]), {}).setdefault(runs[name].weights, runs[name])
    return {cell: list(found.values()) for cell, found in cells.items()}


def compare(base: RunResult, new: RunResult, tolerances: GateParams) -> list[Comparison]:
    """Compare all quantities of two runs of the same weights: those of the whole run first, then layer by layer."""
    name = _name(base, new)
    same_faults, same_images = base.plan.mark == new.plan.mark, base.images == new.images
    comparisons = []
    for quantity in QUANTITIES:
        old, now = quantity.of(base), quantity.of(new)
        if quantity.tolerance and old and now:
            paired = same_images if quantity.unit == "accuracy" else same_faults
            comparisons.append(compare_measured(name, quantity, old, now, tolerances, paired=paired))
        elif old or now:
            comparisons.append(Comparison(name, quantity.name, quantity.unit, old, now, note=NOT_JUDGED))
    if base.confidence != new.confidence:
        comparisons.append(Comparison(name, "confidence of intervals", note=f"{base.confidence:g} -> {new.confidence:g}"))
    layers = [{layer.layer: layer for layer in run.layers} for run in (base, new)]
    if "shared" not in (base.settings["images"], new.settings["images"]):
        both = [(layers[0][name], layers[1][name]) for name in layers[0] if name in layers[1]]
        sampled = [pair for pair in both if all(layer.method == "sampled" for layer in pair)]
        for part in LAYER_QUANTITIES:
            comparisons.append(compare_layers(name, part, [tuple(map(part.of, pair)) for pair in sampled], tolerances))
    for layer in dict.fromkeys([*layers[0], *layers[1]]):
        before, after = layers[0].get(layer), layers[1].get(layer)
        if before and after:
            comparisons += [
                compare_measured(name, part, part.of(before), part.of(after), tolerances, paired=same_faults, layer=layer)
                for part in LAYER_QUANTITIES
            ]
        else:
            comparisons.append(Comparison(name, layer, note="gone" if before else "new", headline=False))
    return comparisons


def _name(base: RunResult, new: RunResult) -> str:
    return new.run if base.run == new.run else f"{base.run} -> {new.run}"


def compare_measured(
    run: str,
    quantity: Quantity | LayerQuantity,
    old: Measured,
    now: Measured,
    tolerances: GateParams,
    *,
    paired: bool,
    layer: str = "",
) -> Comparison:
    """Compare one number of a run. paired: whether both come from the same faults, or images."""
    tolerance = getattr(tolerances, quantity.tolerance) / 100
    if quantity.unit == "accuracy":
        worse_by, allowed = old.value - now.value, tolerance + ROUNDING
    else:
        worse_by, allowed = now.value - old.value, (tolerance + ROUNDING) * old.value
        allowed = max(allowed, NOISE) if quantity.unit == "nats" else allowed
    name = f"{quantity.name}, {layer}" if layer else quantity.name
    tested, p = _test(old, now, paired=paired)
    return Comparison(run, name, quantity.unit, old, now, tested, worse_by, allowed, p, headline=not layer)


def compare_layers(
    run: str, quantity: LayerQuantity, pairs: Sequence[tuple[Measured, Measured]], tolerances: GateParams
) -> Comparison:
    """Compare the geometric means over layers, of which each has a number before and now, sampled independently of the others.

    Layers where a number is 0 or null have no logarithm, and are left out.
    """
    found = [(old.value, now.value) for old, now in pairs if old.value > 0 and now.value > 0]
    before, after = np.log(np.array(found).reshape(-1, 2)).T
    if not found:
        return Comparison(run, f"{quantity.name}, all layers", quantity.unit)
    worse_by = float((after - before).mean())
    shown = [
        Measured(math.exp(logs.mean()), math.nan, math.nan, sum(measured.n for measured in side))
        for logs, side in zip((before, after), zip(*pairs, strict=True), strict=True)
    ]
    p = sign_flip_p((after - before) * math.copysign(1, worse_by))
    allowed = math.log1p(getattr(tolerances, quantity.tolerance) / 100) + ROUNDING
    return Comparison(run, f"{quantity.name}, all layers", quantity.unit, *shown, "layers", worse_by, allowed, p)


def _test(old: Measured, now: Measured, *, paired: bool) -> tuple[str, float]:
    """How a difference is tested, and its one-sided p in its own direction; NaN where it cannot be."""
    difference = now.value - old.value
    if math.isnan(difference):
        return "", math.nan
    if old.exact and now.exact:
        return "exact", 0.0 if difference else 1.0
    unpaired = _unpaired_p(old, now)
    blocks = [np.array(measured.blocks or []) for measured in (old, now)]
    if not (paired and len(blocks[0]) == len(blocks[1]) >= FEWEST_BLOCKS and np.isfinite(blocks).all()):
        return "unpaired", unpaired
    flipped = sign_flip_p((blocks[1] - blocks[0]) * math.copysign(1, difference))
    if unpaired < flipped:
        return "unpaired", min(1.0, 2 * unpaired)
    return "paired", min(1.0, 2 * flipped)


def _unpaired_p(old: Measured, now: Measured) -> float:
    difference, count = now.value - old.value, old.n + now.n
    error = math.hypot(old.error, now.error, difference / math.sqrt(count) if count else math.nan)
    return math.erfc(abs(difference) / error / math.sqrt(2)) / 2 if error else 0.5


def list_trainings(base: RunResult, new: RunResult) -> list[Comparison]:
    """The numbers of two trainings that cannot be told from luck, without a verdict."""
    name = _name(base, new)
    pairs = ((quantity, quantity.of(base), quantity.of(new)) for quantity in QUANTITIES)
    return [
        Comparison(name, quantity.name, quantity.unit, old, now, note=ANOTHER) for quantity, old, now in pairs if old or now
    ]


def compare_trainings(base: Sequence[RunResult], new: Sequence[RunResult], tolerances: GateParams) -> list[Comparison]:
    """Compare the means of two sets of trainings of one data set, backbone and variant, two or more on each side."""
    name = f"{'-'.join(_cell(base[0]))}, {len(base)} trainings -> {len(new)}"
    return [
        compare_over_trainings(name, quantity, *([quantity.of(run) for run in side] for side in (base, new)), tolerances)
        for quantity in QUANTITIES
        if quantity.tolerance
    ]


def compare_over_trainings(
    name: str, quantity: Quantity, base: Sequence[Measured], new: Sequence[Measured], tolerances: GateParams
) -> Comparison:
    """Welch's t test. The means that are shown are geometric, but of top-1."""
    plain, tolerance = quantity.unit == "accuracy", getattr(tolerances, quantity.tolerance) / 100
    means, variances = [], []  # of each side; the variances are those of the means
    for side in (base, new):
        values, errors = (np.array([getattr(found, part) for found in side]) for part in ("value", "error"))
        if not plain:
            values = np.where(values > 0, values, math.nan)
            values, errors = np.log(values), errors / values
        means.append(float(values.mean()))
        # Two trainings may be close by luck, closer than their samplings can tell.
        variances.append(max(float(values.var(ddof=1)), float(np.square(errors).mean())) / len(values))
    sizes = [len(base), len(new)]
    shown = [
        Measured(mean if plain else math.exp(mean), math.nan, math.nan, size) for mean, size in zip(means, sizes, strict=True)
    ]
    difference, variance = means[1] - means[0], sum(variances)
    p = math.nan if difference else 0.5
    if variance > 0:
        freedom = variance**2 / sum(part**2 / (size - 1) for part, size in zip(variances, sizes, strict=True))
        p = float(stdtr(freedom, -abs(difference) / math.sqrt(variance)))
    worse_by, allowed = (-difference, tolerance) if plain else (difference, math.log1p(tolerance))
    return Comparison(name, quantity.name, quantity.unit, *shown, "trainings", worse_by, allowed + ROUNDING, p)


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
    reached = np.searchsorted(second, slack - first[::-1], side="right").sum()
    return float(reached) / (len(first) * len(second))


def _subset_sums(numbers: np.ndarray) -> np.ndarray:
    """The sums of all subsets, in order: each number merges two sorted halves."""
    sums = np.zeros(1)
    for number in numbers:
        sums = np.sort(np.concatenate([sums, sums + number]), kind="stable")
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
