"""Which channels of a layer are fragile: the estimates of a campaign, by feature map."""

from collections.abc import Mapping

import numpy as np
import pandas as pd

from textguard.estimates.statistics import CONFIDENCE, Estimate, Sample, mean_interval, rate_interval, sample_mean
from textguard.estimates.summary import UNSEEN

FEWEST = 8  # injections into a channel from which on it gets an interval


def summarise_channels(
    records: pd.DataFrame, shapes: Mapping[str, tuple[int, ...]], confidence: float = CONFIDENCE
) -> pd.DataFrame:
    """Estimate what faults do to each channel of the sampled layers.

    Parameters
    ----------
    records : DataFrame
        The records of a campaign by plan `uniform` or `guided`, one damaged neuron per injection.
    shapes : mapping of str to tuple of int
        Layer -> the shape of one image's output, as a Site has it. Of three dimensions, the first is the channel's, as in
        convolutions; of others the last one is, as in linear layers and tokens.
    confidence : float
        Of the intervals.

    Returns
    -------
    DataFrame
        One row per layer and channel, in order: layer, channel, injections; delta_loss (nats) and sdc (share), each with its
        interval in _low and _high. Limits are NaN where fewer than 8 injections hit the channel. Injections with a loss that is
        not finite are left out of delta_loss.

    Examples
    --------
    >>> import pandas as pd
    >>> from textguard.faults import summarise_channels
    >>> records = pd.DataFrame({
    ...     "layer": "conv", "index": range(40), "neuron": [0, 5] * 20, "weight": 1.0, "golden_loss": 0.5,
    ...     "faulty_loss": [0.5, 2.5] * 20, "mismatch": [False, True] * 20,
    ... })
    >>> found = summarise_channels(records, {"conv": (2, 2, 2)})
    >>> found[["channel", "injections", "delta_loss", "sdc"]].values.tolist()
    [[0.0, 20.0, 0.0, 0.0], [1.0, 20.0, 2.0, 1.0]]
    """
    rows = []
    injections = records.drop_duplicates(["layer", "index"])
    for layer, found in injections.groupby("layer", sort=False):
        shape = shapes[layer]
        place = np.unravel_index(found["neuron"].to_numpy(), shape)
        axis = 0 if len(shape) == 3 else -1
        channel, count = place[axis], shape[axis]
        loss = np.abs(found["faulty_loss"].to_numpy(float) - found["golden_loss"].to_numpy(float))
        weight, finite = found["weight"].to_numpy(float), np.isfinite(loss)
        harm = np.where(finite, loss, 0.0)
        bad = (found["mismatch"].to_numpy(bool) | ~finite).astype(float)
        for number in range(count):
            here = channel == number
            hits = int(here.sum())
            # The channel has one of `count` equal shares of all faults, whatever share of the injections it got.
            scale = count * weight * here
            limits = [
                _limited(mean_interval(_sample(scale * harm, UNSEEN), confidence), hits),
                _limited(rate_interval(_sample(scale * bad, 0.0, float(scale.max())), confidence), hits),
            ]
            values = [number for one in limits for number in (one.value, one.low, one.high)]
            rows.append((layer, number, hits, *values))
    names = [f"{name}{end}" for name in ("delta_loss", "sdc") for end in ("", "_low", "_high")]
    return pd.DataFrame(rows, columns=["layer", "channel", "injections", *names])


def _sample(values: np.ndarray, factor: float, worst: float = 0.0) -> Sample:
    return sample_mean([values], [1.0], [factor * float(values.max()) + worst])


def _limited(found: Estimate, injections: int) -> Estimate:
    """The estimate, without limits where too few injections are behind it."""
    if injections >= FEWEST:
        return found
    return Estimate(found.value if injections else np.nan, np.nan, np.nan, injections)
