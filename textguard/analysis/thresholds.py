"""Accuracy where only predictions with enough Top2Diff count as right: a variant beside its baseline, training by training."""

import math

import numpy as np

from textguard.estimates.statistics import Estimate, over_trainings

POINTS, PERCENT = (-100.0, 100.0), (0.0, 100.0)


def differences(baseline: np.ndarray, own: np.ndarray, confidence: float) -> list[Estimate]:
    """Accuracy more than the baseline's at each threshold, in points, over trainings.

    baseline, own: percent, float [S, T], of S trainings with the same seeds. One training has no interval.
    """
    found = []
    for points in (own - baseline).T:
        singles = [Estimate(float(point), float(point), float(point), 1) for point in points]
        mean = over_trainings(singles, POINTS, confidence)
        found.append(mean if len(singles) > 1 else Estimate(mean.value, math.nan, math.nan, 1))
    return found


def crossing(thresholds: np.ndarray, baseline: np.ndarray, own: np.ndarray, confidence: float) -> tuple[int, Estimate]:
    """In how many trainings curves cross, and the threshold of the last time, over trainings: see `differences`.

    The threshold is known where all trainings cross; its interval, where there are several.
    """
    found = [crossings(thresholds, *pair) for pair in zip(baseline, own, strict=True)]
    last = [float(one[0][0]) for one in found if one]
    if len(last) < len(found):
        return len(last), Estimate(math.nan, math.nan, math.nan, len(last))
    mean = over_trainings([Estimate(at, at, at, 1) for at in last], PERCENT, confidence)
    return len(last), mean if len(last) > 1 else Estimate(mean.value, math.nan, math.nan, 1)


def crossings(thresholds: np.ndarray, baseline: np.ndarray, guided: np.ndarray) -> list[tuple[float, float]]:
    """Where a guided curve crosses the baseline's for the last time, up or down: threshold and accuracy; at most one."""
    ahead = guided - baseline
    # Where both are level, who was ahead before still counts as ahead: to touch is not to cross.
    apart = np.flatnonzero(ahead)
    changes = np.flatnonzero(np.diff(np.sign(ahead[apart])))
    if not len(changes):
        return []
    last = apart[changes[-1]]
    share = ahead[last] / (ahead[last] - ahead[last + 1])
    at = thresholds[last] + share * (thresholds[last + 1] - thresholds[last])
    return [(float(at), float(guided[last] + share * (guided[last + 1] - guided[last])))]
