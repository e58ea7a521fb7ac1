"""A campaign from its settings to what each layer is found to stand: sampled layers, enumerated ones, several detectors."""

import math
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from torch import Tensor, nn
from torch.utils.data import DataLoader

from textguard.artifacts import read_json, write_json
from textguard.errors import InvalidParameter, Setting
from textguard.estimates.statistics import CONFIDENCE
from textguard.estimates.summary import LayerResult, Totals, summarise, summarise_totals
from textguard.faults.checks import checked_name, confidence_level, folder_path, some_text, texts, whole_number
from textguard.faults.damage import SINGLE_FLIP, FaultModel, weight_limits
from textguard.faults.detectors import detector_limits
from textguard.faults.engines import Engine, make_engine
from textguard.faults.exact import affordable, enumerate_layer, has_closed_form, rescale_last_layer
from textguard.faults.execution import measure_pace, no_records
from textguard.faults.formats import Format, parse_format
from textguard.faults.golden import fake_quantised, look_at_golden_run
from textguard.faults.guided import draw_guided
from textguard.faults.inputs import count_images, positions, prepare
from textguard.faults.patterns import regions_of
from textguard.faults.plans import bits_at, draw_plan
from textguard.faults.profiling import IMAGES, FaultFree, largest_outputs, look, profile_ranges
from textguard.faults.sampling import PLANS, Design, rerun_changed, run_design
from textguard.faults.sites import DEFAULT_KINDS, INTEGERS, Site
from textguard.faults.task import CLASSES, Task, make_task

NOISE = ("refuse", "report")


