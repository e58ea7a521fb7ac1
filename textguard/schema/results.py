"""What stage `results` estimates: one file per run, the comparison of cells, and a summary."""

import math
from collections import Counter
from typing import Annotated, Any

from pydantic import Field, model_validator

from textguard.schema.base import Measured, Name, Number, Stored, Whole, field
from textguard.schema.campaign import Method, Settings

BASELINE = "baseline"  # the variant without texts, which the others are compared with
PROPOSED = "descriptions"  # the variant that the paper proposes

MEASURES = {"delta_loss": "DeltaLoss", "sdc": "SDC", "mismatch": "Mismatch"}  # what faults do, and what tables call it
# Means over layers that a classifier is compared by.
PLACES = {
    "head": "head alone",
    "last_layer": "last layer",
    "others": "layers before it",
    "overall": "all layers",
    "by_neurons": "all neurons",
}

_DIFFERENCE = (-1.0, 1.0)
_ANY = (-math.inf, math.inf)
ONE_TRAINING = "1 training: differences between trainings are not in this interval"
NO_VERDICT = "nothing to compare"
Verdict = Annotated[str, Field(pattern=rf"^(better|worse|not separable at [\d.]+%|{ONE_TRAINING}|{NO_VERDICT})$")]
# Beyond it there is no quantile of the normal distribution, or none that says anything.
Confidence = Annotated[float, Field(ge=0.5, le=0.9999)]


class Plan(Stored):
    """What a campaign injected."""

    mark: Name = field(
        "fingerprint of the plan's settings: campaigns with one mark share their faults, under `guided` mostly their images"
    )
    seed: Whole = field("of the draw")
    plan: Name = field("how injections were shared among layers")
    injections: Whole = field("faults that were drawn", "count")
    enumerated: Whole = field("faults in layers all of whose faults were tried", "count")
    eligible_images: Whole = field("test images that are predicted right without faults", "count")
    detector: Name = field("the range detector that counts")


class Headline(Stored):
    """Means over layers."""

    delta_loss: Measured = field("mean DeltaLoss", "nats")
    sdc: Measured = field("faults that change the class or leave a loss that is not finite", "share")
    mismatch: Measured = field("changed classes among faults with a finite loss", "share")


class Places(Stored):
    """What faults do in parts of a classifier. Means over layers are plain, but where neurons are named."""

    head: Headline = field("the last layer; of a text-guided classifier, its head without its latent layer")
    last_layer: Headline = field("the last layer; of a text-guided classifier, its latent layer and head")
    others: Headline = field("all layers before the last layer")
    overall: Headline = field("all layers")
    by_neurons: Headline = field("all layers, weighed by their neurons: a fault that hits any neuron as likely as any other")
    nonfinite: Measured = field("faults that leave a NaN or infinite loss, over all layers", "share")


class Overall(Headline):
    """Plain means over all layers."""

    nonfinite: Measured = field("faults that leave a NaN or infinite loss", "share")
    fit: Measured = field("failures of the whole network; no value but its upper bound where no SDC was seen", "per 10^9 hours")


class Convergence(Stored):
    """The mean DeltaLoss of the sampled layers after some of the injections."""

    injections_per_layer: Whole = field("the first so many", "count")
    value: Number = field("the estimate", "nats")
    low: Number = field("lower end of its interval", "nats")
    high: Number = field("upper end of its interval", "nats")
    n: Whole = field("injections into all sampled layers", "count")
    uniform_error: Number | None = field(
        "standard error of as many uniform injections, which the weights of guided ones tell; absent for other plans",
        "nats",
        default=None,
    )

    @model_validator(mode="after")
    def _is_an_estimate(self) -> "Convergence":
        Measured(self.value, self.low, self.high, self.n)  # or it says what is wrong
        return self


