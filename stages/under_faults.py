"""What one classifier does under the faults of section `hardware`."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from torch.utils.data import DataLoader

from stages.loading import LoadedRun, load_run
from stages.settings import campaign_settings, protected
from textguard.artifacts import fingerprint, work_dir
from textguard.errors import InvalidParameter, UnsupportedModel
from textguard.estimates.statistics import Estimate, mean_interval, paired_difference, rate_interval
from textguard.estimates.summary import LayerResult, mean_over_layers, summarise
from textguard.faults import Campaign, FaultModel
from textguard.faults.execution import no_records, run_campaign
from textguard.faults.formats import Format
from textguard.faults.patterns import regions_of
from textguard.faults.plans import count_targets, draw_plan
from textguard.faults.profiling import largest_outputs
from textguard.faults.sites import Site
from textguard.hardware.costs import bounding_operations
from textguard.hardware.crossed import summarise_persistent
from textguard.hardware.persistent import run_persistent
from textguard.hardware.rates import RateCurve, error_rates
from textguard.hardware.stored import PERSISTENT_COLUMNS, draw_persistent, stored_tensors
from textguard.params import FaultParams, Params
from textguard.schema.results import MEASURES
from textguard.vision.folding import fold_scale
from textguard.vision.transforms import image_loader

FOREVER = "forever"
OFF = "off"  # the range detector
BOUND_BITS = 32
MITIGATION = "mitigation-"  # before its name, in records
BATCH = 64  # images, of those that faults which stay are seen on
LOSING = (1.0, 5.0, 10.0)  # points of top-1


def look(params: Params, key: str) -> tuple[dict[str, Any], pd.DataFrame]:
    """What metrics/hardware has of a run, and the records of faults that last for one inference. Raises InvalidArtifact."""
    run, hardware = load_run(params, key), params.hardware
    learned = ["thresholds"] if params.learns_thresholds else []
    inputs = run.checksums(["model", "data", "ranges", "bounds", *learned])
    mark = fingerprint(hardware=hardware, inject=params.inject, head=params.head, statistics=params.statistics, **inputs)
    with work_dir("hardware", key, mark) as work:
        found = Injected(run, params, work)
        models = [found.under(name, faults) for name, faults in hardware.models.items()]
        mitigations = found.mitigated() if hardware.mitigations else []
        curves = [found.curve(protection) for protection in hardware.protections if hardware.rates]
    records = [no_records().assign(faults=""), *found.records]
    images = min(hardware.images or len(run.view), len(run.view))
    return {"images": images, "models": models, "mitigations": mitigations, "curves": curves}, pd.concat(
        records, ignore_index=True
    )


class Injected:
    """One classifier, and what faults did to it so far. records: those of faults that last for one inference."""

    def __init__(self, run: LoadedRun, params: Params, work: Path) -> None:
        self._run, self._params, self._work = run, params, work
        self._plain = fold_scale(run.model) if params.head.fold_scale else run.model
        self._model = protected(run, self._plain, params.inject.mitigation)
        self._loader = image_loader(run.view, params.inject.batch_size)
        self._campaigns: dict[str, Campaign] = {}
        self.records: list[pd.DataFrame] = []

    def under(self, name: str, faults: FaultParams) -> dict[str, Any]:
        """What faults of one kind do, as metrics/hardware has it."""
        try:
            found = self._lasting(name, faults) if faults.lasts == FOREVER else self._passing(name, faults)
        except InvalidParameter as error:
            raise InvalidParameter(f"params.yaml hardware.models.{name}: {error}") from error
        return {"name": name, "faults": asdict(faults), **found}

    def _passing(self, name: str, faults: FaultParams) -> dict[str, Any]:
        """Faults that last for one inference. All layers are hit on the same images, which saves golden runs.

        Layers that such faults do not fit in, as 16 neurons in 10, are left out: `places` is the number of the others.
        """
        campaign, inject, count = self._campaign(faults.target), self._params.inject, self._params.hardware.injections_per_layer
        model, engine, seed = FaultModel(**asdict(faults)), campaign.engine, self._params.hardware.seed
        sites = [site for site in engine.sites if _fits(site, model, engine.number_format)]
        if not sites:
            raise InvalidParameter("no layer has such values or regions; take another pattern, or fewer values")
        plan = draw_plan(sites, campaign.chances, count, seed, model, engine.number_format, share_images=True)
        return self._replayed(name, campaign, plan, model, sites, inject.detector)

    def _replayed(
        self, name: str, campaign: Campaign, plan: pd.DataFrame, model: FaultModel, sites: Sequence[Site], detector: str
    ) -> dict[str, Any]:
        """What the faults of a plan do, as many in each of its layers. Their records are kept under that name."""
        records = run_campaign(
            campaign.engine,
            self._loader,
            plan,
            campaign.limits[detector],
            image_batch=self._params.inject.image_batch,
            fault_model=model,
            shard_dir=self._work / name,
            label=self._label(name),
        )
        self.records.append(records.assign(faults=name))
        neurons = {site.layer: site.neurons for site in sites}
        layers = list(summarise(records, neurons, nonfinite=self._params.statistics.nonfinite, shared=True).values())
        values = [count_targets(site, model, campaign.engine.number_format) for site in sites]
        means = {"overall": self._headline(layers), "by_values": self._headline(layers, values)}
        return {"injections": self._params.hardware.injections_per_layer * len(layers), "places": len(layers), **means}

    def mitigated(self) -> list[dict[str, Any]]:
        """What each mitigation costs and buys, as metrics/hardware has it; the first is none.

        All meet the same faults, those of section inject, and no range detector, whose place a mitigation takes. The plan is
        drawn for the classifier without a mitigation.
        """
        inject, hardware, usual = self._params.inject, self._params.hardware, "none"
        model = FaultModel(**asdict(inject.faults))
        asked = replace(inject, detector=OFF, compare_detectors=[], plan="uniform", images="shared", stop_at="never")
        stored = sum(
            tensor.values * tensor.stored_as(inject.format).bits for tensor in stored_tensors(self._plain, self._run.image)
        )
        found, plan, correct = [], pd.DataFrame(), np.zeros(0)
        for mitigation in (usual, *hardware.mitigations):
            with of_section_hardware():
                model_under = protected(self._run, self._plain, mitigation)
            campaign = Campaign(model_under, self._loader, campaign_settings(asked), largest_outputs(self._run.ranges))
            right, sites = campaign.fault_free.correct.astype(float), campaign.engine.sites
            if mitigation == usual:
                correct, number_format = right, campaign.engine.number_format
                plan = draw_plan(
                    *(sites, campaign.chances, hardware.injections_per_layer, hardware.seed, model, number_format),
                    share_images=True,
                )
            comparisons, bounds = bounding_operations(model_under, self._run.image[None])
            changes = top1_change(right, correct, self._params.statistics.confidence)
            found.append(
                {
                    **{"mitigation": mitigation, "comparisons": float(comparisons), "bits": 1 + BOUND_BITS * bounds / stored},
                    "top1_change": changes.as_json(),
                    **self._replayed(f"{MITIGATION}{mitigation}", campaign, plan, model, sites, OFF),
                }
            )
        return found

    def _campaign(self, target: str) -> Campaign:
        """The campaign whose engine and eligible images serve all faults that hit the same."""
        if target not in self._campaigns:
            inject = self._params.inject
            usual = replace(inject.faults, target=target, operation="flip", bits=1, values=1)
            settings = campaign_settings(replace(inject, faults=usual, plan="uniform", images="shared", stop_at="never"))
            self._campaigns[target] = Campaign(self._model, self._loader, settings, largest_outputs(self._run.ranges))
        return self._campaigns[target]

    def _headline(self, layers: Sequence[LayerResult], weights: Sequence[float] | None = None) -> dict[str, Any]:
        """Means over layers."""
        found = {}
        for measure in MEASURES:
            interval = mean_interval if measure == "delta_loss" else rate_interval
            found[measure] = interval(mean_over_layers(layers, measure, weights), self._params.statistics.confidence).as_json()
        return found

    def _lasting(self, name: str, faults: FaultParams) -> dict[str, Any]:
        """Faults that stay: in any stored parameter, or at a neuron."""
        hardware, inject = self._params.hardware, self._params.inject
        options: dict[str, Any] = {"target": "stored"}
        if faults.target == "weight":
            tensors = stored_tensors(self._model, self._run.image)
            plan = draw_persistent(tensors, hardware.faults_per_place, hardware.seed, inject.format, faults.bits)
        else:
            engine, model = self._campaign("neuron").engine, FaultModel(**asdict(faults))
            options = {"target": "neuron", "profiled": largest_outputs(self._run.ranges), "kinds": inject.kinds}
            chances = np.ones(len(self._run.view))
            plan = draw_plan(engine.sites, chances, hardware.faults_per_place, hardware.seed, model, engine.number_format)
        result = run_persistent(
            self._model,
            self._few,
            plan[PERSISTENT_COLUMNS],
            operation=faults.operation,
            number_format=inject.format,
            detector=inject.detector,
            engine="whole" if inject.engine == "whole" else "replay",
            batch_size=inject.batch_size,
            image_batch=inject.image_batch,
            shard_dir=self._work / name,
            label=self._label(name),
            **options,
        )
        found = summarise_persistent(result, self._params.statistics.confidence)
        lost = {"accuracy": "accuracy_lost", "critical": "critical", "harmless": "masked"}
        return {
            "injections": found.faults,
            "places": len(found.tensors),
            **{name: _headline_of(means) for name, means in (("overall", found.mean), ("by_values", found.weighted))},
            "lost": {name: found.mean[quantity].as_json() for name, quantity in lost.items()},
        }

    @cached_property
    def _few(self) -> DataLoader:
        """The images that faults which stay are seen on: evenly spread over the test set."""
        count, most = len(self._run.view), self._params.hardware.images
        if not 0 < most < count:
            return self._loader  # all of them
        batches = np.array_split(np.arange(most) * count // most, range(BATCH, most, BATCH))
        return image_loader(self._run.view, batches=[part.tolist() for part in batches])

    def curve(self, protection: str) -> dict[str, Any]:
        """Accuracy against the bit error rate of the parameters' memory, as metrics/hardware has it."""
        hardware, inject = self._params.hardware, self._params.inject
        found = error_rates(
            self._model,
            self._few,
            hardware.rates,
            memories=hardware.memories,
            number_format=inject.format,
            protection=protection,
            seed=hardware.seed,
            batch_size=inject.batch_size,
            confidence=self._params.statistics.confidence,
            shard_dir=self._work / f"rates-{protection}",
            label=self._label(f"rates, {protection}"),
        )
        settings = found.settings
        losing = [points for points in LOSING if points < 100 * settings["golden_top1"]]
        return {
            "protection": protection,
            "bits": settings["stored_bits"] / settings["data_bits"],
            "gates": settings["gates"],
            "points": [_point(found, rate) for rate in found.rates],
            "losing": [{"points": points, "rate": found.losing(points).as_json()} for points in losing],
        }

    def _label(self, what: str) -> str:
        return f"hardware {self._run.key}, {what}"