@dataclass(frozen=True)
class CampaignSettings:
    """What a campaign injects, how many injections it makes, and how it carries them out.

    Parameters
    ----------
    injections_per_layer : int, default 1000
        Injections into each sampled layer, at most.
    seed : int, default 0
        Of the fault plan. The same seed gives corresponding layers of two models corresponding faults, unless it is guided.
    plan : {"uniform", "proportional", "neyman", "guided"}, default "uniform"
        Which injections are made; see `Design`.
    images : {"uniform", "importance", "shared"}, default "uniform"
        How images are drawn; see `image_chances`. `shared` hits all layers on the same ones, see `Design`. Plan `guided` has
        chances of its own, whether images are shared or not.
    pilot : int, default 128
        Injections into each layer before the rest is planned; see `Design`.
    stop_at : str, default "never"
        The half-width of a layer's DeltaLoss that ends it; see `Design`.
    confidence : float, default 0.99
        Of intervals, 0.5 to 0.9999.
    enumerate_up_to : int, default 0
        A fully connected layer at the end with no more faults than these is enumerated instead of sampled. Whatever the
        number, the last layer is enumerated where its faults have a closed form; only 0 samples all layers.
    detector : str, default "profiled"
        The range detector: `profiled` (each layer's largest profiled magnitude), `fixed:X` (X for every layer), or `off`.
    compare_detectors : sequence of str, default ()
        Other range detectors that the same faults are set against.
    number_format : str, default "fp32"
        How values are stored; see `parse_format`.
    fault_model : FaultModel, default one flipped bit of one neuron
        What one injection is.
    kinds : sequence of str, default ("Conv1d", "Conv2d", "Conv3d", "Linear")
        Operations whose outputs are fault sites.
    engine : {"replay", "whole", "pytorchfi"}, default "replay"
        Who carries the faults out; see `make_engine`.
    batch_size : int, default 256
        Faults per forward pass. It changes no result.
    image_batch : int, default 64
        Images per golden run, and per shard.
    noise : {"refuse", "report"}, default "refuse"
        What happens where images, or the logits of an image, are not the same each time: `refuse` raises. `report` says on
        stderr how large DeltaLoss is without any fault, and goes on; see `Campaign.golden`.

    Raises
    ------
    TextguardError
        A setting has the wrong type or is out of range, or there is no such plan or way to draw images.

    Examples
    --------
    >>> from textguard.faults import CampaignSettings
    >>> CampaignSettings(detector="off", compare_detectors=["profiled", "fixed:65536"]).detectors
    ['off', 'profiled', 'fixed:65536']
    """

    injections_per_layer: int = 1000
    seed: int = 0
    plan: str = "uniform"
    images: str = "uniform"
    pilot: int = 128
    stop_at: str = "never"
    confidence: float = CONFIDENCE
    enumerate_up_to: int = 0
    detector: str = "profiled"
    compare_detectors: Sequence[str] = ()
    number_format: str = "fp32"
    fault_model: FaultModel = SINGLE_FLIP
    kinds: Sequence[str] = DEFAULT_KINDS
    engine: str = "replay"
    batch_size: int = 256
    image_batch: int = 64
    noise: str = "refuse"

    def __post_init__(self) -> None:
        least = {"injections_per_layer": 1, "seed": 0, "pilot": 1, "enumerate_up_to": 0, "batch_size": 1, "image_batch": 1}
        checked: dict[str, Any] = {name: whole_number(Setting(name), getattr(self, name), low) for name, low in least.items()}
        checked["confidence"] = confidence_level(Setting("confidence"), self.confidence)
        checked_name("plan", self.plan, PLANS, Setting("plan"))
        checked_name("way to draw images", self.images, IMAGES, Setting("images"))
        checked_name("noise", self.noise, NOISE, Setting("noise"))
        for name in ("stop_at", "detector", "number_format", "engine"):
            some_text(Setting(name), getattr(self, name))
        for name in ("compare_detectors", "kinds"):
            texts(Setting(name), getattr(self, name))
        if not isinstance(self.fault_model, FaultModel):
            raise InvalidParameter(Setting("fault_model"), f" is {self.fault_model!r:.60}; it must be a FaultModel")
        if self.fault_model.lasts != "inference":
            raise InvalidParameter(
                Setting("fault_model.lasts"),
                f" is {self.fault_model.lasts!r}, and a campaign's faults last for one inference; "
                "give those that stay to textguard.hardware.run_persistent",
            )
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    @property
    def stored_as(self) -> Format:
        """The number format. Raises UnknownName, InvalidParameter."""
        return parse_format(self.number_format)

    @property
    def design(self) -> Design:
        """How the campaign spreads its injections."""
        shared = self.images == "shared"
        return Design(self.plan, self.injections_per_layer, self.pilot, self.stop_at, self.confidence, self.seed, shared)

    @property
    def detectors(self) -> list[str]:
        """The campaign's own range detector, and behind it the others."""
        return [self.detector, *(name for name in self.compare_detectors if name != self.detector)]

    def make_engine(self, model: nn.Module, image: Tensor, profiled: Mapping[str, float]) -> Engine:
        """The engine for a model and one image [...]. profiled: layer -> largest magnitude. Raises as `make_engine` does."""
        return make_engine(
            self.engine,
            model,
            image,
            self.batch_size,
            kinds=self.kinds,
            number_format=self.stored_as,
            profiled=profiled,
            target=self.fault_model.target,
        )


@dataclass(frozen=True)
class CampaignResult:
    """What a campaign found.

    Attributes
    ----------
    records : pandas.DataFrame
        Every injection into a sampled layer under the campaign's own range detector, with RECORD_COLUMNS.
    changes : dict of str to pandas.DataFrame
        Compared detector -> the records that differ under it.
    totals : dict of str to list of Totals
        Detector -> what all faults of each enumerated layer did.
    layers : dict of str to LayerResult
        Layer -> its estimates under the campaign's own range detector, in order of execution.

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> from torch.utils.data import DataLoader, TensorDataset
    >>> from textguard.faults import Campaign, CampaignResult, CampaignSettings
    >>> model = nn.Linear(2, 2, bias=False)
    >>> model.weight.data = torch.eye(2)
    >>> loader = DataLoader(TensorDataset(torch.tensor([[1.0, 0.0], [3.0, 0.0]]), torch.tensor([0, 0])))
    >>> result = Campaign(model, loader, CampaignSettings(enumerate_up_to=1)).run()
    >>> isinstance(result, CampaignResult), len(result.records)
    (True, 0)
    >>> [int(totals.faults.sum()) for totals in result.totals["profiled"]]  # 2 images, 2 outputs, 32 bits
    [128]
    """

    records: pd.DataFrame
    changes: dict[str, pd.DataFrame]
    totals: dict[str, list[Totals]]
    layers: dict[str, LayerResult]


