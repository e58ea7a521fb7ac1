"""What stage `inject` says of a campaign, beside the records of its injections."""

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from textguard.schema.base import Name, Stored, Whole, field

Method = Literal["sampled", "exact"]
UNWANTED = "is not among the wanted kinds of sites"  # as textguard.faults.sites has it
Counts = list[Annotated[float, Field(ge=0)]]

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
    return settings | {"faults": fault_fields(settings["faults"])}


def campaign_fields(inject: Any) -> dict[str, Any]:
    """Section `inject`, a dataclass, as campaigns store it and as their fingerprints know it; see `fault_fields`."""
    return asdict(inject) | {"faults": fault_fields(asdict(inject.faults))}


def fault_fields(faults: Any) -> Any:
    """Section `inject.faults` without what its pattern does not read: of pattern `value`, as before there were patterns.

    Nor is it said that a campaign's faults last for one inference, as all do.
    """
    unread = {"value": ("pattern", "block", "damage"), "adjacent": ("block", "damage"), "block": ()}
    if not isinstance(faults, dict):  # of a file that somebody else wrote
        return faults
    left_out = {"lasts", *unread.get(str(faults.get("pattern", "value")), ("block",))}
    return {name: value for name, value in faults.items() if name not in left_out}


Settings = Annotated[dict[str, Any], AfterValidator(_complete)]


class Site(Stored):
    """A layer into which faults were injected."""

    layer: Name = field("its name in the network")
    kind: Name = field("the operation: Conv2d, Linear, MatMul, ...")
    neurons: Annotated[Whole, Field(ge=1)] = field("values that it puts out", "per image")
    multiply_adds: Whole | None = field("its multiply-adds; null where they are not known", "per image")


class EnumeratedLayer(Stored):
    """What all single-bit faults of a layer did on all eligible images. The lists have one entry per bit, lowest first."""

    layer: Name = field("its name in the network")
    neurons: Annotated[Whole, Field(ge=1)] = field("values that it puts out", "per image")
    faults: Counts = field("all faults", "count")
    masked: Counts = field("those that left no trace in the logits", "count")
    detected: Counts = field("those that the range detector saw", "count")
    mismatches: Counts = field("those that changed the class, with a finite loss", "count")
    nonfinite: Counts = field("those with a NaN or infinite loss", "count")
    delta_loss: Counts = field("sum of DeltaLoss over finite losses", "nats")

    @model_validator(mode="after")
    def _parts_of_the_faults(self) -> "EnumeratedLayer":
        parts = {name: getattr(self, name) for name in ("masked", "detected", "mismatches", "nonfinite")}
        if {len(part) for part in (*parts.values(), self.delta_loss)} != {len(self.faults)}:
            raise ValueError("its lists must have one entry per bit each")
        parts["mismatches and nonfinite"] = [sum(pair) for pair in zip(self.mismatches, self.nonfinite, strict=True)]
        for name, part in parts.items():
            if any(number > most or number % 1 for number, most in zip(part, self.faults, strict=True)):
                raise ValueError(f"{name} must be whole numbers, none above that of the bit's faults")
        return self


class Rescaled(Stored):
    """What all single-bit faults of the last layer do where its logits are scaled, which changes no fault-free prediction."""

    factor: float = field("the logits are this many times the layer's outputs")
    temperatures: Counts = field("further factors of the logits, behind the range detector, ascending; 1 is among them")
    delta_loss: Counts = field(
        "with each of them: sum of DeltaLoss over losses that are finite without it, as SDC and mismatch stay what they are",
        "nats",
    )
    folded: EnumeratedLayer | None = field(
        "the same faults with `factor` in the layer's weights, as in deployment; absent where it is 1", default=None
    )

    @model_validator(mode="after")
    def _is_a_curve(self) -> "Rescaled":
        if len(self.temperatures) != len(self.delta_loss):
            raise ValueError("temperatures and delta_loss must be as many")
        ascends = all(low < high for low, high in itertools.pairwise([0.0, *self.temperatures]))
        if not ascends or 1 not in self.temperatures:
            raise ValueError("temperatures must be above 0 and ascend, and hold 1")
        return self


