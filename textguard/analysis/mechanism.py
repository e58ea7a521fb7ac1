"""What goes with resilience: over many classifiers, how far the scores go against what faults do to them.

An association over classifiers says what goes together and not what makes what. What a constant does alone, the tables say
(`rescaled` in textguard.schema.results): there, the same classifier is set against itself.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from textguard.estimates.ranks import rank_correlation
from textguard.estimates.statistics import CONFIDENCE, Estimate
from textguard.schema.results import RunResult

RESAMPLES, SEED = 2000, 0
KIND = ["grid", "dataset", "backbone", "variant"]  # classifiers that differ in nothing else are trainings of one recipe
NETWORK = KIND[:3]


def classifiers(grids: Mapping[str, Sequence[RunResult]]) -> pd.DataFrame:
    """One row per classifier of these grids: where it is from, its largest logit, top-1, and what faults do to it.

    largest_logit: on training images. top1: a share. delta_loss (nats) and sdc (a share): of all layers, in the plain mean;
    head_delta_loss and head_sdc: of the last layer alone. Classifiers of one data set and network that are in several grids
    with the same weights count once, in the first grid that names them.
    """
    rows, seen = [], set()
    for grid, results in grids.items():
        for result in results:
            if result.weights in seen:
                continue
            seen.add(result.weights)
            rows.append(
                {
                    "grid": grid,
                    "dataset": result.dataset,
                    "backbone": result.backbone,
                    "variant": result.variant,
                    "seed": result.seed,
                    "largest_logit": result.largest_logit,
                    "top1": result.top1.value,
                    "delta_loss": result.overall.delta_loss.value,
                    "sdc": result.overall.sdc.value,
                    "head_delta_loss": result.head.delta_loss.value,
                    "head_sdc": result.head.sdc.value,
                }
            )
    return pd.DataFrame(rows)


def association(found: pd.DataFrame, cause: str, effect: str, confidence: float = CONFIDENCE) -> dict[str, Estimate]:
    """How log `effect` goes with log `cause` over classifiers.

    found: as `classifiers` gives it; those with a value that is 0 or not finite are left out, as they have no logarithm.
    Returns `correlation` (Pearson's) and `slope` (of log effect on log cause, by least squares), and the same `within` networks
    of one grid, whose means are taken out. Intervals are percentiles of a bootstrap that draws kinds of classifiers whole
    (grid, data set, network and variant), because trainings of one recipe are alike. n counts classifiers.

    >>> table = pd.DataFrame({name: ["a"] * 8 for name in NETWORK} | {"variant": list("abcdabcd")})
    >>> table["x"] = [1.0, 2, 4, 8, 1, 2, 4, 8]
    >>> table["y"] = table["x"] ** 2
    >>> round(association(table, "x", "y")["slope"].value, 6)
    2.0
    """
    usable = found[np.isfinite(found[[cause, effect]]).all(axis=1) & (found[[cause, effect]] > 0).all(axis=1)]
    logs = usable[KIND].assign(x=np.log(usable[cause]), y=np.log(usable[effect]))
    inner = logs.copy()
    inner[["x", "y"]] -= inner.groupby(NETWORK)[["x", "y"]].transform("mean")
    return _over_kinds(logs, "", confidence) | _over_kinds(inner, "_within", confidence)


def layer_ranks(grids: Mapping[str, Sequence[tuple[RunResult, pd.DataFrame]]]) -> pd.DataFrame:
    """How each classifier's layers rank by value range and by damage: one row per classifier, as in `classifiers`.

    grids: per grid, the runs with their value ranges (`layer`, `max_abs`). delta_loss, sdc: Spearman's rank correlation, over
    the classifier's layers, of the largest absolute value without faults with what faults in the layer do; NaN where either is
    the same in all layers.
    """
    rows, seen = [], set()
    for grid, runs in grids.items():
        for result, ranges in runs:
            if result.weights in seen:
                continue
            seen.add(result.weights)
            largest = dict(zip(ranges["layer"], ranges["max_abs"], strict=True))
            reach = np.array([largest[layer.layer] for layer in result.layers])
            row = {"grid": grid, "dataset": result.dataset, "backbone": result.backbone, "variant": result.variant}
            for measure in ("delta_loss", "sdc"):
                damage = np.array([getattr(layer, measure).value for layer in result.layers])
                row[measure] = rank_correlation(reach, damage).value
            rows.append(row)
    return pd.DataFrame(rows)


def mean_over_kinds(found: pd.DataFrame, column: str, confidence: float = CONFIDENCE) -> Estimate:
    """The mean of a column over classifiers, with an interval from a bootstrap that draws kinds of classifiers whole.

    found: as `layer_ranks` gives it; what is not finite is left out. n counts classifiers. Two kinds or fewer tell no error.
    """
    usable = found[np.isfinite(found[column])]
    sums = usable.assign(n=1.0).groupby(KIND)[["n", column]].sum().to_numpy()
    low = high = np.nan
    if len(sums) > 2:
        counts = _resampled(len(sums)) @ sums
        tail = (1 - confidence) / 2
        low, high = np.quantile(counts[:, 1] / counts[:, 0], [tail, 1 - tail])
    return Estimate(float(usable[column].mean()), float(low), float(high), len(usable))


def _resampled(kinds: int) -> np.ndarray:
    """How often each kind counts, in each resample: [RESAMPLES, kinds]."""
    return np.random.default_rng(SEED).multinomial(kinds, np.full(kinds, 1 / kinds), size=RESAMPLES)


def _over_kinds(logs: pd.DataFrame, suffix: str, confidence: float) -> dict[str, Estimate]:
    """Correlation and slope, from sums over each kind: a resample is how often each of them counts."""
    parts = logs[KIND].assign(n=1.0, x=logs.x, y=logs.y, xx=logs.x**2, xy=logs.x * logs.y, yy=logs.y**2)
    sums = parts.groupby(KIND)[["n", "x", "y", "xx", "xy", "yy"]].sum().to_numpy()
    values = _correlation_and_slope(sums.sum(axis=0))
    ends = np.full((2, 2), np.nan)
    if len(sums) > 2:
        tail = (1 - confidence) / 2
        drawn = _correlation_and_slope(_resampled(len(sums)) @ sums)
        known = np.isfinite(drawn).any(axis=0)  # NaN where no resample varies
        ends[:, known] = np.nanquantile(drawn[:, known], [tail, 1 - tail], axis=0)
    found = zip(("correlation", "slope"), values, *ends, strict=True)
    return {name + suffix: Estimate(float(value), float(low), float(high), len(logs)) for name, value, low, high in found}


def _correlation_and_slope(sums: np.ndarray) -> np.ndarray:
    """Of sums [..., 6] of 1, x, y, x x, x y and y y over classifiers: [..., 2]; NaN where x, or y, does not vary."""
    n, x, y, xx, xy, yy = np.moveaxis(sums, -1, 0)
    spread_x, spread_y, common = xx / n - (x / n) ** 2, yy / n - (y / n) ** 2, xy / n - x * y / n**2
    # What is left of equal numbers by rounding is no spread.
    spread_x, spread_y = (
        np.where(spread > 1e-12 * square / n, spread, np.nan) for spread, square in ((spread_x, xx), (spread_y, yy))
    )
    return np.stack([common / np.sqrt(spread_x * spread_y), common / spread_x], axis=-1)
