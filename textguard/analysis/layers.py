"""What several trainings of a network say of its layers and of its bits, with layers that do the same side by side."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from textguard.estimates.statistics import Estimate, over_trainings
from textguard.schema.results import BASELINE, RunResult

LATENT, SCORES = "latent", "class scores"
SHARE, LOSS = (0.0, 1.0), (0.0, math.inf)
CLASSIFIER_PARTS = ("scores", "before")  # of `bit_means`: the layer that puts out the class scores, and those before it


@dataclass(frozen=True)
class Aligned:
    """The layers of several classifiers, in order of execution.

    roles: `stem`, `block 1`, ..., `latent`, `class scores`; empty of what is none of these. shared: whether the layers that put
    out the class scores share the last place, as a baseline's `fc` and a text-guided classifier's `head` do.
    """

    names: Sequence[str]
    roles: Sequence[str]
    shared: bool

    def at(self, result: RunResult, layer: str) -> int:
        """The place of one of a classifier's layers."""
        last = result.layers[-1].layer if self.shared else self.names[-1]
        return len(self.names) - 1 if layer == last else self.names[:-1].index(layer)


def align(results: Sequence[RunResult]) -> Aligned:
    """The places of these classifiers' layers; those that the longest one lacks stand before the class scores.

    Classifiers without any text-guided one among them share places by name alone.
    """
    shared = any(result.variant != BASELINE for result in results)
    longest = max(results, key=lambda result: len(result.layers))
    last = dict.fromkeys(result.layers[-1].layer for result in (results if shared else [longest]))
    ordered = [longest, *results]
    inner = dict.fromkeys(
        layer.layer
        for result in ordered
        for layer in (result.layers[:-1] if shared else result.layers)
        if shared or layer.layer not in last
    )
    names = list(inner)
    return Aligned([*names, " / ".join(last)], [*_roles(names, set(last)), SCORES], shared)


def _roles(names: Sequence[str], last: set[str]) -> list[str]:
    """Of the layers before the class scores. last: names of those; a layer that is one in another classifier is latent here."""
    roles, blocks = [], 0
    for _, group in groupby(names, key=_block):
        found = list(group)
        if found[-1] in last:
            roles += [""] * (len(found) - 1) + [LATENT]
        elif len(found) > 1:
            blocks += 1
            roles += [f"block {blocks}"] * len(found)
        else:
            roles.append("" if blocks else "stem")
    return roles


def _block(name: str) -> str:
    """The part of a layer's name that its block shares: `layer1.0` of `layer1.0.conv2`, `features` of `features.3`."""
    if called := re.match(r".*\bblocks\.\d+(?=\.)", name):
        return called[0]
    *parents, _ = name.split(".")
    for numbered in (str.isdigit, lambda part: part[-1:].isdigit()):
        for place, parent in enumerate(parents, start=1):
            if numbered(parent):
                return ".".join(parents[:place])
    return parents[0] if parents else name


@dataclass(frozen=True)
class LayerMean:
    """One layer over trainings: SDC and faults without a trace (shares), DeltaLoss (nats)."""

    sdc: Estimate
    delta_loss: Estimate
    masked: Estimate


def layer_means(results: Sequence[RunResult]) -> dict[str, LayerMean]:
    """Layer -> its means over trainings that differ in their seeds alone. The masked share of one training has no interval."""
    confidence = results[0].confidence
    found = {}
    for layers in zip(*(result.layers for result in results), strict=True):
        masked = [_without_interval(layer.outcomes.masked, layer.injections) for layer in layers]
        exact = all(layer.method == "exact" for layer in layers)
        found[layers[0].layer] = LayerMean(
            over_trainings([layer.sdc for layer in layers], SHARE, confidence),
            over_trainings([layer.delta_loss for layer in layers], LOSS, confidence),
            _of_trainings(masked, SHARE, confidence, exact),
        )
    return found


@dataclass(frozen=True)
class BitMean:
    """The faults in one bit, over layers and trainings: see `LayerMean`."""

    sdc: Estimate
    delta_loss: Estimate


def bit_means(results: Sequence[RunResult], part: str) -> list[BitMean]:
    """The faults by bit, lowest first, in a part of the classifier: one of CLASSIFIER_PARTS.

    A training counts with the plain mean over those layers in which the bit was hit. Of one training there is no interval, but
    where all faults were tried.
    """
    confidence = results[0].confidence
    layers = [list(result.layers[-1:] if part == "scores" else result.layers[:-1]) for result in results]
    exact = all(layer.method == "exact" for own in layers for layer in own)
    found = []
    for bit in range(max((len(layer.by_bit.n) for own in layers for layer in own), default=0)):
        hit = [[layer.by_bit for layer in own if bit < len(layer.by_bit.n) and layer.by_bit.n[bit]] for own in layers]
        n = [sum(one.n[bit] for one in own) for own in hit]
        means = {}
        for measure, within in (("sdc", SHARE), ("delta_loss", LOSS)):
            values = [_mean([getattr(one, measure)[bit] for one in own]) for own in hit]
            singles = [_without_interval(value, count) for value, count in zip(values, n, strict=True)]
            means[measure] = _of_trainings(singles, within, confidence, exact)
        found.append(BitMean(**means))
    return found


def loss_by_bit(results: Sequence[RunResult], fewest: int) -> dict[str, np.ndarray]:
    """Layer -> mean DeltaLoss of its faults by bit, float [bits], over trainings; NaN where fewer hit it."""
    found = {}
    for layers in zip(*(result.layers for result in results), strict=True):
        hits = np.sum([layer.by_bit.n for layer in layers], axis=0)
        losses = zip(*(layer.by_bit.delta_loss for layer in layers), strict=True)
        means = np.array([_mean(bit) for bit in losses])
        found[layers[0].layer] = np.where(hits >= fewest, means, math.nan)
    return found


def _mean(values: Sequence[float]) -> float:
    """Of what is finite: a bit may leave no finite loss in a layer."""
    finite = [value for value in values if math.isfinite(value)]
    return math.fsum(finite) / len(finite) if finite else math.nan


def _without_interval(value: float, n: int) -> Estimate:
    return Estimate(value, value, value, n)


def _of_trainings(singles: Sequence[Estimate], within: tuple[float, float], confidence: float, exact: bool) -> Estimate:
    """Their mean with an interval from their spread, which holds that of injections too; of one, none unless exact."""
    if len(singles) > 1:
        return over_trainings(singles, within, confidence)
    (single,) = singles
    return single if exact else Estimate(single.value, math.nan, math.nan, single.n)
