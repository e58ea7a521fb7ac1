"""What stage `closeup` sees of a classifier under faults."""

import math
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from textguard.estimates.statistics import CONFIDENCE
from textguard.schema.base import Measured, Name, Number, Stored, Whole, field


class LastLayerValues(Stored):
    """How large the values of the last layer are, without faults and after one flip of a bit, range detector off."""

    layer: Name = field("the last layer's name in the network")
    profiled: float = field("its largest magnitude over the training images", "unit of the layer", ge=0)
    images: int = field("test images", "count", ge=1)
    powers: list[int] = field(
        "powers of ten at which the intervals of magnitudes begin; the first and last take all beyond", min_length=1
    )
    golden: list[float] = field("values without faults in each interval", "share")
    faulty: list[float] = field("values after a flip in each interval, every bit as likely", "share")
    beyond: float = field("finite values after a flip that are larger than `profiled`", "share")
    not_finite: float = field("NaN and infinite values after a flip", "share")

    @model_validator(mode="after")
    def _shares_of_all_values(self) -> "LastLayerValues":
        if not len(self.powers) == len(self.golden) == len(self.faulty):
            raise ValueError("golden and faulty must have one entry per power each")
        if self.powers != list(range(self.powers[0], self.powers[0] + len(self.powers))) or abs(self.powers[0]) > 400:
            raise ValueError("powers must be neighbours, and those of numbers")
        for name, shares in (("golden", [*self.golden]), ("faulty and not_finite", [*self.faulty, self.not_finite])):
            if not math.isclose(math.fsum(shares), 1, abs_tol=1e-6):
                raise ValueError(f"{name} add up to {math.fsum(shares):g}, not to 1")
        return self


class Shift(Stored):
    """How far maps move under faults. Maps that are not finite count 0; intervals are over images."""

    finite: Whole = field("images whose map and logits stay finite", "count")
    rank_correlation: Measured = field("Spearman's, of the map with and without faults, mean over images", within=(-1.0, 1.0))
    overlap: Measured = field("of the quarters of places that speak most for the class: intersection over union", "share")
    changed: Measured = field("images with another class or with logits or a map that are not finite", "share")


class WeightShift(Shift):
    """The same after many bits of weights were flipped at once."""

    flips: Whole = field("flipped bits, each in another weight", "count")


class WorstShift(Shift):
    """The same under the fault with the largest DeltaLoss of the classifier's own campaign."""

    target: Literal["neuron", "weight", "metadata"] = field("what is damaged: neuron, weight or metadata")
    layer: Name = field("where; its name in the network")
    neuron: Whole = field("place in the layer's output, or in its weights")
    bit: int = field("0 is the lowest", ge=0, lt=64)
    golden_value: Number = field("the value before", "unit of the layer")
    faulty_value: Number = field("the value after", "unit of the layer")


class Cam(Stored):
    """Ablation-CAM maps for the true class, with faults against without. A kind of faults that was not tried is absent."""

    layer: Name = field("where the maps are taken; its name in the network")
    places: int = field("of a map, rows times columns", "count", ge=1, lt=2**31)
    images: int = field("test images, drawn at random", "count", ge=1)
    detector: Name = field("the range detector")
    confidence: Annotated[float, Field(ge=0.5, le=0.9999)] = field(
        f"of the intervals; {CONFIDENCE} where it is absent", default=CONFIDENCE
    )
    weights: WeightShift | None = field("under flipped weight bits", default=None)
    worst: WorstShift | None = field("under the worst single fault", default=None)

    @model_validator(mode="after")
    def _parts_agree(self) -> "Cam":
        if math.isqrt(self.places) ** 2 != self.places:
            raise ValueError(f"places is {self.places}, which no square map has")
        for name, shift in (("weights", self.weights), ("worst", self.worst)):
            if shift and shift.finite > self.images:
                raise ValueError(f"{name}.finite is {shift.finite}, and there are {self.images} images")
        return self


class NoCam(Stored):
    """Instead of maps, for a network without any, or a grid that asks for none."""

    skipped: Name = field("why there is no map")


def _which(cam: Any) -> str:
    return "no map" if isinstance(cam, NoCam) or (isinstance(cam, dict) and "skipped" in cam) else "maps"


class CloseUp(Stored):
    """One classifier under faults, looked at closely."""

    last_layer: LastLayerValues = field("values of the last layer")
    cam: Annotated[Annotated[Cam, Tag("maps")] | Annotated[NoCam, Tag("no map")], Discriminator(_which)] = field(
        "where the classifier looks"
    )
