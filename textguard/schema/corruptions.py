"""What stage `corruptions` finds of one run on corrupted images, and how runs compare there."""

from typing import Annotated, Literal

from pydantic import Field

from textguard.schema.base import Measured, Name, Stored, Whole, field
from textguard.schema.results import Headline, Verdict

CLEAN = "clean"  # images as they are, as a kind of corruption
CORRELATION, POINTS = (-1.0, 1.0), (-100.0, 100.0)
Kind = Literal["clean", "noise", "blur", "contrast", "brightness", "jpeg"]
Severity = Annotated[int, Field(ge=0, le=5)]
EFFECTS = {"top1": "Top-1", "top2diff": "Top2Diff", "loss": "Loss", "delta_loss": "DeltaLoss", "sdc": "SDC"}


class UnderCorruption(Stored):
    """A campaign on corrupted images."""

    images: Whole = field("that are predicted right without faults, on which they are injected", "count")
    injections: Whole = field("faults that were drawn; those of enumerated layers are not counted", "count")
    overall: Headline = field("the plain mean over layers")


class OnImages(Stored):
    """A classifier on the test images with one corruption, over images."""

    kind: Kind = field("of corruption; `clean` for images as they are")
    severity: Severity = field("1, the weakest, to 5; 0 of clean images")
    top1: Measured = field("accuracy", "share")
    loss: Measured = field("mean cross entropy", "nats")
    top2diff: Measured = field("mean difference of the two largest probabilities", "share")
    faults: UnderCorruption | None = field("absent where none were injected, or no image is predicted right", default=None)


class Corruptions(Stored):
    """One run on corrupted images."""

    confidence: float = field("of every interval", "share")
    images: Whole = field("of the test set", "count")
    conditions: list[OnImages] = field("clean images first, then by kind and severity as params.yaml has them")
    lost: Measured = field("points of top-1 that a corruption costs in the mean over all, over images", "points", POINTS)


class CorruptionEffect(Stored):
    """A variant beside its baseline on the test images with one corruption, over trainings."""

    kind: Kind = field("of corruption; `clean` for images as they are")
    severity: Severity = field("1, the weakest, to 5; 0 of clean images")
    measure: Literal["top1", "top2diff", "loss", "delta_loss", "sdc"] = field("what is compared")
    baseline: Measured = field("the baseline's mean over trainings")
    own: Measured = field("the variant's")
    effect: Measured = field(
        "of top1 and top2diff ours - the baseline's, in points; of the others the baseline's / ours, the geometric mean"
    )
    verdict: Verdict = field("what the effect's interval says")


class CorruptionCell(Stored):
    """A variant beside its baseline, on all corrupted images."""

    dataset: Name = field("the data set")
    backbone: Name = field("the backbone")
    variant: Name = field("the variant")
    seeds: list[Whole] = field("of the trainings")
    effects: list[CorruptionEffect] = field("by kind, severity and measure")


class BothResiliences(Stored):
    """One classifier: what corruption costs it, and what faults do to it on clean images."""

    run: Name = field("the run")
    variant: Name = field("its variant")
    lost: Measured = field("points of top-1 that a corruption costs, as in metrics/corruptions/RUN.json", "points", POINTS)
    delta_loss: Measured = field("mean over layers, on clean images, as in metrics/results/RUN.json", "nats")
    sdc: Measured = field("SDC probability, likewise", "share")


class Together(Stored):
    """Whether classifiers that stand faults well stand corruption well."""

    dataset: Name = field("the data set; `all` for those of all")
    measure: Literal["delta_loss", "sdc"] = field("of what faults do on clean images")
    correlation: Measured = field(
        "Spearman's rank correlation with the points of top-1 that a corruption costs, over classifiers; above 0, what stands "
        "one stands the other",
        "",
        CORRELATION,
    )


class ComparedCorruptions(Stored):
    """How the grid's runs compare on corrupted images; empty lists where it tests none."""

    cells: list[CorruptionCell] = field("one per variant that has a baseline")
    classifiers: list[BothResiliences] = field("one per run")
    together: list[Together] = field("by data set and measure")
