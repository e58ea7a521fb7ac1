"""Which channels of a layer are more or less fragile than chance explains."""

import numpy as np
import pandas as pd

from textguard.estimates.statistics import CONFIDENCE

RANDOM_MAPS = 2000  # behind the limits
ROUNDING = 1e-9  # of a sum, as a share of it


def chance_limits(injections: pd.DataFrame, channels: int, confidence: float = CONFIDENCE) -> dict[str, tuple[float, float]]:
    """Between which values the estimates of all of a layer's channels lie, if it did not matter which of them is hit.

    The interval of a channel is no test of that. It leaves the layer's mean out as soon as one injection is corrupted where few
    are, of DeltaLoss as long as none met a high bit, and one of many channels is always beyond it. So the injections are given
    to channels at random, again and again.

    Parameters
    ----------
    injections : DataFrame
        Those into one layer, one row each, with the columns that `summarise_channels` takes.
    channels : int
        How many the layer has.
    confidence : float
        In how many of such layers, if their channels are alike, all of them lie between the limits.

    Returns
    -------
    dict
        `delta_loss` (nats) and `sdc` (share) -> the lower and the upper limit.

    Examples
    --------
    >>> import pandas as pd
    >>> from textguard.estimates.chance import chance_limits
    >>> injections = pd.DataFrame({
    ...     "weight": 1.0, "golden_loss": 0.5, "faulty_loss": [0.5, 2.5] * 20, "mismatch": [False, True] * 20,
    ... })
    >>> low, high = chance_limits(injections, channels=2)["sdc"]
    >>> low < 0.5 < high < 1
    True
    """
    loss = np.abs(injections["faulty_loss"].to_numpy(float) - injections["golden_loss"].to_numpy(float))
    finite = np.isfinite(loss)
    bad = injections["mismatch"].to_numpy(bool) | ~finite
    scale = injections["weight"].to_numpy(float) * channels / len(injections)
    draw, parts = np.random.default_rng(0), (scale * np.where(finite, loss, 0.0), scale * bad)
    least, most = np.empty((2, RANDOM_MAPS)), np.empty((2, RANDOM_MAPS))
    for number in range(RANDOM_MAPS):
        channel = draw.integers(channels, size=len(injections))
        for measure, values in enumerate(parts):
            found = np.bincount(channel, values, channels)
            least[measure, number], most[measure, number] = found.min(), found.max()
    beyond = int(RANDOM_MAPS * (1 - confidence) / 2)
    lows = np.sort(least)[:, beyond] * (1 - ROUNDING)
    highs = np.sort(most)[:, -1 - beyond] * (1 + ROUNDING)
    return dict(zip(("delta_loss", "sdc"), zip(lows.tolist(), highs.tolist(), strict=True), strict=True))
