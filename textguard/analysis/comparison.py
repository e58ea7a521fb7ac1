"""Text-guided runs beside their baselines: one pair of runs, and the cells that several trainings make.

A cell is one (data set, backbone, variant); its runs differ in their seeds alone.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from textguard.analysis.campaigns import CampaignRecords, last_layer_weights
from textguard.analysis.improvement import Draws, Ratio, across, draw_pairs, improvement, verdict, weigh
from textguard.estimates.statistics import Estimate, over_trainings
from textguard.params import Run, StatisticsParams
from textguard.schema.base import Measured
from textguard.schema.results import (
    Cell,
    CellUnderDetector,
    Improved,
    Improvement,
    RunResult,
    UnderDetector,
    Verdicts,
)

SHARE = (0.0, 1.0)


@dataclass(frozen=True)
class Ratios:
    """DeltaLoss of a baseline / that of a text-guided run.

    head: the text-guided head alone against the baseline's last layer, however `last_layer` weighs head and latent layer.
    """

    overall: Ratio
    last_layer: Ratio
    head: Ratio

    def as_improved(self) -> Improved:
        """The estimates alone."""
        return Improved(**{name: Measured.of(ratio.estimate) for name, ratio in vars(self).items()})


@dataclass(frozen=True)
class Comparison:
    """A run beside its baseline. detectors: by name, the one that counts first; layers: the latter's, in order."""

    detectors: dict[str, Ratios]
    layers: list[Estimate]


def compare(
    baseline_run: Run, baseline: CampaignRecords, run: Run, guided: CampaignRecords, statistics: StatisticsParams
) -> Comparison:
    """Improvements under every detector that both campaigns have, and by layer under the one that counts."""
    shared = [name for name in guided.detectors if name in baseline.detectors]
    drawn = {
        name: draw_pairs(baseline.detectors[name], guided.detectors[name], statistics.bootstrap, seed=0) for name in shared
    }

    def ratios(name: str) -> Ratios:
        pairs = list(zip((baseline_run, run), (baseline.detectors[name], guided.detectors[name]), drawn[name], strict=True))

        def last(weights: str) -> Ratio:
            return _ratio([(draws, last_layer_weights(who, layers, weights)) for who, layers, draws in pairs], statistics)

        return Ratios(
            overall=_ratio([(draws, [1.0] * len(draws)) for _, _, draws in pairs], statistics),
            last_layer=last(statistics.last_layer_weights),
            head=last("head_only"),
        )

    first = zip(*drawn[shared[0]], strict=False) if shared else ()
    return Comparison(
        {name: ratios(name) for name in shared}, [improvement(*pair, statistics.confidence).estimate for pair in first]
    )


def _ratio(weighted: Sequence[tuple[Sequence[Draws], Sequence[float]]], statistics: StatisticsParams) -> Ratio:
    """The improvement of weighted means over layers. weighted: draws and weights of the baseline, then of the guided run."""
    return improvement(*(weigh(draws, weights) for draws, weights in weighted), statistics.confidence)


def with_improvement(result: RunResult, baseline: RunResult, compared: Comparison, top2diff: Estimate) -> RunResult:
    """A run's results, with how they compare to its baseline's. top2diff: its Top2Diff minus the baseline's."""
    first = next(iter(compared.detectors.values()))
    layers = [
        layer.model_copy(update={"improvement": Measured.of(estimate)})
        for layer, estimate in zip(result.layers, compared.layers, strict=False)
    ]
    detectors: dict[str, UnderDetector] = dict(result.detectors)
    for name, ratios in compared.detectors.items():
        detectors[name] = detectors[name].model_copy(update={"improvement": ratios.as_improved()})
    own = Improvement(
        baseline=baseline.run,
        **dict(first.as_improved()),
        top2diff=Measured.of(top2diff),
        verdict=_verdicts({name: ratio.estimate for name, ratio in vars(first).items()}, result.confidence),
    )
    return result.model_copy(
        update={"improvement": own, "layers": layers + result.layers[len(layers) :], "detectors": detectors}
    )


def _verdicts(estimates: dict[str, Estimate], confidence: float) -> Verdicts:
    return Verdicts(**{name: verdict(estimate, confidence) for name, estimate in estimates.items()})


def describe_cell(baselines: Sequence[RunResult], guided: Sequence[RunResult], compared: Sequence[Comparison]) -> Cell:
    """One cell's trainings beside their baselines: means over trainings, with intervals over these where there are several."""
    one, confidence = guided[0], guided[0].confidence

    def mean(
        results: Sequence[RunResult], pick: Callable[[RunResult], Estimate], within: tuple[float, float] = (0.0, math.inf)
    ) -> Measured:
        return Measured.of(over_trainings([pick(result) for result in results], within, confidence))

    def under(name: str) -> CellUnderDetector:
        found = [vars(comparison.detectors[name]) for comparison in compared]
        improved = {part: Measured.of(across([ratios[part] for ratios in found], confidence)) for part in found[0]}
        return CellUnderDetector(
            **improved,
            overall_baseline=mean(baselines, lambda result: result.detectors[name].overall.delta_loss),
            overall_guided=mean(guided, lambda result: result.detectors[name].overall.delta_loss),
            last_layer_baseline=mean(baselines, lambda result: result.detectors[name].last_layer.delta_loss),
            last_layer_guided=mean(guided, lambda result: result.detectors[name].last_layer.delta_loss),
            nonfinite_baseline=mean(baselines, lambda result: result.detectors[name].nonfinite, SHARE),
            nonfinite_guided=mean(guided, lambda result: result.detectors[name].nonfinite, SHARE),
        )

    detectors = {name: under(name) for name in compared[0].detectors}
    first = next(iter(detectors.values()))
    improved = {"overall": first.overall, "last_layer": first.last_layer, "head": first.head}
    return Cell(
        dataset=one.dataset,
        backbone=one.backbone,
        variant=one.variant,
        seeds=[result.seed for result in guided],
        top1_baseline=mean(baselines, lambda result: result.top1, SHARE),
        top1=mean(guided, lambda result: result.top1, SHARE),
        parameters=one.parameters - baselines[0].parameters,
        multiply_adds=one.multiply_adds - baselines[0].multiply_adds,
        **improved,
        verdict=_verdicts(improved, confidence),
        top2diff=mean(guided, lambda result: result.improvement.top2diff, (-1.0, 1.0)),
        detectors=detectors,
    )
