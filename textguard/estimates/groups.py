"""What faults do to parts of a campaign: to the injections that share a bit, a class or an image."""

import numpy as np
import pandas as pd

from textguard.estimates.channels import FEWEST
from textguard.estimates.statistics import CONFIDENCE, Sample, mean_interval, rate_interval, sample_mean
from textguard.estimates.summary import FEWEST_SEEN, ROUNDING, UNSEEN

ESTIMATES = [f"{name}{end}" for name in ("delta_loss", "sdc") for end in ("", "_low", "_high")]


def balanced(injections: pd.DataFrame, bits: int = 0, layers: bool = True) -> pd.DataFrame:
    """Injections with weights that let each bit of a layer count the same, where its plan was by bit, and each layer.

    injections: one row each. bits: by how many the plan was drawn, 0 where they were drawn at random. layers: whether layers
    are made equal. Without this, a layer or a bit that got more injections would count for more.
    """
    sizes = injections.groupby("layer")["index"].transform("size")
    weight = injections["weight"].astype(float)
    if bits:
        weight = weight * (sizes / bits / injections.groupby(["layer", "bit"])["index"].transform("size"))
    if layers:
        weight = weight * (len(injections) / injections["layer"].nunique() / sizes)
    return injections.assign(weight=weight)


def summarise_groups(
    injections: pd.DataFrame,
    group: np.ndarray,
    count: int,
    shares: np.ndarray | None = None,
    shared: bool = False,
    confidence: float = CONFIDENCE,
) -> pd.DataFrame:
    """Estimate what faults do in each group of injections.

    Parameters
    ----------
    injections : DataFrame
        One row per injection, with `balanced` weights.
    group : ndarray
        The group of each injection, int [n], from 0.
    count : int
        How many groups there are.
    shares : ndarray, optional
        Each group's share of all faults, float [count]. To be given where faults were drawn by what they were predicted to do:
        the injections that hit a group then do not tell its share.
    shared : bool
        Whether injections of the same index hit the same image, so that they count as one observation.
    confidence : float
        Of the intervals.

    Returns
    -------
    DataFrame
        One row per group: injections; delta_loss (nats, over finite losses) and sdc (share), each with its interval in _low and
        _high. Limits are NaN where fewer than 8 injections hit the group.

    Examples
    --------
    >>> records = pd.DataFrame({
    ...     "layer": "fc", "index": range(40), "weight": 1.0, "golden_loss": 0.5, "faulty_loss": [0.5, 2.5] * 20,
    ...     "mismatch": [False, True] * 20,
    ... })
    >>> found = summarise_groups(records, np.array([0, 1] * 20), 2)
    >>> found[["injections", "delta_loss", "sdc"]].values.tolist()
    [[20.0, 0.0, 0.0], [20.0, 2.0, 1.0]]
    """
    loss = np.abs(injections["faulty_loss"].to_numpy(float) - injections["golden_loss"].to_numpy(float))
    finite, weight = np.isfinite(loss), injections["weight"].to_numpy(float)
    harm, everywhere = np.where(finite, loss, 0.0), np.ones(len(loss), dtype=bool)
    bad = injections["mismatch"].to_numpy(bool) | ~finite
    index = injections["index"].to_numpy() if shared else np.arange(len(loss))
    worst, order = float(harm.max(initial=0.0)), np.argsort(group, kind="stable")
    ends = np.searchsorted(group[order], np.arange(count + 1))
    rows = []
    for number in range(count):
        here = order[ends[number] : ends[number + 1]]
        if not len(here):
            rows.append((0, *[np.nan] * len(ESTIMATES)))
            continue
        if shares is None:
            samples = [
                _within(values[here], known[here], weight[here], index[here])
                for values, known in ((harm, finite), (bad, everywhere))
            ]
        else:
            scale = np.zeros(len(loss))
            scale[here] = weight[here] / shares[number]
            samples = [(scale * values, float(scale.max())) for values in (harm, bad)]
        (losses, heaviest), (hits, another) = samples
        seen = int((harm[here] > ROUNDING).sum())
        most = max(UNSEEN * float(losses.max(initial=0.0)), worst * heaviest if seen < FEWEST_SEEN else 0.0)
        rate = float(hits.mean())
        found = [
            mean_interval(_sample(losses, most), confidence),
            rate_interval(_sample(hits, another if rate <= 0.5 else 0.0), confidence),
        ]
        known = len(here) >= FEWEST
        numbers = [(one.value, *((one.low, one.high) if known else (np.nan, np.nan))) for one in found]
        rows.append((len(here), *numbers[0], *numbers[1]))
    return pd.DataFrame(rows, columns=["injections", *ESTIMATES])


def _within(values: np.ndarray, known: np.ndarray, weight: np.ndarray, index: np.ndarray) -> tuple[np.ndarray, float]:
    """Observations whose mean is that of a group's known values, and what the weight of one more may be.

    The mean is a quotient of sums that are both random, and is linearised: Cochran, Sampling Techniques, 1977, chapter 6.
    """
    total = (weight * known).sum()
    if not total:
        return np.full(1, np.nan), 0.0
    mean = float((weight * known * values).sum() / total)
    each = weight * known * (values - mean) / total
    _, cluster = np.unique(index, return_inverse=True)
    size = int(cluster.max()) + 1
    return mean + size * np.bincount(cluster, each, minlength=size), float(weight.max() * len(weight) / total)


def _sample(values: np.ndarray, another: float) -> Sample:
    return sample_mean([values], [1.0], [another])