@contextmanager
def of_section_hardware() -> Iterator[None]:
    """A mitigation that a network cannot have is one of params.yaml hardware.mitigations: the error says so."""
    try:
        yield
    except UnsupportedModel as error:
        said = error.told(lambda setting: f"params.yaml hardware.{setting}s")
        raise UnsupportedModel(said.replace("set it to none", "leave it out")) from error


def top1_change(after: np.ndarray, before: np.ndarray, confidence: float) -> Estimate:
    """Points of top-1 that two ways to classify the same images differ by. after, before: which images are right, float [N].

    The interval is that of the images with two more, one of which is lost and one won: none may have changed that was seen.
    """
    seen = paired_difference(after, before, confidence)
    wider = paired_difference(np.append(after, [1.0, 0.0]), np.append(before, [0.0, 1.0]), confidence)
    return Estimate(100 * seen.value, max(-100.0, 100 * wider.low), min(100.0, 100 * wider.high), seen.n)


def _fits(site: Site, model: FaultModel, number_format: Format) -> bool:
    """Whether a layer has as many values, or a region of that shape."""
    if model.shaped:
        try:
            regions_of(site, model)
        except InvalidParameter:
            return False
    return count_targets(site, model, number_format) >= model.values


def _headline_of(means: Mapping[str, Estimate]) -> dict[str, Any]:
    """Of images that are predicted right without faults, as in campaigns; mismatches are not counted apart from SDCs."""
    nothing = Estimate(math.nan, math.nan, math.nan, 0)
    found = {"delta_loss": means.get("eligible_delta_loss", nothing), "sdc": means.get("sdc", nothing), "mismatch": nothing}
    return {measure: estimate.as_json() for measure, estimate in found.items()}


def _point(curve: RateCurve, rate: float) -> dict[str, Any]:
    memories = curve.memories[curve.memories["rate"] == rate]
    counts = memories[["flips", "corrected", "detected", "silent"]].astype(float).mean().to_dict()
    means = {
        name: curve.points[rate][of].as_json() for name, of in (("accuracy", "lost"), ("delta_loss",) * 2, ("changed",) * 2)
    }
    return {"rate": rate, "memories": len(memories), **counts, **means}
