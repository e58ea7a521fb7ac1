"""What stage `hardware` finds of one run under other faults than those of section `inject`, and how runs compare there."""

from typing import Literal

from textguard.schema.base import Measured, Name, Number, Stored, Whole, field
from textguard.schema.results import Headline, Verdict

USUAL = "inject.faults"  # the faults of section inject, as those of section hardware are named
WITHIN_POINTS = (-100.0, 100.0)


class Lost(Stored):
    """What single faults that stay do to accuracy."""

    accuracy: Measured = field("points of top-1 that a fault costs on average", "points", WITHIN_POINTS)
    critical: Measured = field("faults that change the class of an image or more", "share")
    harmless: Measured = field("faults that leave the logits of all images as they were", "share")


class UnderFaults(Stored):
    """What faults of one kind do. Of faults that stay, SDC and mismatches are shares of (fault, image) pairs."""

    name: Name = field("as params.yaml calls them")
    faults: dict[str, str | int | list[int]] = field("what one of them is, see `inject.faults`")
    injections: Whole = field("faults that were drawn", "count")
    places: Whole = field("layers, or stored tensors where faults in weights stay", "count")
    overall: Headline = field("the plain mean over layers, or over tensors")
    by_values: Headline = field("weighed by the values that a fault can hit: any is hit as likely as any other")
    lost: Lost | None = field("of faults that stay; absent of others", default=None)


class Point(Stored):
    """Memories with one bit error rate: means over them, and what their protection did."""

    rate: float = field("bit errors per stored bit", "share")
    memories: Whole = field("draws of all bit errors", "count")
    flips: Number = field("bit errors per memory, on average", "count")
    accuracy: Measured = field("points of top-1 that are lost", "points", WITHIN_POINTS)
    delta_loss: Measured = field("mean DeltaLoss of finite losses", "nats")
    changed: Measured = field("images whose class changes, or whose logits are not finite", "share")
    corrected: Number = field("words per memory that were corrected, on average", "count")
    detected: Number = field("words per memory in which errors were seen and not corrected, on average", "count")
    silent: Number = field("words per memory with errors that nothing saw, or that were made worse, on average", "count")


class Losing(Stored):
    """The bit error rate at which a classifier loses accuracy."""

    points: float = field("of top-1 that are lost", "points", (0.0, 100.0))
    rate: Measured = field("the rate; null where the rates that were tried do not reach it", "share")


class Curve(Stored):
    """Accuracy against the bit error rate of the memory that holds the parameters."""

    protection: Name = field("of a word, see docs/faults.md")
    bits: float = field("stored bits per bit of data", "times", (1.0, 16.0))
    points: list[Point] = field("by rate, lowest first")
    losing: list[Losing] = field("by points, lowest first")


class Hardware(Stored):
    """One run under all faults of section `hardware`."""

    confidence: float = field("of every interval", "share")
    images: Whole = field("that faults which stay are seen on, all of the test set", "count")
    models: list[UnderFaults] = field("in the order of params.yaml")
    curves: list[Curve] = field("one per protection, in the order of params.yaml")


class FaultRatio(Stored):
    """What one kind of faults does in the baseline / in another variant, over trainings; above 1 the latter is better."""

    faults: Name = field("as params.yaml calls them; `inject.faults` for those of section inject")
    measure: Literal["delta_loss", "sdc", "mismatch", "accuracy", "rate"] = field(
        "what is compared; `rate` is the bit error rate that costs `points` of accuracy, and its ratio is that of ours to the "
        "baseline's"
    )
    place: Literal["overall", "by_values", "all"] = field("of which mean; `all` of all stored bits")
    points: float | None = field("of top-1, for `rate`; absent otherwise", "points", (0.0, 100.0), default=None)
    baseline: Measured = field("the baseline's mean over trainings")
    own: Measured = field("the variant's")
    ratio: Measured = field("the geometric mean over trainings of the ratio", "times")
    verdict: Verdict = field("what its interval says")


class HardwareCell(Stored):
    """A variant beside its baseline, under all kinds of faults."""

    dataset: Name = field("the data set")
    backbone: Name = field("the backbone")
    variant: Name = field("the variant")
    seeds: list[Whole] = field("of the trainings")
    ratios: list[FaultRatio] = field("by faults, measure and place")
