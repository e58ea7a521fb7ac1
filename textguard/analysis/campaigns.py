"""One run's campaign, from the records of stage `inject` to estimates of each layer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from textguard.analysis.files import RECORDS_DIR, RUNS_DIR
from textguard.artifacts import reading
from textguard.errors import InvalidArtifact
from textguard.estimates.summary import LayerResult, Totals, replace_records, summarise, summarise_totals
from textguard.params import InjectParams, Run, StatisticsParams, TreatmentParams
from textguard.schema.base import read
from textguard.schema.campaign import StoredCampaign, campaign_fields
from textguard.schema.records import check_injections, inputs_of, read_columns
from textguard.schema.results import BASELINE

RECORDS = ["layer", "index", "bit", "weight", "detected", "masked", "golden_loss", "faulty_loss", "mismatch"]
READ = [*RECORDS, "image", "neuron", "faulty_value"]


@dataclass(frozen=True)
class CampaignRecords:
    """One run's faults. detectors: name -> its layers' results, in order of execution; the first is the one that counts.

    stored: campaign.json. records, totals: of the first detector, as `summarise` and `summarise_totals` take them. latent:
    whether the classifier has a latent layer before its head.
    """

    detectors: dict[str, list[LayerResult]]
    stored: StoredCampaign
    records: pd.DataFrame
    totals: list[Totals]
    latent: bool

    @property
    def layers(self) -> list[LayerResult]:
        """The results under the detector that counts."""
        return next(iter(self.detectors.values()))


def load_campaign(
    key: str, run: Run, statistics: StatisticsParams, inject: InjectParams, treatments: Mapping[str, TreatmentParams]
) -> CampaignRecords:
    """Read one run's campaign.json and records.

    treatments: those among the variants. Raises InvalidArtifact, InvalidParameter.
    """
    file, folder = RUNS_DIR / key / "campaign.json", RECORDS_DIR / key
    stored = read(file, "inject", StoredCampaign)
    with reading(file, "inject"):
        latent = treatments[run.variant].latent if run.variant in treatments else run.variant != BASELINE
        if len(stored.layers) < 1 + latent:
            raise InvalidArtifact("lacks layers")
        _check_settings(stored, inject)
        totals = {name: [Totals.from_json(layer.as_json()) for layer in stored.exact[name]] for name in stored.detectors}
    records, changed = _load_records(file, folder, stored, inject)
    detectors = {}
    for name, known in totals.items():
        under = replace_records(records, changed.loc[changed["detector"] == name, RECORDS])
        found = summarise(
            under, stored.sampled, stored.strata, statistics.nonfinite, inject.plan == "guided", inject.images == "shared"
        )
        found |= {layer.layer: summarise_totals(layer, statistics.nonfinite) for layer in known}
        detectors[name] = [found[site.layer] for site in stored.layers]
    return CampaignRecords(detectors, stored, records, next(iter(totals.values())), latent)


def _check_settings(stored: StoredCampaign, inject: InjectParams) -> None:
    wanted = campaign_fields(inject)
    for name, value in wanted.items():
        if stored.settings.get(name) != value:
            raise InvalidArtifact(f"is of a campaign with {name} {stored.settings.get(name)!r}; params.yaml has {value!r}")
    others = [name for name in inject.compare_detectors if name != inject.detector]
    if stored.detectors != [inject.detector, *others]:
        raise InvalidArtifact(f"has the detectors {', '.join(stored.detectors)}; params.yaml has others")


def _load_records(file: Path, folder: Path, stored: StoredCampaign, inject: InjectParams) -> tuple[pd.DataFrame, pd.DataFrame]:
    """A campaign's injections, and those that differ under other detectors: complete, and of the campaign that `file` names."""
    rows_each = inject.faults.bits * inject.faults.values
    most = inject.injections_per_layer * len(stored.sampled) * rows_each
    paths = [folder / "injections.parquet", folder / "detectors.parquet"]
    records = read_columns(paths[0], "inject", READ, most)
    changed = read_columns(paths[1], "inject", [*READ, "detector"], most * (len(stored.detectors) - 1))
    with reading(paths[0], "inject"):
        check_injections(records, rows_each)
        _check_layers(file, records, stored, inject)
    with reading(paths[1], "inject"):
        for name, part in changed.groupby("detector", sort=False):
            if name not in stored.detectors[1:]:
                raise InvalidArtifact(f"has injections under detector {name!r}, which the campaign did not compare")
            check_injections(part, rows_each)
        for name in stored.detectors[1:]:
            _check_changes(name, changed[changed["detector"] == name], records, inject)
    for path in paths:
        with reading(path, "inject"):
            if inputs_of(path, "inject") != stored.settings["inputs"]:
                raise InvalidArtifact(f"is of another campaign than {file}")
    return records, changed