class Outcomes(Stored):
    """What became of the faults. The four add up to 1."""

    masked: float = field("left no trace in the logits", "share")
    benign: float = field("changed the logits, and not the class", "share")
    sdc: float = field("changed the class", "share")
    nonfinite: float = field("left a NaN or infinite loss", "share")

    @model_validator(mode="after")
    def _all_of_them(self) -> "Outcomes":
        total = self.masked + self.benign + self.sdc + self.nonfinite
        if not math.isclose(total, 1, abs_tol=1e-4):
            raise ValueError(f"the four add up to {total:g}")
        return self


class ByBit(Stored):
    """The faults by the bit that they hit, lowest first; null where a bit was never hit."""

    n: list[Whole] = field("injections", "count")
    delta_loss: list[Number] = field("mean DeltaLoss of finite losses", "nats")
    sdc: list[Number] = field("changed classes or losses that are not finite", "share")

    @model_validator(mode="after")
    def _one_entry_per_bit(self) -> "ByBit":
        if not len(self.n) == len(self.delta_loss) == len(self.sdc) > 0:
            raise ValueError("n, delta_loss and sdc must have one entry per bit each")
        return self


class LayerRatios(Stored):
    """Of one layer: what the baseline has / what the classifier has, above 1 is better."""

    delta_loss: Measured = field("of DeltaLoss", "times")
    sdc: Measured = field("of SDC probability", "times")
    mismatch: Measured = field("of the mismatch rate", "times")


class Layer(Stored):
    """One layer under faults."""

    layer: Name = field("its name in the backbone; the text-guided classifier's own head is `head`")
    kind: Name = field("the operation: Conv2d, Linear, MatMul, ...")
    neurons: Whole = field("values that it puts out", "per image")
    multiply_adds: Whole | None = field("its multiply-adds; null where they are not known", "per image")
    method: Method = field("exact where every fault on every eligible image was tried")
    injections: Whole = field("faults", "count")
    masked: Whole = field("faults that left no trace in the logits", "count")
    detected: Whole = field("faults that the range detector saw", "count")
    delta_loss: Measured = field("mean DeltaLoss", "nats")
    mismatch: Measured = field("changed classes among faults with a finite loss", "share")
    sdc: Measured = field("faults that change the class or leave a loss that is not finite", "share")
    nonfinite: Measured = field("faults that leave a NaN or infinite loss", "share")
    fit: Measured = field("failures of this layer", "per 10^9 hours")
    outcomes: Outcomes = field("what became of the faults")
    by_bit: ByBit = field("the faults by bit")
    improvement: LayerRatios | None = field(
        "against the baseline's layer; absent where there is no baseline, or no such layer in it", default=None
    )

    @model_validator(mode="after")
    def _counts_agree(self) -> "Layer":
        if max(self.masked, self.detected) > self.injections:
            raise ValueError("masked and detected are some of the injections, and there are more of them")
        if sum(self.by_bit.n) != self.injections:
            raise ValueError(f"by_bit.n adds up to {sum(self.by_bit.n)}, and there are {self.injections} injections")
        return self


class PlaceRatios(Stored):
    """Of one measure: what the baseline has / what the classifier has, above 1 is better."""

    head: Measured = field("the head alone against the baseline's last layer", "times")
    last_layer: Measured = field("the last layer", "times")
    others: Measured = field("the layers before the last layer", "times")
    overall: Measured = field("all layers", "times")
    by_neurons: Measured = field("all layers, weighed by their neurons; of SDC, what it is of FIT", "times")


class Improved(Stored):
    """How many times less faults do than in the baseline."""

    delta_loss: PlaceRatios = field("of DeltaLoss")
    sdc: PlaceRatios = field("of SDC probability")
    mismatch: PlaceRatios = field("of the mismatch rate")


class PlaceVerdicts(Stored):
    """What the intervals of one measure's ratios say."""

    head: Verdict = field("of the head alone")
    last_layer: Verdict = field("of the last layer")
    others: Verdict = field("of the layers before the last layer")
    overall: Verdict = field("of all layers")
    by_neurons: Verdict = field("of all layers, weighed by their neurons")


