"""One run's campaign, from the records of stage `inject` to estimates of each layer."""

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from textguard.analysis.files import RECORDS_DIR, RUNS_DIR
from textguard.artifacts import read_parquet, reading
from textguard.errors import InvalidArtifact
from textguard.estimates.summary import LayerResult, Totals, replace_records, summarise, summarise_totals
from textguard.params import Run, StatisticsParams
from textguard.schema.base import read
from textguard.schema.campaign import StoredCampaign
from textguard.schema.results import BASELINE

RECORDS = ["layer", "index", "bit", "weight", "detected", "masked", "golden_loss", "faulty_loss", "mismatch"]


@dataclass(frozen=True)
class CampaignRecords:
    """One run's faults. detectors: name -> its layers' results, in order of execution; the first is the one that counts.

    stored: campaign.json. records, totals: of the first detector, as `summarise` and `summarise_totals` take them.
    """

    detectors: dict[str, list[LayerResult]]
    stored: StoredCampaign
    records: pd.DataFrame
    totals: list[Totals]

    @property
    def layers(self) -> list[LayerResult]:
        """The results under the detector that counts."""
        return next(iter(self.detectors.values()))


def load_campaign(key: str, run: Run, statistics: StatisticsParams) -> CampaignRecords:
    """Read one run's campaign.json and records. Raises InvalidArtifact, InvalidParameter."""
    file = RUNS_DIR / key / "campaign.json"
    stored = read(file, "inject", StoredCampaign)
    records = read_parquet(RECORDS_DIR / key / "injections.parquet", "inject", RECORDS)
    changed = read_parquet(RECORDS_DIR / key / "detectors.parquet", "inject", [*RECORDS, "detector"])
    neurons = {site.layer: site.neurons for site in stored.layers}
    with reading(file, "inject"):
        if len(neurons) < 1 + (run.variant != BASELINE):
            raise InvalidArtifact("lacks layers")
        totals = {name: [Totals.from_json(layer.as_json()) for layer in stored.exact[name]] for name in stored.detectors}
    detectors = {}
    for name, known in totals.items():
        under = replace_records(records, changed.loc[changed["detector"] == name, RECORDS])
        found = summarise(under, neurons, stored.strata, statistics.nonfinite)
        found |= {layer.layer: summarise_totals(layer, statistics.nonfinite) for layer in known}
        missing = [layer for layer in neurons if layer not in found]
        if missing:
            raise InvalidArtifact(f"{file}: layer {missing[0]!r} has no records; run 'dvc repro': stage 'inject' writes them")
        detectors[name] = [found[layer] for layer in neurons]
    return CampaignRecords(detectors, stored, records, next(iter(totals.values())))


def last_layer_weights(run: Run, layers: Sequence[LayerResult], weights: str) -> list[float]:
    """How much each layer counts in "the last layer", which a text-guided classifier's latent layer and head make together.

    weights: `neurons` (E and C: the chance that a random neuron fault lands there), `equal`, or `head_only`.
    """
    counts = [0.0] * len(layers)
    counts[-1] = 1.0
    if run.variant != BASELINE and weights != "head_only":
        counts[-2:] = [float(layer.neurons) for layer in layers[-2:]] if weights == "neurons" else [1.0, 1.0]
    return counts
