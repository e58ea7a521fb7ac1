"""From the records of a campaign to what is estimated of each layer."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd

from textguard.errors import InvalidParameter, Setting
from textguard.estimates.statistics import CONFIDENCE, Sample, average, exact, mean_interval, rate_interval, sample_mean

GOLDENEYE = "goldeneye"  # the policy that leaves injections with a NaN or infinite loss out of DeltaLoss
UNSEEN = 2.0  # see LayerResult.unseen
# Guided plans draw the worst faults first, and the weights of the others have a limit.
UNSEEN_GUIDED = 1.0
# A DeltaLoss up to here may be rounding, in nats. A cross entropy is a difference of numbers as large as its logits. float32
# holds those of 32 to 64 in steps of 2^-18, and an inference that adds in another order is mostly off by up to four such steps.
ROUNDING = 4 * 2**-18
# Injections with a DeltaLoss above ROUNDING from which on a sample tells what the worst may be: see LayerResult.most.
FEWEST_SEEN = 5


@dataclass(frozen=True)
class LayerResult:
    """What one layer's campaign found.

    `str` of it is one line for a person.

    Attributes
    ----------
    layer : str
        The layer.
    neurons : int
        The number of values in its output for one image.
    method : str
        `sampled`, or `exact` where every fault on every eligible image was tried.
    injections : int
        The number of injections.
    masked : int
        Those that left no trace.
    detected : int
        Those whose damaged values the range detector replaced.
    nonfinite : int
        Those with a NaN or infinite loss.
    delta_loss : Sample
        Mean DeltaLoss, in nats.
    mismatch : Sample
        Share of injections that change the class, among those with a finite loss, as in the paper.
    sdc : Sample
        Share of silent data corruptions: injections that change the class or make the loss NaN or infinite.
    broken : Sample
        Share of injections that make the loss NaN or infinite.
    shares : ndarray
        Of a sampled layer: each stratum's share in the estimates, float [strata].
    strata : dict of str to list of ndarray
        Of a sampled layer: `delta_loss`, `mismatch`, `sdc` and `broken` -> each stratum's weighted values, float [n], by the
        injections' index. Empty where the layer is exact.
    unseen : float
        How many times the worst that an injection did, its weight counted, one that was not seen may do.
    most : float
        How much DeltaLoss, its weight counted, one that was not seen may do at least. Where fewer than 5 of the layer's
        injections did anything above rounding, theirs tells nothing: it is the worst of the whole campaign then. Elsewhere it
        is 0.
    shared : bool
        Whether injections of the same index hit the same image in all of the campaign's sampled layers.
    """

    layer: str
    neurons: int
    method: str
    injections: int
    masked: int
    detected: int
    nonfinite: int
    delta_loss: Sample
    mismatch: Sample
    sdc: Sample
    broken: Sample
    shares: np.ndarray = field(default_factory=lambda: np.zeros(0))
    strata: dict[str, list[np.ndarray]] = field(default_factory=dict)
    unseen: float = UNSEEN
    most: float = 0.0
    shared: bool = False

    def worst(self, stratum: np.ndarray) -> float:
        """The DeltaLoss that an unseen injection may do, its weight counted. stratum: those of the seen ones, float [n]."""
        return max(self.unseen * float(stratum.max()), self.most)

    def __str__(self) -> str:
        shares = f"{self.masked / self.injections:.0%} of them masked, {self.detected / self.injections:.0%} detected"
        loss, sdc = mean_interval(self.delta_loss, CONFIDENCE), rate_interval(self.sdc, CONFIDENCE)
        faults = "faults, all there are" if self.method == "exact" else "injections"
        interval = "" if self.method == "exact" else f" [{loss.low:.3g}, {loss.high:.3g}]"
        return f"{self.layer}: {self.injections} {faults}, {shares}, DeltaLoss {loss.value:.3g}{interval}, SDC {sdc.value:.2%}"


@dataclass(frozen=True)
class Totals:
    """What all single-bit faults of one layer did on all eligible images, by bit.

    Attributes
    ----------
    layer : str
        The layer.
    neurons : int
        The number of values in its output for one image.
    faults, masked, detected : ndarray
        The number of faults, of those that left no trace, and of those that the range detector saw, [bits].
    mismatches : ndarray
        The number of faults that change the class and leave the loss finite, [bits].
    nonfinite : ndarray
        The number of faults with a NaN or infinite loss, [bits].
    delta_loss : ndarray
        The sum of DeltaLoss over the faults with a finite loss, in nats, float [bits].
    """

    layer: str
    neurons: int
    faults: np.ndarray
    masked: np.ndarray
    detected: np.ndarray
    mismatches: np.ndarray
    nonfinite: np.ndarray
    delta_loss: np.ndarray

    def as_json(self) -> dict[str, Any]:
        """The totals as metrics files hold them: the attributes, with lists for arrays."""
        return {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in vars(self).items()}

    @classmethod
    def from_json(cls, stored: dict[str, Any]) -> "Totals":
        """Read what `as_json` returned.

        Raises
        ------
        KeyError, TypeError, ValueError
            `stored` is anything else.
        """
        arrays = ("faults", "masked", "detected", "mismatches", "nonfinite", "delta_loss")
        return cls(stored["layer"], int(stored["neurons"]), *(np.asarray(stored[name], dtype=float) for name in arrays))


def summarise(
    records: pd.DataFrame,
    neurons: dict[str, int],
    bits: int = 0,
    nonfinite: str = GOLDENEYE,
    guided: bool = False,
    shared: bool = False,
) -> dict[str, LayerResult]:
    """Estimate what faults do to each sampled layer.

    Parameters
    ----------
    records : DataFrame
        The records of a campaign, as `run_campaign` returns them.
    neurons : dict of str to int
        Layer -> the number of values in its output for one image.
    bits : int
        Bits per stored value where the plan was drawn by bit, else 0. Every bit is then a stratum of its own.
    nonfinite : str
        What an injection with a NaN or infinite loss counts for in DeltaLoss: `goldeneye` leaves it out, `cap:X` makes it X
        nats.
    guided : bool
        Whether the plan was `guided`.
    shared : bool
        Whether the layers shared their images.

    Returns
    -------
    dict of str to LayerResult
        Layer -> its estimates, for the layers of `neurons` that have records, in their order.

    Raises
    ------
    InvalidParameter
        `nonfinite` is none of these.

    Examples
    --------
    >>> import pandas as pd
    >>> from textguard.faults import summarise
    >>> records = pd.DataFrame({
    ...     "layer": "fc", "index": range(4), "bit": [3, 30, 7, 31], "weight": 1.0,
    ...     "golden_loss": 0.5, "faulty_loss": [0.5, 2.5, 0.5, 1.5],
    ...     "detected": [False, True, False, False], "masked": [True, False, False, False],
    ...     "mismatch": [False, True, False, False],
    ... })
    >>> result = summarise(records, {"fc": 10})["fc"]
    >>> result.injections, result.delta_loss.value, result.sdc.value
    (4, 0.75, 0.25)
    """
    # An injection has one row per damaged bit. Its rows differ in what happened to each value: one detected value is enough.
    injections = records.drop_duplicates(["layer", "index"])
    if len(injections) < len(records):
        detected = records.groupby(["layer", "index"])["detected"].any()
        injections = injections.assign(
            detected=detected.loc[pd.MultiIndex.from_frame(injections[["layer", "index"]])].to_numpy()
        )
    by_layer = dict(list(injections.groupby("layer", sort=False)))
    cap = cap_of(nonfinite)
    worst = max((_delta_loss(part, cap)[0].max() for part in by_layer.values()), default=0.0)
    return {
        layer: _summarise_layer(by_layer[layer].sort_values("index"), layer, count, bits, cap, guided, shared, worst)
        for layer, count in neurons.items()
        if layer in by_layer
    }


def mean_over_layers(layers: Sequence[LayerResult], measure: str, weights: Sequence[float] | None = None) -> Sample:
    """The mean of a measure over the layers of one campaign.

    Layers that share their images err together, because an image that the model is unsure of raises the DeltaLoss of all.
    Injections of the same index then count as one observation.

    Parameters
    ----------
    layers : sequence of LayerResult
        The layers, at least one.
    measure : {"delta_loss", "mismatch", "sdc", "broken"}
        What is averaged.
    weights : sequence of float, optional
        What each layer counts for; their sum need not be 1. By default all count the same.

    Returns
    -------
    Sample
        The mean.

    Examples
    --------
    >>> import pandas as pd
    >>> rows = {"index": [0, 1] * 2, "weight": 1.0, "golden_loss": 0.5, "faulty_loss": [0.5, 2.5, 1.5, 3.5]}
    >>> rows |= {"bit": 30, "detected": False, "masked": False, "mismatch": False}
    >>> records = pd.DataFrame({"layer": ["conv", "conv", "fc", "fc"], **rows})
    >>> apart, shared = (summarise(records, {"conv": 8, "fc": 2}, shared=shared) for shared in (False, True))
    >>> [mean_over_layers(list(found.values()), "delta_loss").variance for found in (apart, shared)]
    [0.5, 1.0]
    """
    weights = [1.0] * len(layers) if weights is None else weights
    apart = average([getattr(layer, measure) for layer in layers], weights)
    together = [
        (weight / sum(weights), layer) for weight, layer in zip(weights, layers, strict=True) if layer.shared and layer.strata
    ]
    if not together:
        return apart
    shares = together[0][1].shares
    joint = []
    for number in range(len(shares)):
        size = max(len(layer.strata[measure][number]) for _, layer in together)
        total = np.zeros(size)
        for weight, layer in together:
            values = layer.strata[measure][number]
            total += weight * values.mean()
            total[: len(values)] += weight * size / len(values) * (values - values.mean())
        joint.append(total)
    moments = sample_mean(joint, shares, np.zeros(len(shares)))
    return replace(apart, variance=moments.variance, third=moments.third)


def summarise_totals(totals: Totals, nonfinite: str = GOLDENEYE) -> LayerResult:
    """Say what faults do to a layer all of whose faults are known.

    Parameters
    ----------
    totals : Totals
        What they did, as `enumerate_layer` returns it.
    nonfinite : str
        As for `summarise`.

    Returns
    -------
    LayerResult
        Exact numbers: their variance is 0.

    Raises
    ------
    InvalidParameter
        `nonfinite` is none of the policies.

    Examples
    --------
    >>> counts = (np.array(part) for part in ([4, 4], [1, 0], [0, 2], [1, 2], [0, 0], [5.0, 7.0]))
    >>> print(summarise_totals(Totals("fc", 2, *counts)))
    fc: 8 faults, all there are, 12% of them masked, 25% detected, DeltaLoss 1.5, SDC 37.50%
    """
    count, broken, mismatches = (int(part.sum()) for part in (totals.faults, totals.nonfinite, totals.mismatches))
    cap, finite = cap_of(nonfinite), count - broken
    known, loss = (finite, totals.delta_loss.sum()) if cap is None else (count, totals.delta_loss.sum() + cap * broken)
    return LayerResult(
        totals.layer,
        totals.neurons,
        "exact",
        count,
        int(totals.masked.sum()),
        int(totals.detected.sum()),
        broken,
        delta_loss=exact(float(loss) / known if known else np.nan, known),
        mismatch=exact(mismatches / finite if finite else np.nan, finite),
        sdc=exact((mismatches + broken) / count, count),
        broken=exact(broken / count, count),
    )


def goldeneye_means(records: pd.DataFrame) -> pd.DataFrame:
    """The two numbers of each sampled layer as GoldenEye defines them, from the same records (docs/definitions.md).

    Two definitions differ from ours. DeltaLoss leaves out NaN losses alone, and an infinite loss makes the mean infinite. The
    mismatch rate is a share of all injections, whatever their loss.

    Parameters
    ----------
    records : DataFrame
        The records of a campaign, as for `summarise`.

    Returns
    -------
    DataFrame
        One row per layer, in the records' order: layer; injections; left_out, those with a NaN loss; delta_loss (nats), NaN
        where all are left out; mismatch (share).

    Examples
    --------
    >>> records = pd.DataFrame({
    ...     "layer": "fc", "index": range(4), "bit": 30, "weight": 1.0, "golden_loss": 0.5,
    ...     "faulty_loss": [0.5, 2.0, np.nan, 2.0], "detected": False, "masked": False, "mismatch": [False, False, True, True],
    ... })
    >>> goldeneye_means(records).values.tolist()
    [['fc', 4, 1, 1.0, 0.5]]
    >>> ours = summarise(records, {"fc": 10})["fc"]
    >>> round(ours.delta_loss.value, 3), round(ours.mismatch.value, 3)
    (1.0, 0.333)
    """
    rows = []
    for layer, found in records.drop_duplicates(["layer", "index"]).groupby("layer", sort=False):
        loss = (found["faulty_loss"].to_numpy(float) - found["golden_loss"].to_numpy(float)).__abs__()
        weight, known = found["weight"].to_numpy(float), ~np.isnan(loss)
        mean = np.average(loss[known], weights=weight[known]) if known.any() else np.nan
        mismatch = np.average(found["mismatch"].to_numpy(float), weights=weight)
        rows.append((layer, len(found), int((~known).sum()), float(mean), float(mismatch)))
    return pd.DataFrame(rows, columns=["layer", "injections", "left_out", "delta_loss", "mismatch"])


def replace_records(records: pd.DataFrame, changed: pd.DataFrame) -> pd.DataFrame:
    """`records`, with the injections of `changed` (by layer and index) in the place of their own."""
    return pd.concat([without(records, changed), changed], ignore_index=True)


def without(rows: pd.DataFrame, others: pd.DataFrame) -> pd.DataFrame:
    """The rows of a plan or of records whose injections (by layer and index) are not among `others`."""
    names = ["layer", "index"]
    known = pd.MultiIndex.from_frame(others[names])
    return rows[~pd.MultiIndex.from_frame(rows[names]).isin(known)].reset_index(drop=True)


def cap_of(nonfinite: str) -> float | None:
    """What a NaN or infinite loss counts for in DeltaLoss, in nats, or None where it is left out.

    Raises
    ------
    InvalidParameter
        `nonfinite` is neither `goldeneye` nor `cap:X` with X above 0.

    Examples
    --------
    >>> cap_of("cap:20")
    20.0
    """
    if nonfinite == GOLDENEYE:
        return None
    name, _, number = nonfinite.partition(":")
    try:
        cap = float(number) if name == "cap" else -1.0
    except ValueError:
        cap = -1.0
    if not 0 < cap < np.inf:
        raise InvalidParameter(Setting("nonfinite"), f" is {nonfinite!r}; allowed: {GOLDENEYE}, or cap:X with X nats above 0")
    return cap


def _delta_loss(records: pd.DataFrame, cap: float | None) -> tuple[np.ndarray, np.ndarray]:
    """What each injection counts in DeltaLoss, 0 where that is left out; and whether its loss is finite."""
    loss = (records["faulty_loss"].to_numpy(float) - records["golden_loss"].to_numpy(float)).__abs__()
    finite = np.isfinite(loss)
    return np.where(finite, loss, 0.0 if cap is None else cap), finite


def _summarise_layer(
    records: pd.DataFrame, layer: str, neurons: int, bits: int, cap: float | None, guided: bool, shared: bool, worst: float
) -> LayerResult:
    """The estimates of one layer from its records, one row per injection, in order of their index.

    worst: the largest DeltaLoss of the campaign.
    """
    (loss, finite), weight = _delta_loss(records, cap), records["weight"].to_numpy(float)
    mismatch, everywhere = records["mismatch"].to_numpy(bool), np.ones(len(records), dtype=bool)
    groups = [np.flatnonzero(records["bit"].to_numpy() == bit) for bit in range(bits)] if bits else [np.arange(len(records))]
    shares = np.full(len(groups), 1 / len(groups))
    # Of each measure: what an injection counts, and whether it does.
    counts = {
        "delta_loss": (loss, finite if cap is None else everywhere),
        "mismatch": (mismatch, finite),
        "sdc": (mismatch | ~finite, everywhere),
        "broken": (~finite, everywhere),
    }
    strata = {
        name: _split(np.where(known, values, 0.0), known, weight, groups, shares) for name, (values, known) in counts.items()
    }
    unseen = UNSEEN_GUIDED if guided else UNSEEN

    # Whatever changes the class, or leaves nothing finite, changes the loss. The others are the heavy ones of a guided plan.
    did = ~finite | (loss > ROUNDING)
    typical = [weight[did]] if guided and did.any() else [weight[group] for group in groups]

    def rate(name: str) -> Sample:
        sample = rate_sample(strata[name], shares, typical, guided)
        return replace(sample, n=int(counts[name][1].sum()))

    # The unseen one is as heavy as a fault is on average (Kish's design effect).
    most = worst * float((weight**2).sum() / weight.sum()) if (loss > ROUNDING).sum() < FEWEST_SEEN else 0.0
    delta_loss = sample_mean(
        strata["delta_loss"], shares, [max(unseen * stratum.max(), most) for stratum in strata["delta_loss"]]
    )
    if worst <= ROUNDING:  # Nothing has happened in any layer, so nothing tells what could.
        delta_loss = replace(delta_loss, unseen=(0.0, np.nan, np.nan))
    return LayerResult(
        layer,
        neurons,
        "sampled",
        len(records),
        int(records["masked"].sum()),
        int(records["detected"].sum()),
        int((~finite).sum()),
        delta_loss=replace(delta_loss, n=int(counts["delta_loss"][1].sum())),
        mismatch=rate("mismatch"),
        sdc=rate("sdc"),
        broken=rate("broken"),
        shares=shares,
        strata=strata,
        unseen=unseen,
        most=most,
        shared=shared,
    )


def rate_sample(
    strata: Sequence[np.ndarray], shares: Sequence[float], weights: Sequence[np.ndarray], guided: bool = False
) -> Sample:
    """Estimate a proportion from weighted hits.

    Parameters
    ----------
    strata : sequence of ndarray
        For each stratum, the weight of each injection that hit, and 0 for the others, float [n].
    shares : sequence of float
        The share of each stratum in the population.
    weights : sequence of ndarray
        For each stratum, the weights of all injections, float [n]; of a guided plan, of those that did anything.
    guided : bool
        Whether the plan was `guided`, which has one stratum.

    Returns
    -------
    Sample
        For `rate_interval`. Its `unseen` is one more hit, or one more miss where hits are the more frequent outcome.

    Examples
    --------
    >>> rate_sample([np.array([0.0, 0.0, 1.0, 0.0])], [1.0], [np.ones(4)]).value
    0.25
    """
    share = sum(part * stratum.mean() for part, stratum in zip(shares, strata, strict=True))
    another = [weight.max() if share <= 0.5 else 0.0 for weight in weights]
    if guided and share <= 0.5:
        # As heavy as the heaviest hit was; of few hits, no lighter than a fault is on average (Kish's design effect).
        (hits,), (weight,) = strata, weights
        few = np.count_nonzero(hits) < FEWEST_SEEN
        another = [max(hits.max(), (weight**2).sum() / weight.sum() if few else 0.0)]
    return replace(sample_mean(strata, shares, another), guided=guided)


def _split(
    values: np.ndarray, counted: np.ndarray, weight: np.ndarray, groups: Sequence[np.ndarray], shares: np.ndarray
) -> list[np.ndarray]:
    """Each stratum's weighted values, such that the mean over strata is that of the counted values.

    Where some values do not count, the mean is a quotient whose numerator and denominator are both random. The values are then
    linearised about it. Source: Cochran, Sampling Techniques, 1977, chapter 6.
    """
    if counted.all():
        return [(weight * values)[group] for group in groups]
    parts = [
        (share * (weight * counted)[group].mean(), share * (weight * values)[group].mean())
        for share, group in zip(shares, groups, strict=True)
    ]
    known, total = np.sum(parts, axis=0)
    mean = total / known if known else np.nan
    return [(mean + weight * counted * (values - mean) / (known or np.nan))[group] for group in groups]
