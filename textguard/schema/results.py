"""What stage `results` estimates: one file per run, the comparison of cells, and a summary."""

from typing import Annotated, Any, Literal

from pydantic import Field

from textguard.schema.base import Measured, Number, Stored, field
from textguard.schema.campaign import Settings

BASELINE = "baseline"  # the variant without texts, which the others are compared with
PROPOSED = "descriptions"  # the variant that the paper proposes

_RATIO = "baseline's DeltaLoss / its own, above 1 is better"
_VERDICT = "better, worse, or not separable at the confidence"


class Plan(Stored):
    """What a campaign injected."""

    mark: str = field("fingerprint of all that decides which faults are drawn: campaigns with one mark share their faults")
    seed: int = field("of the draw")
    plan: str = field("how injections were shared among layers")
    injections: int = field("faults that were drawn", "count")
    enumerated: int = field("faults in layers all of whose faults were tried", "count")
    eligible_images: int = field("test images that are predicted right without faults", "count")
    detector: str = field("the range detector that counts")


class Headline(Stored):
    """Means over layers."""

    delta_loss: Measured = field("mean DeltaLoss", "nats")
    sdc: Measured = field("faults that change the class or leave a loss that is not finite", "share")


class Overall(Headline):
    """Plain means over all layers, but where neurons are named."""

    mismatch: Measured = field("changed classes among faults with a finite loss", "share")
    nonfinite: Measured = field("faults that leave a NaN or infinite loss", "share")
    delta_loss_by_neurons: Measured = field("mean DeltaLoss, layers weighed by their neurons", "nats")
    fit: Measured = field("failures of the whole network; no value but its upper bound where no SDC was seen", "per 10^9 hours")


class Convergence(Stored):
    """The mean DeltaLoss of the sampled layers after some of the injections."""

    injections_per_layer: int = field("the first so many", "count")
    value: Number = field("the estimate", "nats")
    low: Number = field("lower end of its interval", "nats")
    high: Number = field("upper end of its interval", "nats")
    n: int = field("injections into all sampled layers", "count")


class Outcomes(Stored):
    """What became of the faults. The four add up to 1."""

    masked: float = field("left no trace in the logits", "share")
    benign: float = field("changed the logits, and not the class", "share")
    sdc: float = field("changed the class", "share")
    nonfinite: float = field("left a NaN or infinite loss", "share")


class ByBit(Stored):
    """The faults by the bit that they hit, lowest first; null where a bit was never hit."""

    n: list[int] = field("injections", "count")
    delta_loss: list[Number] = field("mean DeltaLoss of finite losses", "nats")
    sdc: list[Number] = field("changed classes or losses that are not finite", "share")


class Layer(Stored):
    """One layer under faults."""

    layer: str = field("its name in the backbone; the text-guided classifier's own head is `head`")
    kind: str = field("the operation: Conv2d, Linear, MatMul, ...")
    neurons: int = field("values that it puts out", "per image")
    multiply_adds: int | None = field("its multiply-adds; null where they are not known", "per image")
    method: Literal["sampled", "exact"] = field("exact where every fault on every eligible image was tried")
    injections: int = field("faults", "count")
    masked: int = field("faults that left no trace in the logits", "count")
    detected: int = field("faults that the range detector saw", "count")
    delta_loss: Measured = field("mean DeltaLoss", "nats")
    mismatch: Measured = field("changed classes among faults with a finite loss", "share")
    sdc: Measured = field("faults that change the class or leave a loss that is not finite", "share")
    nonfinite: Measured = field("faults that leave a NaN or infinite loss", "share")
    fit: Measured = field("failures of this layer", "per 10^9 hours")
    outcomes: Outcomes = field("what became of the faults")
    by_bit: ByBit = field("the faults by bit")
    improvement: Measured | None = field(
        f"{_RATIO}; absent where there is no baseline, or no such layer in it", "times", default=None
    )


class Improved(Stored):
    """Improvements: how many times smaller DeltaLoss is than the baseline's."""

    overall: Measured = field(f"mean over layers: {_RATIO}", "times")
    last_layer: Measured = field(f"last layer: {_RATIO}", "times")
    head: Measured = field("the head alone against the baseline's last layer", "times")


class Verdicts(Stored):
    """What the intervals of improvements say."""

    overall: str = field(_VERDICT)
    last_layer: str = field(_VERDICT)
    head: str = field(_VERDICT)


class UnderDetector(Stored):
    """The same faults under one range detector."""

    overall: Headline = field("means over all layers")
    last_layer: Headline = field("the last layer; of a text-guided classifier, its latent layer and head")
    nonfinite: Measured = field("faults that leave a NaN or infinite loss, mean over layers", "share")
    improvement: Improved | None = field("against the baseline; absent where there is none", default=None)


