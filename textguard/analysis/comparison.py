"""Text-guided runs beside their baselines: one pair of runs, and the cells that several trainings make.

A cell is one (data set, backbone, variant); its runs differ in their seeds alone.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import numpy as np

from textguard.analysis.campaigns import CampaignRecords, place_weights
from textguard.analysis.files import RECORDS_DIR
from textguard.analysis.improvement import Draws, across, draw_layers, improvement, verdict, weigh
from textguard.analysis.temperature import rescaled_heads
from textguard.estimates.statistics import Estimate, over_trainings, paired_difference
from textguard.params import StatisticsParams
from textguard.schema.base import Measured
from textguard.schema.records import read_columns
from textguard.schema.results import (
    BASELINE,
    MEASURES,
    PLACES,
    Cell,
    CellLayer,
    CellUnderDetector,
    Headline,
    Improved,
    Improvement,
    LayerRatios,
    LayerVerdicts,
    PlaceRatios,
    Places,
    PlaceVerdicts,
    RescaledHead,
    RunResult,
    UnderDetector,
    Verdicts,
)

SHARE = (0.0, 1.0)
WITHIN = {"delta_loss": (0.0, math.inf), "top2diff": (-1.0, 1.0)}  # what means over trainings can be, where they are no shares


@dataclass(frozen=True)
class Side:
    """A run that is compared: its result alone, Top2Diff by image, bootstrap draws (`draw_layers`), and places' weights."""

    campaign: CampaignRecords
    result: RunResult
    top2diff: np.ndarray
    drawn: dict[str, dict[str, list[Draws]]]
    weights: dict[str, list[float]]


def side_of(campaign: CampaignRecords, result: RunResult, statistics: StatisticsParams) -> Side:
    """What comparisons need of a run."""
    weights = place_weights(campaign.layers, statistics.last_layer_weights, latent=campaign.latent)
    table = RECORDS_DIR / result.run / "predictions.parquet"
    top2diff = read_columns(table, "evaluate", ["top2diff"], result.top1.n)["top2diff"].to_numpy(float)
    return Side(campaign, result, top2diff, draw_layers(campaign.detectors, statistics.bootstrap, seed=0), weights)


@dataclass(frozen=True)
class Comparison:
    """A run beside another one, which is called its baseline here.

    ratios: detector, the one that counts first -> measure -> place -> ratio. layers: measure -> the ratio of each of the run's
    layers, in order, under the detector that counts; None where the baseline has no such layer. rescaled: detector -> name ->
    the ratio of DeltaLoss for the head with its logits scaled. top2diff: the difference.
    """

    ratios: dict[str, dict[str, dict[str, Estimate]]]
    layers: dict[str, list[Estimate | None]]
    rescaled: dict[str, dict[str, Estimate]]
    top2diff: Estimate


def compare(baseline: Side, own: Side) -> Comparison:
    """Improvements under every detector that both campaigns have, and by layer under the one that counts."""
    shared, confidence = [name for name in own.drawn if name in baseline.drawn], own.result.confidence
    ratios = {
        name: {
            measure: {
                place: improvement(
                    *(weigh(side.drawn[name][measure], side.weights[place]) for side in (baseline, own)), confidence
                )
                for place in PLACES
            }
            for measure in MEASURES
        }
        for name in shared
    }
    layers: dict[str, list[Estimate | None]] = {}
    for measure in MEASURES if shared else ():
        theirs, ours = (side.drawn[shared[0]][measure] for side in (baseline, own))
        layers[measure] = [
            None if place is None else improvement(theirs[place], draws, confidence)
            for place, draws in zip(_places(len(theirs), len(ours)), ours, strict=True)
        ]
    rescaled = {name: _rescaled(baseline, own, name) for name in shared if baseline.result.variant == BASELINE}
    return Comparison(ratios, layers, rescaled, paired_difference(own.top2diff, baseline.top2diff, confidence))


def _rescaled(baseline: Side, own: Side, detector: str) -> dict[str, Estimate]:
    """The head at the baseline's temperature, and with its scale in its weights, where they are known."""
    logits = [side.result.largest_logit for side in (baseline, own)]
    temperature = logits[0] / logits[1] if logits[1] else math.nan
    heads = rescaled_heads(own.campaign, detector, temperature, own.result.statistics["nonfinite"])
    theirs = baseline.drawn[detector]["delta_loss"][-1]
    draws = [draw_layers({detector: [head]}, len(theirs.plain), 0)[detector]["delta_loss"][0] for head in heads.values()]
    return {name: improvement(theirs, draw, own.result.confidence) for name, draw in zip(heads, draws, strict=True)}


