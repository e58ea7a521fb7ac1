"""What stage `effects` finds: variants set against one another, and the factors of a design."""

import math
from typing import Literal

from textguard.schema.base import Measured, Name, Number, Stored, Whole, field
from textguard.schema.results import Confidence, Verdict

SECOND = 0.95  # confidence of the second interval of every effect
_ANY = (-math.inf, math.inf)
# What is compared: measure, place, and what tables call it.
OUTCOMES: dict[tuple[str, str], str] = {
    ("delta_loss", "overall"): "DeltaLoss, all layers",
    ("delta_loss", "by_neurons"): "DeltaLoss, all neurons",
    ("delta_loss", "head"): "DeltaLoss, head alone",
    ("sdc", "overall"): "SDC, all layers",
    ("sdc", "by_neurons"): "SDC, all neurons",
    ("sdc", "head"): "SDC, head alone",
    ("top1", "all"): "Top-1",
}


class Effect(Stored):
    """What one change does to one outcome: how many times less damage, above 1 is better; of top-1, points more.

    Both intervals are of what other trainings would show.
    """

    measure: Literal["delta_loss", "sdc", "top1"] = field("what is compared")
    place: Literal["overall", "by_neurons", "head", "all"] = field("of which mean; `all` of top-1")
    effect: Measured = field(
        "the effect, with the interval of section `statistics`' confidence; n counts trainings that have the change",
        within=_ANY,
    )
    second: Measured = field(f"the same with an interval of confidence {SECOND:g}", within=_ANY)
    largest: Number = field(
        "the largest effect that the first interval leaves, for better or worse: a factor above 1, or points; null where it "
        "has no end"
    )
    zeros: Whole = field("trainings in which nothing was seen, which no ratio allows for: the effect is null then", "count")
    verdict: Verdict = field("what the first interval says")


class Contrast(Stored):
    """One variant set against another, in pairs of trainings with the same seed."""

    name: Name = field("as params.yaml calls it")
    variant: Name = field("the variant")
    against: Name = field("the one that it is set against")
    seeds: list[Whole] = field("of the trainings", min_length=1)
    effects: list[Effect] = field("by measure and place")


class FactorEffect(Stored):
    """A factor's high level against its low one, over all levels of the others; or how two factors interact.

    An interaction is the first factor's effect where the second is high, against its effect where that is low: by how many
    times it is larger, or by how many points.
    """

    factors: list[Name] = field("one, or the two that interact", min_length=1, max_length=2)
    aliases: list[list[Name]] = field(
        "effects of other factors that the design cannot tell from this one, so that it may be theirs"
    )
    effects: list[Effect] = field("by measure and place")


class Fit(Stored):
    """The least squares fit of one outcome. Logarithms of DeltaLoss and SDC, and points of top-1, are fitted."""

    measure: Literal["delta_loss", "sdc", "top1"] = field("what is fitted")
    place: Literal["overall", "by_neurons", "head", "all"] = field("of which mean")
    degrees: Whole = field("degrees of freedom that are left", "count")
    spread: Number = field("standard deviation that is left: of a natural logarithm, or in points", within=(0.0, math.inf))
    explained: Number = field("of the variance between trainings", "share")


class Factorial(Stored):
    """The factors of a design, by ordinary least squares: main effects, two-way interactions, and seeds as blocks."""

    factors: dict[Name, list[bool | int | float | str | None]] = field("factor -> its low and its high level")
    variants: list[Name] = field("of the design")
    seeds: list[Whole] = field("of the trainings")
    effects: list[FactorEffect] = field("main effects, then interactions")
    fits: list[Fit] = field("by measure and place; absent where a training has nothing to take the logarithm of")


class Effects(Stored):
    """The effects in one backbone on one data set."""

    dataset: Name = field("the data set's key")
    backbone: Name = field("the backbone")
    confidence: Confidence = field("of the first interval", "share")
    contrasts: list[Contrast] = field("in the order of params.yaml")
    factorial: Factorial | None = field("of the factorial design; absent where there is none", default=None)