class StoredCampaign(Stored):
    """One classifier's campaign: what was injected, how, and what is known exactly."""

    layers: list[Site] = field("the layers, in order of execution", min_length=1)
    bits: int = field("bits of a value in the number format", ge=1, le=64)
    strata: Whole = field("how many bits of a value the plan drew by; 0 where it drew bits at random")
    eligible_images: int = field("test images that are predicted right without faults", "count", ge=1)
    detectors: list[Name] = field("range detectors, the one that counts first", min_length=1)
    exact: dict[Name, list[EnumeratedLayer]] = field("by detector: the layers all of whose faults were tried")
    rescaled: dict[Name, Rescaled] = field(
        "by detector: the last layer with other logits; empty where it was sampled or has no closed form", default_factory=dict
    )
    skipped: dict[Name, Name] = field("by layer: why it takes no faults")
    settings: Settings = field(
        "params.yaml's section `inject`; `fold_scale` of its section `head`; `inputs`, a fingerprint of all that went in; "
        "`device`, on which it ran; `ran_by`, the engine that ran"
    )

    @model_validator(mode="after")
    def _parts_agree(self) -> "StoredCampaign":
        neurons = {site.layer: site.neurons for site in self.layers}
        for name, held in (("layers", [site.layer for site in self.layers]), ("detectors", self.detectors)):
            if twice := [one for one, count in Counter(held).items() if count > 1]:
                raise ValueError(f"{name} holds {twice[0]!r} twice")
        if self.strata not in (0, self.bits):
            raise ValueError(f"strata is {self.strata}, neither 0 nor bits, {self.bits}")
        if missing := [name for name in self.detectors if name not in self.exact]:
            raise ValueError(f"exact lacks the detector {missing[0]!r}")
        if list(self.exact) != self.detectors:
            raise ValueError(f"exact has other detectors, {', '.join(self.exact)}, than {', '.join(self.detectors)}")
        if self.settings["detector"] != self.detectors[0]:
            raise ValueError(f"settings.detector is {self.settings['detector']!r}, and not the first of detectors")
        first = [layer.layer for layer in self.exact[self.detectors[0]]]
        for name, layers in self.exact.items():
            if [layer.layer for layer in layers] != first or len(set(first)) < len(first):
                raise ValueError(f"exact.{name} must have each enumerated layer once, as the other detectors have them")
            for layer in layers:
                self._check_layer(f"exact.{name}", layer, neurons)
        if self.rescaled and (list(self.rescaled) != self.detectors or first[-1:] != [self.layers[-1].layer]):
            raise ValueError("rescaled must have every detector, and the last layer must be in exact")
        for name, rescaled in self.rescaled.items():
            known, at_one = self.exact[name][-1], rescaled.delta_loss[rescaled.temperatures.index(1)]
            # Where faults do little, the sum under exact is one of roundings, up to some 1e-6 nats for a fault.
            if not math.isclose(at_one, sum(known.delta_loss), rel_tol=1e-3, abs_tol=1e-5 * sum(known.faults)):
                raise ValueError(f"rescaled.{name} has another DeltaLoss at temperature 1 than exact.{name}")
            if rescaled.folded:
                self._check_layer(f"rescaled.{name}.folded", rescaled.folded, {known.layer: known.neurons})
        return self

    def _check_layer(self, place: str, layer: EnumeratedLayer, neurons: Mapping[str, int]) -> None:
        if neurons.get(layer.layer) != layer.neurons:
            raise ValueError(f"{place} has a layer {layer.layer!r} of {layer.neurons} neurons; layers has none")
        if layer.faults != [layer.neurons * self.eligible_images] * self.bits:
            raise ValueError(f"{place} has another number of faults in {layer.layer!r} than one per neuron, image and bit")

    @property
    def sampled(self) -> dict[str, int]:
        """Layer -> its neurons, for the layers into which faults were drawn, in order of execution."""
        enumerated = {layer.layer for layer in self.exact[self.detectors[0]]}
        return {site.layer: site.neurons for site in self.layers if site.layer not in enumerated}


def skip_reasons(skipped: Iterable[tuple[str, str]]) -> list[str]:
    """Why operations take no faults, each reason once with who has it; the kinds that nobody asked for together.

    Examples
    --------
    >>> skip_reasons([("bn1", f"BatchNorm {UNWANTED}"), ("head", "it is scripted"), ("tail", "it is scripted")])
    ['kinds that were not asked for: BatchNorm', '2 as head: it is scripted']
    """
    groups: dict[str, list[str]] = {}
    kinds: dict[str, None] = {}
    for name, reason in skipped:
        if reason.endswith(UNWANTED):
            kinds[reason.removesuffix(UNWANTED).split()[-1]] = None
        else:
            groups.setdefault(reason, []).append(name)
    told = [f"kinds that were not asked for: {', '.join(kinds)}"] if kinds else []
    for reason, names in sorted(groups.items(), key=lambda group: -len(group[1])):
        told.append(f"{len(names)} as {names[0]}: {reason}" if len(names) > 1 else f"{names[0]}: {reason}")
    return told
