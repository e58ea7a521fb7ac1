"""How far two quantities of the same things go together."""

import math

import numpy as np
import pandas as pd

from textguard.estimates.statistics import CONFIDENCE, Estimate, quantile


def rank_correlation(first: np.ndarray, second: np.ndarray, confidence: float = CONFIDENCE) -> Estimate:
    """Spearman's rank correlation, with an interval over other things of their kind.

    Ties share their mean rank. The interval is symmetric in the correlation's inverse hyperbolic tangent, whose standard error
    is sqrt((1 + r^2 / 2) / (N - 3)). Source: Bonett and Wright, Psychometrika 65, 2000.

    Parameters
    ----------
    first, second : ndarray
        float [N], in the same order. Pairs that are not finite are left out.
    confidence : float
        How often such intervals shall hold, between 0 and 1.

    Returns
    -------
    Estimate
        From -1 to 1; NaN where all of one quantity are equal, or where there are fewer than two. Of fewer than four, the
        interval is all there is.

    Raises
    ------
    ValueError
        The arrays differ in shape.

    Examples
    --------
    >>> found = rank_correlation(np.arange(12.0), np.arange(12.0) ** 2 % 7)
    >>> [round(number, 2) for number in (found.low, found.value, found.high)], found.n
    ([-0.58, 0.2, 0.79], 12)
    """
    if first.shape != second.shape:
        raise ValueError(f"pairs must be as many: {first.shape} and {second.shape}")
    known = np.isfinite(first) & np.isfinite(second)
    ranks = [pd.Series(side[known]).rank().to_numpy() for side in (first, second)]
    count = int(known.sum())
    if count < 2 or any(np.ptp(side) == 0 for side in ranks):
        return Estimate(math.nan, math.nan, math.nan, count)
    value = round(float(np.clip(np.corrcoef(*ranks)[0, 1], -1, 1)), 12)  # perfect where ranks agree, without a rounding
    if count < 4:
        return Estimate(value, -1.0, 1.0, count)
    # Of perfect agreement the inverse has no end. That of the next possible correlation stands in for it.
    middle = math.atanh(max(-1 + (gap := 6 / (count * (count**2 - 1))), min(value, 1 - gap)))
    half = quantile(confidence) * math.sqrt((1 + value**2 / 2) / (count - 3))
    return Estimate(value, min(value, math.tanh(middle - half)), max(value, math.tanh(middle + half)), count)
