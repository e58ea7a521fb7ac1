"""What lies behind the means of a campaign: bits, outcomes, and how an estimate settles as injections come in."""

import math
from collections.abc import Mapping

import numpy as np
import pandas as pd

from textguard.estimates.statistics import mean_interval
from textguard.estimates.summary import Totals, cap_of, mean_over_layers, summarise
from textguard.schema.results import ByBit, Convergence, Outcomes

FIRST_POINT = 8  # injections per layer at which convergence is shown first; then twice as many, and so on


def sums_by_bit(records: pd.DataFrame, bits: int) -> pd.DataFrame:
    """Of one layer's injections, by the bit that was hit: n, and weighted sums.

    Returns one row per bit with n, weight, masked, mismatches (finite loss), nonfinite, delta_loss (over finite losses). An
    injection with several damaged bits counts at the first.
    """
    injections = records.drop_duplicates("index")
    weight = injections["weight"].to_numpy(float)
    loss = np.abs(injections["faulty_loss"].to_numpy(float) - injections["golden_loss"].to_numpy(float))
    finite = np.isfinite(loss)
    columns = {
        "n": np.ones(len(injections)),
        "weight": weight,
        "masked": weight * injections["masked"].to_numpy(bool),
        "mismatches": weight * (injections["mismatch"].to_numpy(bool) & finite),
        "nonfinite": weight * ~finite,
        "delta_loss": weight * np.where(finite, loss, 0.0),
    }
    bit = injections["bit"].to_numpy()
    return pd.DataFrame({name: np.bincount(bit, column, minlength=bits) for name, column in columns.items()})


def sums_of_totals(totals: Totals) -> pd.DataFrame:
    """The same of a layer all of whose faults are known."""
    known = {name: getattr(totals, name) for name in ("masked", "mismatches", "nonfinite", "delta_loss")}
    return pd.DataFrame({"n": totals.faults, "weight": totals.faults, **known})


def describe_layer(sums: pd.DataFrame, strata: int, guided: bool) -> tuple[Outcomes, ByBit]:
    """One layer's outcomes and bits, from sums by bit. strata: as in campaign.json, 0 where bits were drawn at random.

    guided: whether faults were drawn by what they were predicted to do. Every bit then has the same share of all weights,
    however few of its faults were drawn.
    """
    counts = sums[["masked", "mismatches", "nonfinite"]]
    if strata:  # each bit is one stratum, of the same share
        masked, sdc, nonfinite = counts.div(sums["weight"], axis=0).mean()
    else:
        masked, sdc, nonfinite = counts.sum() / sums["weight"].sum()
    if guided:
        total, harmless = float(sums["n"].sum()), 1 - sdc - nonfinite
        sdc, nonfinite = counts[["mismatches", "nonfinite"]].sum() / total
        masked *= (1 - sdc - nonfinite) / harmless if harmless > 0 else 0.0
        sums = sums.assign(weight=np.where(sums["n"] > 0, total / len(sums), np.nan))
    with np.errstate(invalid="ignore"):
        delta_loss = sums["delta_loss"] / (sums["weight"] - sums["nonfinite"])
        bad = ((sums["mismatches"] + sums["nonfinite"]) / sums["weight"]).clip(upper=1.0)
    shares = {"masked": masked, "benign": 1 - masked - sdc - nonfinite, "sdc": sdc, "nonfinite": nonfinite}
    return (
        Outcomes(**{name: round(max(0.0, float(share)), 6) for name, share in shares.items()}),
        ByBit(n=sums["n"].astype(int).tolist(), delta_loss=_short(delta_loss), sdc=_short(bad)),
    )


def convergence(
    records: pd.DataFrame,
    neurons: Mapping[str, int],
    nonfinite: str,
    confidence: float,
    guided: bool = False,
    shared: bool = False,
) -> list[Convergence]:
    """The mean DeltaLoss of the sampled layers after the first 8, 16, ... injections into each.

    records: with bits drawn at random. nonfinite: see `summarise`. Returns one entry per number of injections.
    """
    most = int(records["index"].max()) + 1 if len(records) else 0
    counts = [FIRST_POINT << power for power in range(32) if FIRST_POINT << power < most] + [most] * bool(most)
    deviations = _deviations(records, cap_of(nonfinite)) if guided and not shared else {}
    points = []
    for count in counts:
        layers = summarise(records[records["index"] < count], dict(neurons), 0, nonfinite, guided, shared).values()
        estimate = mean_interval(mean_over_layers(list(layers), "delta_loss"), confidence)
        numbers = {name: getattr(estimate, name) for name in ("value", "low", "high", "n")}
        if deviations:
            errors = [deviations[layer.layer] / math.sqrt(layer.injections) for layer in layers]
            numbers["uniform_error"] = math.hypot(*errors) / len(errors)
        points.append(Convergence(injections_per_layer=count, **numbers))
    return points


def _deviations(records: pd.DataFrame, cap: float | None) -> dict[str, float]:
    """Layer -> the standard deviation of DeltaLoss over all of its faults, as the weights of guided injections tell it."""
    injections = records.drop_duplicates(["layer", "index"])
    loss = np.abs(injections["faulty_loss"].to_numpy(float) - injections["golden_loss"].to_numpy(float))
    loss = np.where(np.isfinite(loss), loss, cap or 0.0)
    weight = injections["weight"].to_numpy(float)
    means = pd.DataFrame({"one": weight * loss, "square": weight * loss**2}).groupby(injections["layer"].to_numpy()).mean()
    return np.sqrt((means["square"] - means["one"] ** 2).clip(lower=0)).to_dict()


def _short(values: pd.Series) -> list[float]:
    return [float(f"{value:.6g}") for value in values]
