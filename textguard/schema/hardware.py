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
    """What faults of one kind do. Of faults that stay, SDC is the share of (fault, image) pairs; mismatches are not counted."""

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
    gates: Number | None = field("two-input gates that check or mend all parameters once", "count", default=None)
    points: list[Point] = field("by rate, lowest first")
    losing: list[Losing] = field("by points, lowest first")


class UnderMitigation(Stored):
    """A classifier whose activations are kept in range, under the faults of section inject and without a range detector."""

    mitigation: Name = field("`none` is the classifier without one")
    comparisons: Number = field("that it adds to an inference", "per image")
    bits: float = field("stored bits per bit of the parameters, with its bounds of 32 bits", "times", (1.0, 16.0))
    top1_change: Measured = field("points of top-1 that it adds without any fault, on the test set", "points", WITHIN_POINTS)
    injections: Whole = field("the same faults for all of a classifier's mitigations", "count")
    places: Whole = field("layers", "count")
    overall: Headline = field("the plain mean over layers")
    by_values: Headline = field("weighed by the values that a fault can hit")


class Hardware(Stored):
    """One run under all faults of section `hardware`."""

    confidence: float = field("of every interval", "share")
    images: Whole = field("of the test set, that faults which stay are seen on", "count")
    models: list[UnderFaults] = field("in the order of params.yaml")
    mitigations: list[UnderMitigation] = field(
        "`none`, and those of params.yaml in their order; empty or absent where it names none", default_factory=list
    )
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


class Bought(Stored):
    """One measure of what faults do, without and with what protects; above 1 it helps.

    Both meet the same faults, and the interval of the ratio is that of others: it is rather too wide.
    """

    without: Measured = field("without it, the mean over trainings")
    under: Measured = field("with it")
    ratio: Measured = field("the geometric mean over trainings of without / with", "times")


class Bargain(Stored):
    """What a protection or a mitigation costs the classifiers of one variant, and what it buys; means over trainings."""

    bits: float = field("stored bits per bit of the parameters, with check bits or bounds", "times", (1.0, 16.0))
    gates: Number = field("two-input gates that check or mend all parameters once", "count")
    comparisons: Number = field("that an inference has more", "per image")
    top1_change: Measured | None = field(
        "points of top-1 that it adds without any fault; absent of protections, which change nothing there",
        "points",
        WITHIN_POINTS,
        default=None,
    )
    sdc: Bought = field("of protections, the share of predictions that bit errors change")
    delta_loss: Bought = field("in nats")


class Protected(Stored):
    """A protection or a mitigation on a variant and on its baseline."""

    kind: Literal["protection", "mitigation"] = field("of stored parameters, or of neurons")
    name: Name = field("as params.yaml calls it")
    rate: float | None = field(
        "of protections, bit errors per stored bit: the lowest rate tried at which the baseline loses 10 points of top-1 "
        "without one, or the highest",
        "share",
        default=None,
    )
    baseline: Bargain = field("on the baseline")
    own: Bargain = field("on the variant")


class HardwareCell(Stored):
    """A variant beside its baseline, under all kinds of faults."""

    dataset: Name = field("the data set")
    backbone: Name = field("the backbone")
    variant: Name = field("the variant")
    seeds: list[Whole] = field("of the trainings")
    ratios: list[FaultRatio] = field("by faults, measure and place")
    protected: list[Protected] = field(
        "protections, then mitigations; empty or absent where there are none", default_factory=list
    )