def _check_layers(file: Path, records: pd.DataFrame, stored: StoredCampaign, inject: InjectParams) -> None:
    """Every sampled layer has the injections that were asked for, without a gap. Raises InvalidArtifact."""
    by_layer = dict(list(records.drop_duplicates(["layer", "index"]).groupby("layer", sort=False)))
    if strange := [layer for layer in by_layer if layer not in stored.sampled]:
        raise InvalidArtifact(f"has injections into layer {strange[0]!r}, and {file} names no such sampled layer")
    most = inject.injections_per_layer
    least = most if inject.stop_at == "never" else min(inject.pilot, most)
    bits = stored.strata or 1
    for layer, neurons in stored.sampled.items():
        if layer not in by_layer:
            raise InvalidArtifact(f"has no injections into layer {layer!r}, which {file} names")
        found = by_layer[layer]
        if not least <= len(found) <= most:
            asked = f"{most}" if least == most else f"{least} to {most}"
            raise InvalidArtifact(f"has {len(found)} injections into layer {layer!r}, instead of {asked}")
        # Of each bit that the plan drew by, the injections are numbered without a gap: see textguard.faults.plans.
        stratum, number = found["index"] % bits, found["index"] // bits
        if (number.groupby(stratum).max() + 1 != number.groupby(stratum).size()).any() or (
            stored.strata and ((stratum != found["bit"]).any() or stratum.nunique() < bits)
        ):
            raise InvalidArtifact(f"lacks some of the injections into layer {layer!r}")
        own = records[records["layer"] == layer]
        if own["bit"].max() >= stored.bits:
            raise InvalidArtifact(f"has bit {own['bit'].max()} of layer {layer!r}, whose values have {stored.bits}")
        if inject.faults.target == "neuron" and own["neuron"].max() >= neurons:
            raise InvalidArtifact(f"has neuron {own['neuron'].max()} of layer {layer!r}, which has {neurons}")
    if records["image"].nunique() > stored.eligible_images:
        raise InvalidArtifact(f"has more images than the {stored.eligible_images} that {file} calls eligible")


def _check_changes(detector: str, changed: pd.DataFrame, records: pd.DataFrame, inject: InjectParams) -> None:
    """What another detector changed are injections of the campaign: all that it can change. Raises InvalidArtifact."""
    name = ["layer", "index", "neuron", "bit", "image", "weight"]
    drawn, there = (pd.MultiIndex.from_frame(part[name]) for part in (records, changed))
    if not there.isin(drawn).all():
        raise InvalidArtifact(f"has injections under detector {detector!r} that the campaign did not draw")
    if detector == "profiled" or inject.faults.target == "metadata" or inject.faults.pattern not in ("value", "adjacent"):
        return  # what these let pass is not in the records
    limit = np.float32(detector.removeprefix("fixed:") if detector != "off" else np.inf)
    # As textguard.faults.sampling.rerun_changed chooses them.
    beyond = np.isfinite(limit) & ~(np.abs(records["faulty_value"].to_numpy(np.float32)) <= limit)
    differs = records.assign(differs=records["detected"] | beyond).groupby(["layer", "index"])["differs"].transform("any")
    if not drawn[differs.to_numpy(bool)].isin(there).all() or len(there) != int(differs.sum()):
        raise InvalidArtifact(f"lacks some of the injections that detector {detector!r} changes, or has others")


def place_weights(layers: Sequence[LayerResult], last_layer: str, *, latent: bool) -> dict[str, list[float]]:
    """How much each layer counts in each place of `PLACES`.

    last_layer: how a latent layer and the head behind it, where there is one (latent), make one last layer: `neurons` (E and C:
    the chance that a random neuron fault lands there), `equal`, or `head_only`.
    """
    count, neurons = len(layers), [float(layer.neurons) for layer in layers]
    own = 1 + latent  # layers that make the last one
    head = [0.0] * (count - 1) + [1.0]
    last = {"neurons": neurons[-own:], "equal": [1.0] * own, "head_only": head[-own:]}[last_layer]
    return {
        "head": head,
        "last_layer": [0.0] * (count - own) + last,
        "others": [1.0] * (count - own) + [0.0] * own,
        "overall": [1.0] * count,
        "by_neurons": neurons,
    }
