"""What stage `inject` says of a campaign, beside the records of its injections."""

from typing import Annotated, Any

from pydantic import AfterValidator, model_validator

from textguard.schema.base import Stored, field

# The settings that decide which faults a campaign draws.
PLAN_KEYS = (
    "seed",
    "plan",
    "images",
    "injections_per_layer",
    "pilot",
    "stop_at",
    "faults",
    "format",
    "kinds",
    "enumerate_up_to",
)


def _complete(settings: dict[str, Any]) -> dict[str, Any]:
    missing = [name for name in (*PLAN_KEYS, "detector", "inputs", "device") if name not in settings]
    if missing:
        raise ValueError(f"{missing[0]} is missing")
    return settings


Settings = Annotated[dict[str, Any], AfterValidator(_complete)]


class Site(Stored):
    """A layer into which faults were injected."""

    layer: str = field("its name in the network")
    kind: str = field("the operation: Conv2d, Linear, MatMul, ...")
    neurons: int = field("values that it puts out", "per image")
    multiply_adds: int | None = field("its multiply-adds; null where they are not known", "per image")


class EnumeratedLayer(Stored):
    """What all single-bit faults of a layer did on all eligible images. The lists have one entry per bit, lowest first."""

    layer: str = field("its name in the network")
    neurons: int = field("values that it puts out", "per image")
    faults: list[float] = field("all faults", "count")
    masked: list[float] = field("those that left no trace in the logits", "count")
    detected: list[float] = field("those that the range detector saw", "count")
    mismatches: list[float] = field("those that changed the class, with a finite loss", "count")
    nonfinite: list[float] = field("those with a NaN or infinite loss", "count")
    delta_loss: list[float] = field("sum of DeltaLoss over finite losses", "nats")


class StoredCampaign(Stored):
    """One classifier's campaign: what was injected, how, and what is known exactly."""

    layers: list[Site] = field("the layers, in order of execution", min_length=1)
    bits: int = field("bits of a value in the number format", ge=1)
    strata: int = field("how many bits of a value the plan drew by; 0 where it drew bits at random")
    eligible_images: int = field("test images that are predicted right without faults", "count")
    detectors: list[str] = field("range detectors, the one that counts first", min_length=1)
    exact: dict[str, list[EnumeratedLayer]] = field("by detector: the layers all of whose faults were tried")
    skipped: dict[str, str] = field("by layer: why it takes no faults")
    settings: Settings = field(
        "params.yaml's section `inject`; `inputs`, a fingerprint of all that went in; `device`, on which it ran"
    )

    @model_validator(mode="after")
    def _every_detector_has_its_exact_layers(self) -> "StoredCampaign":
        missing = [name for name in self.detectors if name not in self.exact]
        if missing:
            raise ValueError(f"exact lacks the detector {missing[0]!r}")
        return self