class Verdicts(Stored):
    """Whether a cell is better or worse: never said from one training."""

    delta_loss: PlaceVerdicts = field("by DeltaLoss")
    sdc: PlaceVerdicts = field("by SDC probability")
    mismatch: PlaceVerdicts = field("by the mismatch rate")


class RescaledHead(Stored):
    """The head alone with its logits scaled, against the baseline's last layer: baseline's DeltaLoss / its own.

    No scale changes a prediction without faults. Behind the head, where `same_temperature` has it, none changes SDC or
    mismatches either. In the weights, where `folded` has it, bits flip in other values, and both may change.
    """

    same_temperature: Measured = field(
        "its largest logit on training images is made the baseline's; null where that takes a factor beyond 64", "times"
    )
    folded: Measured | None = field(
        "the scale of its logits is in its weights, as in deployment; absent where there is no scale", "times", default=None
    )


class UnderDetector(Places):
    """The same faults under one range detector."""

    improvement: Improved | None = field("against the baseline; absent where there is none", default=None)
    rescaled: RescaledHead | None = field(
        "the same for the head with its logits scaled; absent where it was sampled or more than a factor lies behind it",
        default=None,
    )


class Improvement(Improved):
    """A run against the baseline with its seed, under the range detector that counts. One training gives no verdict."""

    baseline: Name = field("key of the baseline's run")
    top2diff: Measured = field("Top2Diff minus the baseline's", "share", _DIFFERENCE)


class RunResult(Stored):
    """All that is estimated of one run."""

    run: Name = field("the run's key in params.yaml")
    dataset: Name = field("the data set's key")
    backbone: Name = field("the backbone")
    variant: Name = field("what the head starts from; `baseline` has no head of its own")
    seed: Whole = field("of the training")
    confidence: Confidence = field("of all intervals", "share")
    plan: Plan = field("what was injected")
    images: Name = field("fingerprint of the test images' labels: runs with one fingerprint share their images")
    top1: Measured = field("accuracy without faults", "share")
    loss: Measured = field("cross entropy without faults", "nats")
    top2diff: Measured = field("probability of the first class minus that of the second, without faults", "share")
    parameters: Whole = field("weights and biases, trained or not", "count")
    multiply_adds: Whole = field("multiply-adds of an inference", "per image")
    scale: float = field("what a text-guided classifier multiplies its cosines by; 1 for a baseline", gt=0)
    weights: Name = field("fingerprint of all parameters and buffers: runs with one fingerprint are of one training")
    largest_logit: float = field("the largest magnitude of a logit over the training images", ge=0)
    head: Headline = field("the last layer; of a text-guided classifier, its head without its latent layer")
    last_layer: Headline = field("the last layer; of a text-guided classifier, its latent layer and head")
    others: Headline = field("means over all layers before the last layer")
    overall: Overall = field("means over all layers")
    by_neurons: Headline = field("means over all layers, weighed by their neurons")
    convergence: list[Convergence] = field("how DeltaLoss settled; empty where injections were planned by what the first did")
    layers: list[Layer] = field("the layers, in order of execution", min_length=1)
    detectors: dict[str, UnderDetector] = field("by range detector, the one that counts first")
    improvement: Improvement | None = field("against the baseline; null for a baseline, or where there is none")
    skipped: dict[Name, Name] = field("by layer: why it takes no faults")
    settings: Settings = field("as in campaign.json")
    statistics: dict[str, Any] = field("params.yaml's section `statistics`")

    @model_validator(mode="after")
    def _parts_agree(self) -> "RunResult":
        if twice := [name for name, count in Counter(layer.layer for layer in self.layers).items() if count > 1]:
            raise ValueError(f"layers holds {twice[0]!r} twice")
        for name, method in (("injections", "sampled"), ("enumerated", "exact")):
            there = sum(layer.injections for layer in self.layers if layer.method == method)
            if getattr(self.plan, name) != there:
                raise ValueError(f"plan.{name} is {getattr(self.plan, name)}, and the {method} layers have {there}")
        if self.detectors and next(iter(self.detectors)) != self.plan.detector:
            raise ValueError(
                f"detectors begins with {next(iter(self.detectors))!r}, and plan.detector is {self.plan.detector!r}"
            )
        if self.improvement and self.variant == BASELINE:
            raise ValueError("improvement is there, and a baseline has none over itself")
        return self


