"""From the records of a campaign to what is estimated of each layer."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from textguard.errors import InvalidParameter, Setting
from textguard.estimates.statistics import CONFIDENCE, Sample, exact, mean_interval, rate_interval, sample_mean

GOLDENEYE = "goldeneye"  # the policy that leaves injections with a NaN or infinite loss out of DeltaLoss


@dataclass(frozen=True)
class LayerResult:
    """One layer's campaign.

    method: `sampled`, or `exact` where every fault on every eligible image was enumerated. injections, masked, detected,
    nonfinite: how many; masked ones left no trace, those with a non-finite loss are SDCs. delta_loss: their mean, nats.
    mismatch: share of changed classes among injections with a finite loss, as the paper has it. sdc: share of changed classes
    or non-finite losses among all. broken: share of non-finite losses.
    strata, sdc_strata: of a sampled layer, each stratum's weighted DeltaLoss and SDCs in order of the injections' index.
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
    strata: list[np.ndarray] = field(default_factory=list)
    sdc_strata: list[np.ndarray] = field(default_factory=list)

    def __str__(self) -> str:
        shares = f"{self.masked / self.injections:.0%} masked, {self.detected / self.injections:.0%} detected"
        loss, sdc = mean_interval(self.delta_loss, CONFIDENCE), rate_interval(self.sdc, CONFIDENCE)
        faults = "faults, all there are" if self.method == "exact" else "injections"
        interval = "" if self.method == "exact" else f" [{loss.low:.3g}, {loss.high:.3g}]"
        return f"{self.layer}: {self.injections} {faults}, {shares}, DeltaLoss {loss.value:.3g}{interval}, SDC {sdc.value:.2%}"


@dataclass(frozen=True)
class Totals:
    """What all single-bit faults of one layer did on all eligible images, by bit: each an array [bits].

    faults, masked, detected, mismatches (changed class, finite loss), nonfinite: numbers. delta_loss: sum over finite losses.
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
        """The totals as metrics files hold them."""
        return {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in vars(self).items()}

    @classmethod
    def from_json(cls, stored: dict[str, Any]) -> "Totals":
        """What `as_json` returned. Raises KeyError, TypeError, ValueError for anything else."""
        arrays = ("faults", "masked", "detected", "mismatches", "nonfinite", "delta_loss")
        return cls(stored["layer"], int(stored["neurons"]), *(np.asarray(stored[name], dtype=float) for name in arrays))


def summarise(
    records: pd.DataFrame, neurons: dict[str, int], bits: int = 0, nonfinite: str = GOLDENEYE
) -> dict[str, LayerResult]:
    """Layer -> its estimates, for each sampled layer in `neurons` (layer -> their number) that has records.

    bits: how many bits a value has, where the plan was drawn by bit; else 0. nonfinite: what an injection with a NaN or
    infinite loss counts for in DeltaLoss: `goldeneye` leaves it out, `cap:X` makes it X nats. Raises InvalidParameter.
    """
    # An injection's rows share all but what happened to each value: any of these may have been detected.
    injections = records.drop_duplicates(["layer", "index"])
    if len(injections) < len(records):
        detected = records.groupby(["layer", "index"])["detected"].any()
        injections = injections.assign(
            detected=detected.loc[pd.MultiIndex.from_frame(injections[["layer", "index"]])].to_numpy()
        )
    by_layer = dict(list(injections.groupby("layer", sort=False)))
    cap = cap_of(nonfinite)
    return {
        layer: _summarise_layer(by_layer[layer].sort_values("index"), layer, count, bits, cap)
        for layer, count in neurons.items()
        if layer in by_layer
    }


def summarise_totals(totals: Totals, nonfinite: str = GOLDENEYE) -> LayerResult:
    """The same for a layer all of whose faults are known. Raises InvalidParameter."""
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


def replace_records(records: pd.DataFrame, changed: pd.DataFrame) -> pd.DataFrame:
    """`records`, with the injections of `changed` (by layer and index) in the place of their own."""
    return pd.concat([without(records, changed), changed], ignore_index=True)


def without(rows: pd.DataFrame, others: pd.DataFrame) -> pd.DataFrame:
    """The rows of a plan or of records whose injections (by layer and index) are not among `others`."""
    names = ["layer", "index"]
    known = pd.MultiIndex.from_frame(others[names])
    return rows[~pd.MultiIndex.from_frame(rows[names]).isin(known)].reset_index(drop=True)


def cap_of(nonfinite: str) -> float | None:
    """What a non-finite loss counts for, None where it is left out. Raises InvalidParameter."""
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


def _summarise_layer(records: pd.DataFrame, layer: str, neurons: int, bits: int, cap: float | None) -> LayerResult:
    loss = (records["faulty_loss"].to_numpy(float) - records["golden_loss"].to_numpy(float)).__abs__()
    finite, weight = np.isfinite(loss), records["weight"].to_numpy(float)
    mismatch, everywhere = records["mismatch"].to_numpy(bool), np.ones(len(records), dtype=bool)
    groups = [np.flatnonzero(records["bit"].to_numpy() == bit) for bit in range(bits)] if bits else [np.arange(len(records))]
    shares = np.full(len(groups), 1 / len(groups))

    def stratify(values: np.ndarray, counted: np.ndarray) -> list[np.ndarray]:
        return _split(np.where(counted, values, 0.0), counted, weight, groups, shares)

    def rate(hits: np.ndarray, counted: np.ndarray) -> Sample:
        strata = stratify(hits.astype(float), counted)
        share = sum(part * stratum.mean() for part, stratum in zip(shares, strata, strict=True))
        another = [weight[group].max() if share <= 0.5 else 0.0 for group in groups]
        return _counting(sample_mean(strata, shares, another), int(counted.sum()))

    counted = finite if cap is None else everywhere
    strata = stratify(np.where(finite, loss, 0.0 if cap is None else cap), counted)
    delta_loss = sample_mean(strata, shares, [2 * stratum.max() for stratum in strata])
    return LayerResult(
        layer,
        neurons,
        "sampled",
        len(records),
        int(records["masked"].sum()),
        int(records["detected"].sum()),
        int((~finite).sum()),
        delta_loss=_counting(delta_loss, int(counted.sum())),
        mismatch=rate(mismatch, finite),
        sdc=rate(mismatch | ~finite, everywhere),
        broken=rate(~finite, everywhere),
        shares=shares,
        strata=strata,
        sdc_strata=stratify((mismatch | ~finite).astype(float), everywhere),
    )


def _split(
    values: np.ndarray, counted: np.ndarray, weight: np.ndarray, groups: Sequence[np.ndarray], shares: np.ndarray
) -> list[np.ndarray]:
    """Each stratum's weighted values, such that their mean over strata is that of what is counted.

    Where something is not, numerator and denominator are both random: the values are then linearised about their quotient.
    Source: Cochran, Sampling Techniques, 1977, chapter 6.
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


def _counting(sample: Sample, n: int) -> Sample:
    return Sample(sample.value, sample.variance, sample.third, n, sample.unseen)
