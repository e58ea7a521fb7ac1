"""What an assessment found: one object with the table, every record, the plan, and what was left out."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pandas as pd

from textguard.errors import InvalidParameter, Setting
from textguard.estimates.statistics import Estimate, mean_interval, rate_estimate, rate_interval
from textguard.estimates.summary import LayerResult, Totals, mean_over_layers, summarise, summarise_totals
from textguard.faults.damage import FaultModel
from textguard.faults.formats import parse_format
from textguard.faults.plans import PLAN_COLUMNS, bits_of, count_targets
from textguard.faults.sites import Site

OVERALL = "overall"  # the last row of the table
MEASURES = ("delta_loss", "mismatch", "sdc")
COUNTS = ("injections", "masked", "detected", "nonfinite")
MOST_REASONS = 5  # in the line that says what is skipped
PER_MEGABIT = 1e-6  # of failures per 10^6 bits: per bit


@dataclass(frozen=True, eq=False)
class Assessment:
    """What faults do to a classifier, layer by layer, and all that this was computed from.

    Attributes
    ----------
    settings : dict of str to anything JSON holds
        The arguments of `assess` that decide on results; see `CampaignSettings`. `fault_model` is a dictionary too.
    sites : tuple of Site
        The operations into which faults were injected, in order of execution.
    skipped : tuple of (str, str)
        The operations and modules that take no faults, and why.
    modules : int
        How many modules of the model hold parameters of their own.
    engine : str
        The engine that ran: `replay`, `whole` or `pytorchfi`.
    reason : str
        Why the engine that was asked for did not run; empty where it did.
    records : pandas.DataFrame
        Every injection into a sampled layer, with RECORD_COLUMNS: one row per damaged bit.
    totals : tuple of Totals
        What all faults of each enumerated layer did.
    predictions : pandas.DataFrame
        The fault-free classifier on each image: image (position in the data set), label, prediction, correct, eligible, loss
        (nats), top2diff.
    classes : tuple of str
        The names of the classes.
    weights : str
        A fingerprint of all parameters and buffers, as metrics/runs/RUN/evaluation.json has it.
    parameters : int
        How many parameters there are, trained or not.
    ranges : dict of str to float
        Layer -> the largest magnitude of its fault-free outputs.
    limits : dict of str to float
        Layer -> the largest magnitude that the range detector lets pass; infinite without a detector.
    """

    settings: dict[str, Any]
    sites: tuple[Site, ...]
    skipped: tuple[tuple[str, str], ...]
    modules: int
    engine: str
    reason: str
    records: pd.DataFrame
    totals: tuple[Totals, ...]
    predictions: pd.DataFrame
    classes: tuple[str, ...]
    weights: str
    parameters: int
    ranges: dict[str, float]
    limits: dict[str, float]

    @property
    def fault_model(self) -> FaultModel:
        """What one injection damages."""
        return FaultModel(**self.settings["fault_model"])

    @property
    def bits(self) -> int:
        """Bits of a value that faults hit."""
        return bits_of(self.fault_model, parse_format(self.settings["number_format"]))

    @property
    def strata(self) -> int:
        """How many bits the plan drew by; 0 where it drew bits at random."""
        return self.bits if self.settings["plan"] in ("proportional", "neyman") else 0

    @property
    def confidence(self) -> float:
        """Of all intervals."""
        return self.settings["confidence"]

    @property
    def plan(self) -> pd.DataFrame:
        """The faults of the sampled layers, with PLAN_COLUMNS; `assess(plan=...)` takes it."""
        return self.records[PLAN_COLUMNS]

    @property
    def images(self) -> int:
        """How many images there are."""
        return len(self.predictions)

    @property
    def eligible(self) -> int:
        """How many images faults are injected on: those that are classified right without faults."""
        return int(self.predictions["eligible"].sum())

    @property
    def top1(self) -> Estimate:
        """Accuracy without faults."""
        return rate_estimate(int(self.predictions["correct"].sum()), self.images, self.confidence)

    @cached_property
    def layers(self) -> dict[str, LayerResult]:
        """Layer -> what its faults do, in order of execution."""
        neurons, exact = {site.layer: site.neurons for site in self.sites}, {layer.layer: layer for layer in self.totals}
        found = summarise(
            self.records,
            neurons,
            self.strata,
            guided=self.settings["plan"] == "guided",
            shared=self.settings["images"] == "shared",
        )
        found |= {name: summarise_totals(layer) for name, layer in exact.items()}
        return {layer: found[layer] for layer in neurons}

    @property
    def facts(self) -> str:
        """What was looked at, in a line: sites, what is skipped and why, eligible images, top-1, and the engine."""
        top1 = f"{self.top1.value:.2%}".replace("%", " %")
        parts = [
            f"{len(self.sites)} sites, {self.modules} modules with parameters",
            f"{len(self.skipped)} skipped{_grouped(self.skipped)}",
            f"{self.eligible:,} of {self.images:,} images eligible",
            f"top-1 {top1}",
            f"engine {self.engine}{f' ({self.reason})' if self.reason else ''}",
        ]
        return f"assess: {'; '.join(parts)}"

    def exposure(self, layer: str) -> int:
        """How many values of a layer faults can hit, for one image: its neurons, weights, or blocks with metadata."""
        site = next(site for site in self.sites if site.layer == layer)
        return count_targets(site, self.fault_model, parse_format(self.settings["number_format"]))

    def mean(self, measure: str, by: str = "layers") -> Estimate:
        """The mean of a measure over all layers, with its interval.

        Parameters
        ----------
        measure : {"delta_loss", "mismatch", "sdc"}
            In nats, or a share.
        by : {"layers", "neurons"}, default "layers"
            Whether all layers count the same, as in the paper, or by what faults can hit in them, as in FIT.

        Raises
        ------
        InvalidParameter
            There is no such measure, or no such way.
        """
        for name, value, known in (("measure", measure, MEASURES), ("by", by, ("layers", "neurons"))):
            if value not in known:
                raise InvalidParameter(Setting(name), f" is {value!r:.60}; allowed: {', '.join(known)}")
        weights = [self.exposure(layer) for layer in self.layers] if by == "neurons" else None
        interval = mean_interval if measure == "delta_loss" else rate_interval
        return interval(mean_over_layers(list(self.layers.values()), measure, weights), self.confidence)

    @cached_property
    def table(self) -> pd.DataFrame:
        """One row per layer, in order of execution, and a last one, `overall`, with the plain means over layers.

        Columns: layer, kind, neurons, method (`sampled`, or `exact` where the layer was enumerated); injections, masked,
        detected, nonfinite (numbers of injections; under plan `guided`, which draws few faults that are masked, they say
        nothing of all faults); delta_loss (nats), mismatch and sdc (shares of all faults; see `LayerResult`), each with its
        interval in _low and _high. Where `fit_per_megabit` was given: fit, failures in 10^9 hours, of `overall` those of all
        layers together.
        """
        per_bit = self.settings["fit_per_megabit"]
        rows = []
        for site in self.sites:
            result = self.layers[site.layer]
            sdc = rate_interval(result.sdc, self.confidence)
            found = {
                "delta_loss": mean_interval(result.delta_loss, self.confidence),
                "mismatch": rate_interval(result.mismatch, self.confidence),
                "sdc": sdc,
            }
            if per_bit is not None:
                found["fit"] = sdc.times(self.exposure(site.layer) * self.bits * per_bit * PER_MEGABIT)
            head = {"layer": site.layer, "kind": site.kind, "neurons": site.neurons, "method": result.method}
            rows.append(head | {name: getattr(result, name) for name in COUNTS} | _columns(found))
        found = {measure: self.mean(measure) for measure in MEASURES}
        if per_bit is not None:
            values = sum(self.exposure(layer) for layer in self.layers)
            found["fit"] = self.mean("sdc", "neurons").times(values * self.bits * per_bit * PER_MEGABIT)
        methods = {row["method"] for row in rows}
        head = {
            "layer": OVERALL,
            "kind": "",
            "neurons": sum(row["neurons"] for row in rows),
            "method": methods.pop() if len(methods) == 1 else "mixed",
        }
        rows.append(head | {name: sum(row[name] for row in rows) for name in COUNTS} | _columns(found))
        return pd.DataFrame(rows)


def _grouped(skipped: tuple[tuple[str, str], ...]) -> str:
    """Why things are skipped: each reason with how many have it and the first of them."""
    groups: dict[str, list[str]] = {}
    for name, reason in skipped:
        groups.setdefault(reason, []).append(name)
    told = [
        f"{len(names)} as {names[0]}: {reason}" if len(names) > 1 else f"{names[0]}: {reason}"
        for reason, names in sorted(groups.items(), key=lambda group: -len(group[1]))
    ]
    more = [f"and {len(told) - MOST_REASONS} other reasons, see skipped"] if len(told) > MOST_REASONS else []
    return f" ({', '.join(told[:MOST_REASONS] + more)})" if told else ""


def _columns(estimates: dict[str, Estimate]) -> dict[str, float]:
    return {
        f"{name}{suffix}": getattr(estimate, field)
        for name, estimate in estimates.items()
        for suffix, field in (("", "value"), ("_low", "low"), ("_high", "high"))
    }
