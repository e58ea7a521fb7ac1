"""What the records of a campaign say, each number with its interval.

DeltaLoss of an injection is |CE(faulty) - CE(golden)|, the absolute change of the cross entropy (natural logarithm) on its
image. Source: Mahmoud et al., ISSRE 2021, as used by GoldenEye, DSN 2022.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

Z_99 = 2.576  # the paper's two-sided 99 % quantile of the normal distribution


@dataclass(frozen=True)
class Estimate:
    """A number, its 99 % interval, and the number of observations behind it. NaN where there are none."""

    value: float
    low: float
    high: float
    n: int

    def as_json(self) -> dict[str, float | int | None]:
        """The estimate as metrics files hold it; NaN and infinities become null."""
        numbers = {"value": self.value, "low": self.low, "high": self.high}
        return {name: number if math.isfinite(number) else None for name, number in numbers.items()} | {"n": self.n}


def mean_estimate(values: np.ndarray) -> Estimate:
    """Mean of independent observations, shape [N], with value +- 2.576 * std(N - 1) / sqrt(N)."""
    count = len(values)
    mean = float(np.mean(values)) if count else math.nan
    half = Z_99 * float(np.std(values, ddof=1)) / math.sqrt(count) if count > 1 else math.nan
    return Estimate(mean, mean - half, mean + half, count)


def rate_estimate(hits: int, count: int) -> Estimate:
    """A proportion with Wilson's score interval, which also holds for 0 and for few hits.

    Source: Wilson, Journal of the American Statistical Association 22, 1927.
    """
    if not count:
        return Estimate(math.nan, math.nan, math.nan, 0)
    rate, z2 = hits / count, Z_99**2
    centre = (rate + z2 / (2 * count)) / (1 + z2 / count)
    half = Z_99 * math.sqrt(rate * (1 - rate) / count + z2 / (4 * count**2)) / (1 + z2 / count)
    low, high = max(0.0, centre - half), min(1.0, centre + half)
    return Estimate(rate, low if hits else 0.0, high if hits < count else 1.0, count)


def weighted_mean(estimates: Sequence[Estimate], weights: Sequence[float]) -> Estimate:
    """Weighted mean of independent estimates (weights need not sum to 1); their half-widths add in quadrature."""
    shares = np.asarray(weights, dtype=float) / sum(weights)
    value = float(sum(share * estimate.value for share, estimate in zip(shares, estimates, strict=True)))
    half = math.sqrt(sum((share * (e.high - e.value)) ** 2 for share, e in zip(shares, estimates, strict=True)))
    return Estimate(value, value - half, value + half, sum(estimate.n for estimate in estimates))


def ratio(numerator: Estimate, denominator: Estimate) -> Estimate:
    """Ratio of two independent positive estimates, with the delta method's interval on the logarithm (so never below 0)."""
    count = min(numerator.n, denominator.n)
    if not (numerator.value > 0 and denominator.value > 0):
        return Estimate(math.nan, math.nan, math.nan, count)
    value = numerator.value / denominator.value
    relative = [(estimate.high - estimate.value) / estimate.value for estimate in (numerator, denominator)]
    spread = math.exp(math.hypot(*relative))
    return Estimate(value, value / spread, value * spread, count)


def difference(minuend: Estimate, subtrahend: Estimate) -> Estimate:
    """Difference of two independent estimates; their half-widths add in quadrature."""
    value = minuend.value - subtrahend.value
    half = math.hypot(minuend.high - minuend.value, subtrahend.high - subtrahend.value)
    return Estimate(value, value - half, value + half, min(minuend.n, subtrahend.n))


@dataclass(frozen=True)
class LayerResult:
    """One layer's campaign.

    nonfinite: injections whose loss is NaN or infinite; DeltaLoss and mismatch leave them out. masked: those that the engine
    saw leave no trace; counted everywhere, with a DeltaLoss of 0.
    """

    layer: str
    neurons: int
    injections: int
    nonfinite: int
    detected: int
    masked: int
    delta_loss: Estimate
    mismatch: Estimate

    def __str__(self) -> str:
        shares = f"{self.masked / self.injections:.0%} masked, {self.detected / self.injections:.0%} detected"
        loss = f"DeltaLoss {self.delta_loss.value:.3g} [{self.delta_loss.low:.3g}, {self.delta_loss.high:.3g}]"
        return f"{self.layer}: {self.injections} injections, {shares}, {loss}, mismatch {self.mismatch.value:.2%}"

    def as_json(self) -> dict[str, Any]:
        """The result as metrics files hold it."""
        return {**vars(self), "delta_loss": self.delta_loss.as_json(), "mismatch": self.mismatch.as_json()}


def summarise_layer(records: pd.DataFrame, neurons: int) -> LayerResult:
    """Reduce one layer's records (columns golden_loss, faulty_loss, mismatch, detected, masked, layer) to its estimates."""
    loss_change = (records["faulty_loss"] - records["golden_loss"]).abs()
    finite = np.isfinite(loss_change)
    return LayerResult(
        layer=str(records["layer"].iloc[0]),
        neurons=neurons,
        injections=len(records),
        nonfinite=int((~finite).sum()),
        detected=int(records["detected"].sum()),
        masked=int(records["masked"].sum()),
        delta_loss=mean_estimate(loss_change[finite].to_numpy(dtype=np.float64)),
        mismatch=rate_estimate(int(records["mismatch"][finite].sum()), int(finite.sum())),
    )