def _places(theirs: int, own: int) -> list[int | None]:
    """For each of a run's layers, the place of the baseline's that does the same.

    Without a head of its own, a baseline has no latent layer: its last layer is to be compared with the head.
    """
    return list(range(own)) if theirs == own else [*range(theirs - 1), *[None] * (own - theirs), theirs - 1]


def _improved(ratios: Mapping[str, Mapping[str, Estimate]]) -> Improved:
    """The estimates alone."""
    return Improved(
        **{
            measure: PlaceRatios(**{place: Measured.of(ratio) for place, ratio in places.items()})
            for measure, places in ratios.items()
        }
    )


def with_improvement(result: RunResult, baseline: RunResult, compared: Comparison) -> RunResult:
    """A run's results, with how they compare to its baseline's."""
    layers = []
    for layer, *ratios in zip(result.layers, *compared.layers.values(), strict=True):
        found = {measure: Measured.of(ratio) for measure, ratio in zip(compared.layers, ratios, strict=True) if ratio}
        layers.append(layer.model_copy(update={"improvement": LayerRatios(**found)}) if found else layer)
    detectors: dict[str, UnderDetector] = dict(result.detectors)
    for name, ratios in compared.ratios.items():
        heads = {head: Measured.of(ratio) for head, ratio in compared.rescaled[name].items()}
        found = {"improvement": _improved(ratios)} | ({"rescaled": RescaledHead(**heads)} if heads else {})
        detectors[name] = detectors[name].model_copy(update=found)
    own = Improvement(
        baseline=baseline.run,
        **dict(_improved(next(iter(compared.ratios.values())))),
        top2diff=Measured.of(compared.top2diff),
    )
    return result.model_copy(update={"improvement": own, "layers": layers, "detectors": detectors})


def describe_cell(baselines: Sequence[RunResult], own: Sequence[RunResult], compared: Sequence[Comparison]) -> Cell:
    """Runs that differ in their seeds alone, beside their baselines: means over trainings, with intervals over these where
    there are several.
    """
    one, confidence, count = own[0], own[0].confidence, len(own)

    def mean(name: str, results: Sequence[Any]) -> Measured:
        within = WITHIN.get(name.rpartition(".")[2], SHARE)
        return Measured.of(over_trainings(list(map(attrgetter(name), results)), within, confidence))

    def places(results: Sequence[RunResult], detector: str) -> Places:
        found = [result.detectors[detector] for result in results]
        means = {place: Headline(**{measure: mean(f"{place}.{measure}", found) for measure in MEASURES}) for place in PLACES}
        return Places(**means, nonfinite=mean("nonfinite", found))

    def together(ratios: Sequence[Estimate]) -> Measured:
        return Measured.of(across(ratios, confidence))

    def under(detector: str) -> CellUnderDetector:
        found = {
            measure: {place: together([part.ratios[detector][measure][place] for part in compared]) for place in PLACES}
            for measure in MEASURES
        }
        heads = [part.rescaled.get(detector, {}) for part in compared]
        known = [name for name in heads[0] if all(name in part for part in heads)]
        rescaled = RescaledHead(**{name: together([part[name] for part in heads]) for name in known}) if known else None
        return CellUnderDetector(
            baseline=places(baselines, detector),
            own=places(own, detector),
            improvement=Improved(**{measure: PlaceRatios(**ratios) for measure, ratios in found.items()}),
            verdict=Verdicts(
                **{
                    measure: PlaceVerdicts(**{place: verdict(ratio, confidence, count) for place, ratio in ratios.items()})
                    for measure, ratios in found.items()
                }
            ),
            **({"rescaled": rescaled} if rescaled else {}),
        )

    layers = []
    for number, layer in enumerate(one.layers):
        if compared[0].layers["delta_loss"][number]:
            found = {measure: together([part.layers[measure][number] for part in compared]) for measure in MEASURES}
            said = {measure: verdict(ratio, confidence, count) for measure, ratio in found.items()}
            layers.append(CellLayer(layer=layer.layer, improvement=LayerRatios(**found), verdict=LayerVerdicts(**said)))
    return Cell(
        dataset=one.dataset,
        backbone=one.backbone,
        variant=one.variant,
        against=baselines[0].variant,
        seeds=[result.seed for result in own],
        top1_baseline=mean("top1", baselines),
        top1=mean("top1", own),
        parameters=one.parameters - baselines[0].parameters,
        multiply_adds=one.multiply_adds - baselines[0].multiply_adds,
        top2diff=mean("top2diff", compared),
        detectors={name: under(name) for name in compared[0].ratios},
        layers=layers,
    )