class Campaign:
    """A campaign on one classifier: its engine, range detectors, eligible images, and the layers to sample or enumerate.

    Parameters
    ----------
    model : torch.nn.Module
        From images [B, ...] to logits [B, C], on the device to use. It is copied, and stays as it is.
    loader : DataLoader
        Gives the images to inject on and their labels, from a map-style data set. Its order does not matter; images that its
        sampler leaves out are left out.
    settings : CampaignSettings
        What to inject, how often and how.
    profiled : mapping of str to float, optional
        Layer -> largest magnitude of its output in fault-free inferences. By default it is taken from the loader's images.
    task : Task or its name, default that of an ordinary classifier
        What batches and logits mean; see `make_task`.

    Attributes
    ----------
    task : Task
        The task.
    engine : Engine
        Its `sites` are the layers.
    limits : dict of str to dict of str to float
        Detector -> layer -> largest magnitude that it lets pass; infinite for integers that a quantised model stores.
    known : dict of str to float
        Layer -> the largest magnitude of its outputs, or weights, whatever faults hit.
    strata : int
        Strata of the sample: one for each bit, or 0 where bits are drawn uniformly.
    golden : Golden
        What a few fault-free inferences say of the model.
    remarks : list of str
        What is to be known when results are read, one line each; they are on stderr too.

    Raises
    ------
    TextguardError
        A setting is unknown, out of range, or does not fit the model; the first batch is not what the task needs; or the model
        is random, or mixes the images of a batch.

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> from torch.utils.data import DataLoader, TensorDataset
    >>> from textguard.faults import Campaign, CampaignSettings
    >>> _ = torch.manual_seed(0)
    >>> model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3))
    >>> images = torch.rand(6, 1, 4, 4)
    >>> loader = DataLoader(TensorDataset(images, model(images).argmax(dim=1)), batch_size=3)
    >>> campaign = Campaign(model, loader, CampaignSettings(injections_per_layer=20, enumerate_up_to=1))
    >>> result = campaign.run()
    >>> {name: (layer.method, layer.injections) for name, layer in result.layers.items()}
    {'0': ('sampled', 20), '3': ('exact', 576)}
    """

    def __init__(
        self,
        model: nn.Module,
        loader: DataLoader,
        settings: CampaignSettings,
        profiled: Mapping[str, float] | None = None,
        task: Task | str = CLASSES,
    ) -> None:
        self.loader, self.settings, self.number_format = loader, settings, settings.stored_as
        self.task = make_task(task)
        model, image = prepare(model, loader, self.task)
        if profiled is None:
            profiled = largest_outputs(profile_ranges(model, loader, settings.kinds, self.task))
        self.engine = settings.make_engine(model, image, profiled)
        known = weight_limits(model, self.engine.sites) if settings.fault_model.target == "weight" else profiled
        layers = [site.layer for site in self.engine.sites]
        # All stored integers are in the range that the model was quantised for.
        integers = [site.layer for site in self.engine.sites if {site.dtype, site.weight_dtype} & set(INTEGERS.values())]
        self.limits = {
            name: detector_limits(name, layers, known) | dict.fromkeys(integers, math.inf) for name in settings.detectors
        }
        self.known = known
        self._integers = len(integers)
        self.strata = settings.design.strata(settings.fault_model, self.engine)
        if settings.fault_model.shaped:
            for site in self.engine.sites:
                regions_of(site, settings.fault_model)  # or it says that there are none
        alone = settings.batch_size == settings.image_batch == (loader.batch_size or 1) == 1
        self.golden = look_at_golden_run(self.engine, loader, alone=alone, task=self.task)
        if settings.noise == "refuse":
            self.golden.refuse()
        self.remarks = self._remarks(model)
        for remark in self.remarks:
            print(remark, file=sys.stderr, flush=True)

    def _remarks(self, model: nn.Module) -> list[str]:
        found = [f"{problem}; without any fault, DeltaLoss is {self.golden.noise:.3g}" for problem in self.golden.problems]
        if self.golden.probabilities:
            found.append(
                "the model's logits are probabilities: all are from 0 to 1 and sum to 1, so DeltaLoss is that of a softmax of "
                'them; take task="probabilities", leave out the model\'s last softmax, or return x.log()'
            )
        if not self.engine.sees_masked:
            enumerates = " and enumerates no layer" if self.settings.enumerate_up_to else ""
            found.append(f"engine {self.engine.name!r} does not tell which faults are masked (none counts as such){enumerates}")
        if left := self.engine.unrounded:
            shown = ", ".join(f"{name} ({reason})" for name, reason in left[:4])
            found.append(f"not rounded to {self.number_format.name}: {shown}{f' and {len(left) - 4} more' if left[4:] else ''}")
        if self._integers:
            found.append(
                f"faults flip the 8 bits of stored integers in {self._integers} layers, which have no range detector: each "
                "integer is in the range that the model was quantised for"
            )
        if quantised := fake_quantised(model):
            found.append(
                f"{len(quantised)} modules only pretend to quantise, the first is {quantised[0]!r}: bits flip in the fp32 "
                "values that they get, not in stored integers"
            )
        return found

    @cached_property
    def fault_free(self) -> FaultFree:
        """What the fault-free model makes of the images. Raises InvalidParameter where none is eligible, with the reason."""
        found = look(self.engine, self.loader, self.task)
        found.refuse_none()
        return found

    @cached_property
    def chances(self) -> np.ndarray:
        """How likely each image is to be drawn, float64 [N]; see `image_chances`."""
        return self.fault_free.chances("guided" if self.settings.plan == "guided" else self.settings.images)

    @property
    def eligible(self) -> list[int]:
        """Positions of the images that faults are injected on."""
        return np.flatnonzero(self.chances).tolist()

    @cached_property
    def enumerated(self) -> list[Site]:
        """The layers of which every fault is tried."""
        settings = self.settings
        return affordable(self.engine, len(self.eligible), settings.fault_model, settings.enumerate_up_to, self.task)

    @property
    def sampled(self) -> list[Site]:
        """The layers into which faults are drawn."""
        return [site for site in self.engine.sites if site not in self.enumerated]

    def run(self, shard_dir: str | os.PathLike[str] | None = None, label: str = "inject") -> CampaignResult:
        """Sample, enumerate and summarise.

        shard_dir: a folder in which an interrupted campaign goes on, and which processes of `torchrun` need to share the
        injections. label: names the campaign in progress lines. Raises CampaignMismatch where shard_dir is another campaign's.
        """
        records, changes = self.sample_layers(folder_path(Setting("shard_dir"), shard_dir), label)
        # Totals are not kept in shard_dir: unlike shards, they do not tell whose they are.
        totals = self.enumerate_layers(label=label)
        return CampaignResult(records, changes, totals, self.summarise(records, totals[self.settings.detector]))

    def sample_layers(
        self, shard_dir: Path | None = None, label: str = "inject"
    ) -> tuple[pd.DataFrame, dict[str, pd.DataFrame]]:
        """The records of the sampled layers, and for each compared detector those that differ under it; see `run`."""
        first, *others = self.settings.detectors
        records, changes = no_records(), {name: no_records() for name in others}
        if not self.sampled:
            return records, changes
        settings = self.settings
        options = {"image_batch": settings.image_batch, "fault_model": settings.fault_model, "task": self.task}
        records = run_design(
            self.engine,
            self.sampled,
            self.loader,
            self.chances,
            self.limits[first],
            self.settings.design,
            shard_dir=shard_dir,
            label=label,
            guides=[self.limits[name] for name in others],
            **options,
        )
        for number, name in enumerate(others):
            changes[name] = rerun_changed(
                self.engine,
                self.loader,
                records,
                self.limits[name],
                shard_dir=shard_dir / f"detector-{number}" if shard_dir else None,
                label=f"{label}, detector {name}",
                **options,
            )
        return records, changes

    def enumerate_layers(self, folder: Path | None = None, label: str = "enumerate") -> dict[str, list[Totals]]:
        """Detector -> what all faults of each enumerated layer did.

        folder: where the totals of each layer and detector are kept, and taken from. It must be this campaign's own.
        """
        totals: dict[str, list[Totals]] = {}
        for number, name in enumerate(self.settings.detectors):
            files = [folder / f"exact-{number}-{site.position}.json" if folder else None for site in self.enumerated]
            totals[name] = [self._enumerate(site, name, file, label) for site, file in zip(self.enumerated, files, strict=True)]
        return totals

    def _enumerate(self, site: Site, detector: str, file: Path | None, label: str) -> Totals:
        if file and file.exists():
            return Totals.from_json(read_json(file, "inject"))
        limit, label = self.limits[detector][site.layer], f"{label}, detector {detector},"
        totals = Totals.from_json(
            enumerate_layer(self.engine, self.loader, self.eligible, site, limit, label, self.task).as_json()
        )  # so that a campaign that goes on from files gets the same types
        if file:
            write_json(file, totals.as_json())
        return totals

    def rescale_last_layer(self, folder: Path | None = None, label: str = "enumerate") -> dict[str, Any]:
        """Detector -> what all faults of the last layer do with its logits scaled, as metrics files hold it; see `Rescaled`.

        Empty where the last layer is sampled, or has no closed form. folder: as for `enumerate_layers`.
        """
        site = self.engine.sites[-1]
        if site not in self.enumerated or not self.task.has_softmax or not has_closed_form(self.engine, site):
            return {}
        file = folder / "rescaled.json" if folder else None
        if file and file.exists():
            return read_json(file, "inject")
        largest = {site.layer: self.known[site.layer] * abs(self.engine.factor_behind_last())}
        limits = {name: found[site.layer] for name, found in self.limits.items()}
        folded = {name: detector_limits(name, [site.layer], largest)[site.layer] for name in limits}
        found = rescale_last_layer(self.engine, self.loader, self.eligible, limits, folded, f"{label}, rescaled,")
        rescaled = {name: one.as_json() for name, one in found.items()}
        if file:
            write_json(file, rescaled)
        return rescaled

    def summarise(self, records: pd.DataFrame, totals: Sequence[Totals]) -> dict[str, LayerResult]:
        """Layer -> its estimates, in order of execution, from the records of sampled layers and the totals of the others."""
        neurons, guided = {site.layer: site.neurons for site in self.sampled}, self.settings.plan == "guided"
        results = summarise(records, neurons, self.strata, guided=guided, shared=self.settings.design.share_images)
        return results | {layer.layer: summarise_totals(layer) for layer in totals}

    def pace(self, injections_per_layer: int = 1, sites: Sequence[Site] | None = None, injections: int = 256) -> float:
        """Injections per second, roughly, drawing them included, measured on a few of them, whose outcomes are thrown away.

        Images need not be eligible. sites: all of the engine's by default. injections: how many are measured, at most.
        """
        chances, settings = np.zeros(count_images(self.loader)), self.settings
        chances[positions(self.loader)] = 1
        sites = self.engine.sites if sites is None else sites
        limits, start = self.limits[settings.detector], time.perf_counter()
        if settings.plan == "guided":
            counts = {site.layer: (0, injections_per_layer) for site in sites}
            guides = list(self.limits.values())
            plan = draw_guided(
                self.engine, sites, self.loader, chances, counts, settings.seed, settings.fault_model, guides, task=self.task
            )
        else:
            plan = draw_plan(sites, chances, injections_per_layer, settings.seed, settings.fault_model, self.number_format)
        drawing = (time.perf_counter() - start) / len(plan)
        options = {"injections": injections, "fault_model": settings.fault_model, "task": self.task}
        pace = measure_pace(self.engine, self.loader, plan, limits, **options)
        return 1 / (1 / pace + drawing)

    def as_json(self, totals: Mapping[str, Sequence[Totals]], rescaled: Mapping[str, Any]) -> dict[str, Any]:
        """What is to be known of the campaign beside its records: what `enumerate_layers` and `rescale_last_layer` return."""
        return {
            "layers": [
                {"layer": site.layer, "kind": site.kind, "neurons": site.neurons, "multiply_adds": site.multiply_adds}
                for site in self.engine.sites
            ],
            "bits": max(bits_at(site, self.settings.fault_model, self.number_format) for site in self.engine.sites),
            "strata": self.strata,
            "eligible_images": len(self.eligible),
            "detectors": self.settings.detectors,
            "exact": {name: [layer.as_json() for layer in found] for name, found in totals.items()},
            "rescaled": dict(rescaled),
            "skipped": dict(self.engine.skipped),
        }
