"""What stage `closeup` sees of a classifier under faults."""

from typing import Annotated, Any

from pydantic import Discriminator, Tag

from textguard.estimates.statistics import CONFIDENCE
from textguard.schema.base import Measured, Number, Stored, field


class LastLayerValues(Stored):
    """How large the values of the last layer are, without faults and after one flip of a bit, range detector off."""

    layer: str = field("the last layer's name in the network")
    profiled: float = field("its largest magnitude over the training images", "unit of the layer")
    images: int = field("test images", "count")
    powers: list[int] = field("powers of ten at which the intervals of magnitudes begin; the first and last take all beyond")
    golden: list[float] = field("values without faults in each interval", "share")
    faulty: list[float] = field("values after a flip in each interval, every bit as likely", "share")
    beyond: float = field("finite values after a flip that are larger than `profiled`", "share")
    not_finite: float = field("NaN and infinite values after a flip", "share")


class Shift(Stored):
    """How far maps move under faults. Maps that are not finite count 0; intervals are over images."""

    finite: int = field("images whose map and logits stay finite", "count")
    rank_correlation: Measured = field("Spearman's, of the map with and without faults, mean over images")
    overlap: Measured = field("of the quarters of places that speak most for the class: intersection over union", "share")
    changed: Measured = field("images with another class or with logits or a map that are not finite", "share")


class WeightShift(Shift):
    """The same after many bits of weights were flipped at once."""

    flips: int = field("flipped bits, each in another weight", "count")


class WorstShift(Shift):
    """The same under the fault with the largest DeltaLoss of the classifier's own campaign."""

    target: str = field("what is damaged: neuron, weight or metadata")
    layer: str = field("where; its name in the network")
    neuron: int = field("place in the layer's output, or in its weights")
    bit: int = field("0 is the lowest")
    golden_value: Number = field("the value before", "unit of the layer")
    faulty_value: Number = field("the value after", "unit of the layer")


class Cam(Stored):
    """Ablation-CAM maps for the true class, with faults against without. A kind of faults that was not tried is absent."""

    layer: str = field("where the maps are taken; its name in the network")
    places: int = field("of a map, rows times columns", "count")
    images: int = field("test images, drawn at random", "count")
    detector: str = field("the range detector")
    confidence: float = field(f"of the intervals; {CONFIDENCE} where it is absent", default=CONFIDENCE)
    weights: WeightShift | None = field("under flipped weight bits", default=None)
    worst: WorstShift | None = field("under the worst single fault", default=None)


class NoCam(Stored):
    """Instead of maps, for a network without any."""

    skipped: str = field("why there is no map")


def _which(cam: Any) -> str:
    return "no map" if isinstance(cam, NoCam) or (isinstance(cam, dict) and "skipped" in cam) else "maps"


class CloseUp(Stored):
    """One classifier under faults, looked at closely."""

    last_layer: LastLayerValues = field("values of the last layer")
    cam: Annotated[Annotated[Cam, Tag("maps")] | Annotated[NoCam, Tag("no map")], Discriminator(_which)] = field(
        "where the classifier looks"
    )
