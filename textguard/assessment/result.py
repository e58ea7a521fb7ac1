"""What an assessment found: one object with the table, every record, the plan, and what was left out."""

import os
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from textguard.errors import InvalidParameter, Setting
from textguard.estimates.channels import summarise_channels
from textguard.estimates.groups import ESTIMATES, balanced, summarise_groups
from textguard.estimates.statistics import Estimate, mean_interval, rate_estimate, rate_interval
from textguard.estimates.summary import LayerResult, Totals, mean_over_layers, summarise, summarise_totals
from textguard.faults.checks import checked_name, folder_path
from textguard.faults.damage import FaultModel
from textguard.faults.formats import parse_format
from textguard.faults.plans import PLAN_COLUMNS, bits_of, count_targets
from textguard.faults.sites import Site
from textguard.schema.campaign import skip_reasons

PARTS = ("channel", "bit", "class", "image")
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
    site_bits : dict of str to int
        Layer -> bits of a value that faults hit there, where that is not what `number_format` says.
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
    site_bits: dict[str, int] = field(default_factory=dict)

    @property
    def fault_model(self) -> FaultModel:
        """What one injection damages."""
        return FaultModel(**self.settings["fault_model"])

    @property
    def bits(self) -> int:
        """Bits of a value that faults hit, the most that a layer has."""
        return max(self.bits_at(site.layer) for site in self.sites)

    def bits_at(self, layer: str) -> int:
        """Bits of a value that faults hit in a layer."""
        return self.site_bits.get(layer) or bits_of(self.fault_model, parse_format(self.settings["number_format"]))

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
            f"{len(self.skipped)} skipped{f' ({found})' if (found := _some(skip_reasons(self.skipped))) else ''}",
            f"{self.eligible:,} of {self.images:,} images eligible",
            f"top-1 {top1}",
            f"engine {self.engine}{f' ({self.reason})' if self.reason else ''}",
        ]
        return f"assess: {'; '.join(parts)}"

    def exposure(self, layer: str) -> int:
        """How many values of a layer faults can hit, for one image: its neurons, weights, or blocks with metadata."""
        site = next(site for site in self.sites if site.layer == layer)
        return count_targets(site, self.fault_model, parse_format(self.settings["number_format"]))

    def exposed_bits(self, layer: str) -> int:
        """How many bits of a layer faults can hit, for one image: what FIT is proportional to."""
        return self.exposure(layer) * self.bits_at(layer)

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
        UnknownName
            There is no such measure, or no such way.
        """
        checked_name("measure", measure, MEASURES, Setting("measure"))
        checked_name("way to count layers", by, ("layers", "neurons"), Setting("by"))
        weights = [self.exposed_bits(layer) for layer in self.layers] if by == "neurons" else None
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
                found["fit"] = sdc.times(self.exposed_bits(site.layer) * per_bit * PER_MEGABIT)
            head = {"layer": site.layer, "kind": site.kind, "neurons": site.neurons, "method": result.method}
            rows.append(head | {name: getattr(result, name) for name in COUNTS} | _columns(found))
        found = {measure: self.mean(measure) for measure in MEASURES}
        if per_bit is not None:
            exposed = sum(self.exposed_bits(layer) for layer in self.layers)
            found["fit"] = self.mean("sdc", "neurons").times(exposed * per_bit * PER_MEGABIT)
        methods = {row["method"] for row in rows}
        head = {
            "layer": OVERALL,
            "kind": "",
            "neurons": sum(row["neurons"] for row in rows),
            "method": methods.pop() if len(methods) == 1 else "mixed",
        }
        rows.append(head | {name: sum(row[name] for row in rows) for name in COUNTS} | _columns(found))
        return pd.DataFrame(rows)

    def by(self, part: str, layer: str | None = None) -> pd.DataFrame:
        """What faults do in parts of one layer, or of all sampled layers together.

        Parameters
        ----------
        part : {"channel", "bit", "class", "image"}
            `channel` is the output's first dimension of three, as in convolutions, else its last one. Of several damaged bits,
            the first one counts. `class` is the image's own one.
        layer : str, optional
            The layer. Without it, all sampled layers count the same, but channels, which are told layer by layer.

        Returns
        -------
        pandas.DataFrame
            One row per part: its number (and of channels without `layer` the layer; of classes the name); injections;
            delta_loss (nats, over finite losses) and sdc (share), each with its interval in _low and _high. Limits are NaN
            where fewer than 8 injections hit the part. Of images, only those that were hit.

        Raises
        ------
        UnknownName
            There is no such part, or no such layer.
        InvalidParameter
            The layer was enumerated, and what its faults did is only known by bit; or faults hit other things than a neuron,
            which have no channel.

        Examples
        --------
        >>> import torch
        >>> from torch import nn
        >>> from torch.utils.data import DataLoader, TensorDataset
        >>> from textguard.assessment import assess
        >>> images = torch.rand(6, 1, 4, 4)
        >>> model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3)).eval()
        >>> found = assess(model, DataLoader(TensorDataset(images, model(images).argmax(dim=1))), injections_per_layer=20)
        >>> bits = found.by("bit", layer="0")
        >>> len(bits), int(bits["injections"].sum())
        (32, 20)
        """
        checked_name("part", part, PARTS, Setting("part"))
        if layer is not None:
            checked_name("layer", layer, list(self.layers), Setting("layer"))
        if exact := [found for found in self.totals if found.layer == layer]:
            if part != "bit":
                known = "only its bits are known; assess with enumerate_up_to=0"
                raise InvalidParameter(Setting("layer"), f": all faults of {layer!r} were tried, and {known}")
            return _exact_bits(exact[0])
        records = self.records if layer is None else self.records[self.records["layer"] == layer]
        injections = balanced(records.drop_duplicates(["layer", "index"]), self.strata, layers=part != "channel")
        if part == "channel":
            if (self.fault_model.target, self.fault_model.values, self.fault_model.shaped) != ("neuron", 1, False):
                raise InvalidParameter(Setting("part"), " is 'channel'; only faults in one neuron have one")
            shapes = {site.layer: site.shape for site in self.sites}
            found = summarise_channels(injections, shapes, self.confidence)
            return found if layer is None else found.drop(columns="layer")
        positions = self.predictions["image"].to_numpy()  # a sampler may have left others out
        labels = np.zeros(positions.max() + 1, dtype=np.int64)
        labels[positions] = self.predictions["label"]
        group, count = {
            "bit": (injections["bit"].to_numpy(), self.bits),
            "class": (labels[injections["image"]], len(self.classes)),
            "image": (injections["image"].to_numpy(), len(labels)),
        }[part]
        found = summarise_groups(
            injections,
            group,
            count,
            self._shares(part, count) if self.settings["plan"] == "guided" else None,
            self.settings["images"] == "shared",
            self.confidence,
        )
        found.insert(0, part, range(count))
        if part == "class":
            found.insert(1, "name", self.classes)
        return found[found["injections"] > 0].reset_index(drop=True) if part == "image" else found

    def _shares(self, part: str, count: int) -> np.ndarray:
        """The share of all faults that hit each part, float [count]."""
        if part == "bit":
            return np.full(count, 1 / count)
        eligible = self.predictions[self.predictions["eligible"]]
        return np.bincount(eligible["label" if part == "class" else "image"], minlength=count) / len(eligible)

    def save(self, folder: str | os.PathLike[str], overwrite: bool = False) -> None:
        """Write all of it to a folder: `assessment.json` (see docs/outputs.md), `records.parquet`, `predictions.parquet`.

        Until all is written, `load` finds nothing there. overwrite: whether another assessment that lies there is replaced.
        Raises InvalidParameter where there is one and it shall not; CannotWrite.
        """
        from textguard.assessment.storage import save

        save(self, folder_path(Setting("folder"), folder) or Path(), overwrite)

    def to_html(self, file: str | os.PathLike[str], other: "Assessment | None" = None, layer: str | None = None) -> None:
        """Write all of it as one page, alone or beside another assessment; see `textguard.assessment.page.write_page`.

        layer: whose channels are drawn.
        """
        from textguard.assessment.page import write_page

        write_page(self, file, other, layer=layer)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> "Assessment":
        """Read what `save` wrote. Raises InvalidArtifact where that is missing, damaged, or does not belong together.

        Examples
        --------
        >>> import tempfile
        >>> import torch
        >>> from torch import nn
        >>> from torch.utils.data import DataLoader, TensorDataset
        >>> from textguard.assessment import Assessment, assess
        >>> images = torch.rand(6, 1, 4, 4)
        >>> model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3)).eval()
        >>> found = assess(model, DataLoader(TensorDataset(images, model(images).argmax(dim=1))), injections_per_layer=20)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     found.save(folder)
        ...     Assessment.load(folder).table.equals(found.table)
        True
        """
        from textguard.assessment.storage import load

        return load(folder_path(Setting("folder"), folder) or Path())


def _exact_bits(totals: Totals) -> pd.DataFrame:
    """What all faults of a layer did, by bit."""
    finite = totals.faults - totals.nonfinite
    with np.errstate(invalid="ignore", divide="ignore"):
        values = {"delta_loss": totals.delta_loss / finite, "sdc": (totals.mismatches + totals.nonfinite) / totals.faults}
    columns = {name: values[name.removesuffix("_low").removesuffix("_high")] for name in ESTIMATES}
    return pd.DataFrame({"bit": range(len(finite)), "injections": totals.faults.astype(int), **columns})


def _some(reasons: list[str]) -> str:
    """The first reasons, and how many more there are."""
    more = [f"and {len(reasons) - MOST_REASONS} other reasons, see skipped"] if len(reasons) > MOST_REASONS else []
    return ", ".join(reasons[:MOST_REASONS] + more)


def _columns(estimates: dict[str, Estimate]) -> dict[str, float]:
    return {
        f"{name}{suffix}": getattr(estimate, part)
        for name, estimate in estimates.items()
        for suffix, part in (("", "value"), ("_low", "low"), ("_high", "high"))
    }
