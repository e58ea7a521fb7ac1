"""What one change does: variants set against one another in pairs of trainings, and the factors of a factorial design.

DeltaLoss and SDC are compared as logarithms, so that an effect is a number of times; top-1 in percentage points.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from textguard.analysis.files import load_results
from textguard.analysis.improvement import verdict
from textguard.estimates.factorial import Term, aliases_of, terms_of
from textguard.estimates.statistics import Estimate, over_trainings, paired_difference, quantile, ratio_of
from textguard.params import EffectsParams, Params, design_levels
from textguard.schema.base import Measured
from textguard.schema.effects import OUTCOMES, SECOND, Contrast, Effect, Effects, FactorEffect, Factorial, Fit
from textguard.schema.results import NO_VERDICT, RunResult

COUNT = (0.0, math.inf)
SHARE = (0.0, 1.0)
# Runs of one backbone on one data set: variant, seed.
Runs = Mapping[tuple[str, int], RunResult]


def effects_of(params: Params) -> list[Effects]:
    """The effects that params.yaml asks for, of the grid in the current folder. Raises InvalidArtifact."""
    places: dict[tuple[str, str], dict[tuple[str, int], RunResult]] = {}
    for result in load_results(params.runs).values():
        places.setdefault((result.dataset, result.backbone), {})[result.variant, result.seed] = result
    levels = np.array(design_levels(params)) if params.effects.design else None
    return [estimate_effects(place, runs, params.effects, params.seeds, levels) for place, runs in places.items()]


def estimate_effects(
    place: tuple[str, str], runs: Runs, wanted: EffectsParams, seeds: Sequence[int], levels: np.ndarray | None
) -> Effects:
    """The effects in one backbone on one data set. levels: int [V, F], of the design's variants; None where there is none."""
    contrasts = [contrast(name, runs, *pair, seeds) for name, pair in wanted.contrasts.items()]
    found = {} if levels is None else {"factorial": factorial(runs, wanted, seeds, levels)}
    confidence = next(iter(runs.values())).confidence
    return Effects(dataset=place[0], backbone=place[1], confidence=confidence, contrasts=contrasts, **found)


def contrast(name: str, runs: Runs, variant: str, against: str, seeds: Sequence[int]) -> Contrast:
    """A variant set against another one, over trainings in pairs of one seed."""
    own, others = ([runs[key, seed] for seed in seeds] for key in (variant, against))
    confidence = own[0].confidence
    effects = []
    for measure, place in OUTCOMES:
        zeros = 0
        if measure == "top1":
            first, second = (more_points(others, own, level) for level in (confidence, SECOND))
        else:
            ours, theirs = ([_outcome(run, measure, place) for run in side] for side in (own, others))
            zeros = sum(not (one.value > 0 and other.value > 0) for one, other in zip(ours, theirs, strict=True))
            first, second = (_times(theirs, ours, measure, confidence, level) for level in (confidence, SECOND))
        effects.append(_effect(measure, place, first, second, confidence, zeros, len(seeds)))
    return Contrast(name=name, variant=variant, against=against, seeds=list(seeds), effects=effects)


def _outcome(run: RunResult, measure: str, place: str) -> Estimate:
    return getattr(getattr(run, place), measure)


def _times(theirs: Sequence[Estimate], ours: Sequence[Estimate], measure: str, given: float, wanted: float) -> Estimate:
    """Theirs / ours, the geometric mean over pairs. given, wanted: confidence of the single intervals, and of the result.

    Where one has nothing there is no ratio, and only a bound on that of the means: intervals of both sides hold at once.
    """
    pairs = [_with_confidence(ratio_of(one, other), given, wanted) for one, other in zip(theirs, ours, strict=True)]
    if all(math.isfinite(pair.value) for pair in pairs):
        found = over_trainings(pairs, COUNT, wanted)
        return replace(found, n=len(pairs))
    within = COUNT if measure == "delta_loss" else SHARE
    one, other = (over_trainings(side, within, given) for side in (theirs, ours))
    nothing = [any(not estimate.value > 0 for estimate in side) for side in (theirs, ours)]
    low = math.nan if nothing[0] or not other.high > 0 else one.low / other.high
    high = math.nan if nothing[1] or not other.low > 0 else one.high / other.low
    return Estimate(math.nan, low, high, len(pairs))


def _with_confidence(ratio: Estimate, given: float, wanted: float) -> Estimate:
    """A ratio's interval at another confidence: its distances, as logarithms, change as quantiles of the normal do."""
    power = quantile(wanted) / quantile(given)
    low, high = (ratio.value * (end / ratio.value) ** power for end in (ratio.low, ratio.high))
    return replace(ratio, low=low, high=high)


def more_points(theirs: Sequence[RunResult], ours: Sequence[RunResult], confidence: float) -> Estimate:
    """Points of top-1 that ours have more, by Student's interval of pairs of trainings; of a single pair without one.

    It is never narrower than whole images allow: trainings whose differences are equal may differ by a part of one.
    """
    step = 100 / ours[0].top1.n
    # Whole images, so that equal means differ by 0 and not by rounding.
    hits = (np.array([round(run.top1.value * run.top1.n) for run in side]) for side in (ours, theirs))
    found = paired_difference(*hits, confidence).times(step)
    half = max(found.high - found.value, quantile(confidence) * step / math.sqrt(6 * len(ours)))
    return Estimate(found.value, found.value - half, found.value + half, len(ours))