class CellUnderDetector(Stored):
    """A cell under one range detector."""

    baseline: Places = field("what faults do in the baseline")
    own: Places = field("what faults do in the cell")
    improvement: Improved = field("the baseline's / its own, above 1 is better")
    verdict: Verdicts = field("what the intervals of the ratios say")
    rescaled: RescaledHead | None = field("the head with its logits scaled; absent where a training has none", default=None)


class LayerVerdicts(Stored):
    """What the intervals of a layer's ratios say."""

    delta_loss: Verdict = field("by DeltaLoss")
    sdc: Verdict = field("by SDC probability")
    mismatch: Verdict = field("by the mismatch rate")


class CellLayer(Stored):
    """A layer of a cell beside the baseline's, under the range detector that counts."""

    layer: Name = field("its name in the backbone; the text-guided classifier's own head is `head`")
    improvement: LayerRatios = field("the baseline's / its own, above 1 is better")
    verdict: LayerVerdicts = field("what the intervals of the ratios say")


class Cell(Stored):
    """One (data set, backbone, variant) beside its baselines, over all trainings: its runs differ in their seeds alone.

    Means over trainings are geometric for DeltaLoss and for ratios, and plain for shares and differences.
    """

    dataset: Name = field("the data set's key")
    backbone: Name = field("the backbone")
    variant: Name = field("what the head starts from")
    against: Name = field("the variant that it is compared with, which is called its baseline here")
    seeds: list[Whole] = field("of the trainings that have a baseline with the same seed", min_length=1)
    top1_baseline: Measured = field("accuracy of the baselines", "share")
    top1: Measured = field("accuracy", "share")
    parameters: int = field("more than the baseline has", "count", _ANY)
    multiply_adds: int = field("more than the baseline has", "per image", _ANY)
    top2diff: Measured = field("Top2Diff minus the baselines'", "share", _DIFFERENCE)
    detectors: dict[str, CellUnderDetector] = field("by range detector, the one that counts first", min_length=1)
    layers: list[CellLayer] = field("the layers that the baseline has too, in order of execution")

    @property
    def first(self) -> CellUnderDetector:
        """The cell under the detector that counts."""
        return next(iter(self.detectors.values()))


class SummaryLine(Stored):
    """The headline numbers of one (data set, backbone, variant), over all trainings, with six digits.

    Those that begin with x are the baseline's / its own, above 1 is better, and absent without a baseline.
    """

    top1: Number = field("accuracy without faults", "percent")
    sdc: Number = field("SDC probability, mean over layers", "percent")
    mismatch: Number = field("mismatch rate, mean over layers", "percent")
    dl: Number = field("DeltaLoss, mean over layers", "nats")
    x_head: Number = field("DeltaLoss, the head alone", "times", default=float("nan"))
    x_last: Number = field("DeltaLoss, last layer", "times", default=float("nan"))
    x_all: Number = field("DeltaLoss, mean over layers", "times", default=float("nan"))
    x_sdc: Number = field("SDC probability, mean over layers", "times", default=float("nan"))
    x_fit: Number = field("SDC probability, layers weighed by their neurons", "times", default=float("nan"))


# Data set -> backbone -> variant.
Summary = dict[str, dict[str, dict[str, SummaryLine]]]