class Improvement(Stored):
    """A run against the baseline with its seed, under the range detector that counts."""

    baseline: str = field("key of the baseline's run")
    overall: Measured = field(f"mean over layers: {_RATIO}", "times")
    last_layer: Measured = field(f"last layer: {_RATIO}", "times")
    head: Measured = field("the head alone against the baseline's last layer", "times")
    top2diff: Measured = field("Top2Diff minus the baseline's", "share")
    verdict: Verdicts = field("what the three intervals say")


class RunResult(Stored):
    """All that is estimated of one run."""

    run: str = field("the run's key in params.yaml")
    dataset: str = field("the data set's key")
    backbone: str = field("the backbone")
    variant: str = field("what the head starts from; `baseline` has no head of its own")
    seed: int = field("of the training")
    confidence: Annotated[float, Field(gt=0, lt=1)] = field("of all intervals", "share")
    plan: Plan = field("what was injected")
    images: str = field("fingerprint of the test images' labels: runs with one fingerprint share their images")
    top1: Measured = field("accuracy without faults", "share")
    loss: Measured = field("cross entropy without faults", "nats")
    top2diff: Measured = field("probability of the first class minus that of the second, without faults", "share")
    parameters: int = field("weights and biases, trained or not", "count")
    multiply_adds: int = field("multiply-adds of an inference", "per image")
    scale: float = field("what a text-guided classifier multiplies its cosines by; 1 for a baseline")
    largest_logit: float = field("the largest magnitude of a logit over the training images")
    overall: Overall = field("means over all layers")
    last_layer: Headline = field("the last layer; of a text-guided classifier, its latent layer and head")
    convergence: list[Convergence] = field("how DeltaLoss settled; empty where injections were planned by what the first did")
    layers: list[Layer] = field("the layers, in order of execution")
    detectors: dict[str, UnderDetector] = field("by range detector, the one that counts first")
    improvement: Improvement | None = field("against the baseline; null for a baseline, or where there is none")
    skipped: dict[str, str] = field("by layer: why it takes no faults")
    settings: Settings = field("as in campaign.json")
    statistics: dict[str, Any] = field("params.yaml's section `statistics`")


class CellUnderDetector(Improved):
    """A cell under one range detector."""

    overall_baseline: Measured = field("DeltaLoss of the baseline, mean over layers", "nats")
    overall_guided: Measured = field("DeltaLoss of the cell, mean over layers", "nats")
    last_layer_baseline: Measured = field("DeltaLoss of the baseline's last layer", "nats")
    last_layer_guided: Measured = field("DeltaLoss of the cell's last layer", "nats")
    nonfinite_baseline: Measured = field("the baseline's faults that leave a loss that is not finite", "share")
    nonfinite_guided: Measured = field("the cell's faults that leave a loss that is not finite", "share")


class Cell(Stored):
    """One (data set, backbone, variant) beside its baselines, over all trainings: its runs differ in their seeds alone."""

    dataset: str = field("the data set's key")
    backbone: str = field("the backbone")
    variant: str = field("what the head starts from")
    seeds: list[int] = field("of the trainings that have a baseline with the same seed")
    top1_baseline: Measured = field("accuracy of the baselines", "share")
    top1: Measured = field("accuracy", "share")
    parameters: int = field("more than the baseline has", "count")
    multiply_adds: int = field("more than the baseline has", "per image")
    overall: Measured = field(f"mean over layers: {_RATIO}", "times")
    last_layer: Measured = field(f"last layer: {_RATIO}", "times")
    head: Measured = field("the head alone against the baseline's last layer", "times")
    verdict: Verdicts = field("what the three intervals say")
    top2diff: Measured = field("Top2Diff minus the baselines'", "share")
    detectors: dict[str, CellUnderDetector] = field("by range detector, the one that counts first")


class SummaryLine(Stored):
    """The headline numbers of one (data set, backbone, variant), over all trainings, with six digits."""

    top1: Number = field("accuracy without faults", "percent")
    sdc: Number = field("SDC probability, mean over layers", "percent")
    dl: Number = field("DeltaLoss, mean over layers", "nats")
    x_last: Number = field(f"last layer: {_RATIO}; absent without a baseline", "times", default=float("nan"))
    x_all: Number = field(f"mean over layers: {_RATIO}; absent without a baseline", "times", default=float("nan"))


# Data set -> backbone -> variant.
Summary = dict[str, dict[str, dict[str, SummaryLine]]]