def _effect(
    measure: str, place: str, first: Estimate, second: Estimate, confidence: float, zeros: int, trainings: int
) -> Effect:
    points = measure == "top1"
    if not math.isfinite(first.value):
        largest, said = math.nan, NO_VERDICT
    elif points:
        largest = max(abs(first.low), abs(first.high))
        said = verdict(replace(first, low=1 + first.low, high=1 + first.high), confidence, trainings)
    else:
        largest = max(first.high, 1 / first.low) if first.low > 0 else math.inf
        said = verdict(first, confidence, trainings)
    return Effect(
        measure=measure,
        place=place,
        effect=Measured.of(first),
        second=Measured.of(second),
        largest=largest,
        zeros=zeros,
        verdict=said,
    )


@dataclass(frozen=True)
class Fitted:
    """A least squares fit: of each column its coefficient, its standard error, and what is left."""

    values: np.ndarray
    errors: np.ndarray
    degrees: int
    spread: float
    explained: float


def fit_columns(columns: np.ndarray, blocks: np.ndarray, outcome: np.ndarray, known: np.ndarray) -> Fitted:
    """Ordinary least squares of an outcome [N] on columns [N, K], with a mean for each block; blocks: int [N].

    known: float [N], the standard error of each outcome by itself, as of the injections behind it. No coefficient's error is
    smaller than these make it: trainings may agree by chance.
    """
    # A second to import, which nobody needs who has no design.
    from statsmodels.regression.linear_model import OLS

    means = (blocks[:, None] == np.unique(blocks)).astype(float)
    matrix, own = np.column_stack([means, columns]), slice(means.shape[1], None)
    done = OLS(outcome, matrix).fit()
    errors = np.maximum(done.bse, np.sqrt(np.linalg.pinv(matrix) ** 2 @ known**2))
    varies = float(np.ptp(outcome)) > 1e-9 * float(np.abs(outcome).max())  # or all that is left is rounding
    total = float(((outcome - outcome.mean()) ** 2).sum())
    explained = min(1.0, max(0.0, 1 - float(done.ssr) / total)) if varies else math.nan
    return Fitted(np.asarray(done.params)[own], errors[own], int(done.df_resid), math.sqrt(done.mse_resid), explained)


def factorial(runs: Runs, wanted: EffectsParams, seeds: Sequence[int], levels: np.ndarray) -> Factorial:
    """Main effects and two-way interactions of a design; seeds are its blocks. levels: int [V, F] of its variants."""
    names, aliases = list(wanted.factors), aliases_of(levels)
    design = [(variant, seed) for variant in wanted.design for seed in seeds]
    terms, members = terms_of(levels), [runs[key] for key in design]
    rows = np.repeat(np.arange(len(levels)), len(seeds))
    columns = np.column_stack([terms[term] for term in aliases])[rows]
    blocks, confidence = np.array([seed for _, seed in design]), members[0].confidence
    effects: dict[Term, list[Effect]] = {term: [] for term in aliases}
    fits = []
    for measure, place in OUTCOMES:
        found = [run.top1.times(100) if measure == "top1" else _outcome(run, measure, place) for run in members]
        values = np.array([estimate.value for estimate in found])
        usable = np.isfinite(values) & ((values > 0) | (measure == "top1"))
        zeros, fitted = int((~usable).sum()), None
        if not zeros:
            # Damage that shrinks is an effect above 0, that is, above one time.
            outcome = values if measure == "top1" else -np.log(values)
            known = np.array([_known(estimate, measure, confidence) for estimate in found])
            fitted = fit_columns(columns, blocks, outcome, known)
            fits.append(
                Fit(
                    measure=measure,
                    place=place,
                    degrees=fitted.degrees,
                    spread=fitted.spread,
                    explained=fitted.explained,
                )
            )
        for number, term in enumerate(aliases):
            # From the low level to the high one, a column changes by 2; and so does that change itself, for an interaction.
            factor = 2.0 * len(term)
            show = _as_points if measure == "top1" else math.exp
            first, second = (
                _of_coefficient(fitted, number, factor, show, level, len(members)) for level in (confidence, SECOND)
            )
            effects[term].append(_effect(measure, place, first, second, confidence, zeros, len(members)))
    described = [
        FactorEffect(
            factors=[names[place] for place in term],
            aliases=[[names[place] for place in other] for other in aliases[term]],
            effects=effects[term],
        )
        for term in aliases
    ]
    return Factorial(
        factors=dict(wanted.factors), variants=list(wanted.design), seeds=list(seeds), effects=described, fits=fits
    )


def _known(estimate: Estimate, measure: str, confidence: float) -> float:
    """The standard error of a training's outcome by itself, as it is fitted; of top-1, that of counting whole images."""
    if measure == "top1":
        return 100 / estimate.n / math.sqrt(12)
    # As the narrower side has it: the wider one also allows for what was not seen.
    ends = [end for end in (estimate.low, estimate.high) if 0 < end < math.inf]
    return min((abs(math.log(end / estimate.value)) for end in ends), default=0.0) / quantile(confidence)


def _as_points(number: float) -> float:
    return number


def _of_coefficient(
    fitted: Fitted | None, number: int, factor: float, show: Callable[[float], float], confidence: float, n: int
) -> Estimate:
    """A coefficient times a factor, with Student's interval; nothing where nothing could be fitted."""
    if fitted is None:
        return Estimate(math.nan, math.nan, math.nan, n)
    from scipy.special import stdtrit

    half = float(stdtrit(fitted.degrees, 0.5 + confidence / 2) * fitted.errors[number])
    value = float(fitted.values[number])
    low, middle, high = (show(max(-600.0, min(600.0, factor * part))) for part in (value - half, value, value + half))
    return Estimate(middle, low, high, n)
